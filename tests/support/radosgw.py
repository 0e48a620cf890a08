"""A real S3 server for the tests: Ceph's gateway over one monitor and one disk in memory, all on the loopback.

It checks signatures and the hashes of bodies, compares and swaps atomically, knows only unquoted ETags in
``If-Match``, and answers racing writers with 409 and 500. Debian has it in ``radosgw``, ``ceph-mon``, ``ceph-osd`` and
``ceph-common``. It takes some fifteen seconds to start.
"""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.s3 import S3Server
from tests.support.tools import require_tool

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph")
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 20
ACCESS_KEY_ID, SECRET_ACCESS_KEY = "AKIASILOTESTS", "secret-of-the-tests"
CLUSTER, DISK = "a7f64266-0894-4f1e-a635-d0aeaca0e993", "a7f64266-0894-4f1e-a635-d0aeaca0e994"

CONFIGURATION = """
[global]
fsid = {cluster}
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms mon service mode = crc
ms mon cluster mode = crc
ms bind ipv6 = false
mon host = [v2:127.0.0.1:{mon_port}]
mon initial members = a
mon allow pool size one = true
mon cluster log file = /dev/null
mon data avail crit = 0
mon data = {directory}/mon
osd data = {directory}/osd
osd objectstore = memstore
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
memstore device bytes = 1073741824
run dir = {directory}
admin socket =
log file = {directory}/$name.log
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd class dir = {libraries}/rados-classes
rgw data = {directory}
rgw frontends = beast endpoint=127.0.0.1:{port}
[osd]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
"""


@contextmanager
def radosgw_server(directory: Path) -> Iterator[S3Server]:
    """The server, with one user, on a free port; its files are in ``directory``. Skips the test without Ceph."""
    for program in PROGRAMS:
        require_tool(program)
    mon_port, port = _free_port(), _free_port()
    libraries = next(Path(shutil.which("radosgw") or "").resolve().parents[1].glob("lib/*/ceph")).parent
    (directory / "mon").mkdir()
    (directory / "osd").mkdir()
    (directory / "ceph.conf").write_text(
        CONFIGURATION.format(
            cluster=CLUSTER, directory=directory, libraries=libraries, mon_port=mon_port, port=port
        )
    )
    with ExitStack() as running:
        _run(directory, "ceph-mon", "--mkfs", "-i", "a")
        running.enter_context(_daemon(directory, "ceph-mon", "-i", "a"))
        _run(directory, "ceph", "osd", "new", DISK)
        _run(directory, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", DISK)
        running.enter_context(_daemon(directory, "ceph-osd", "-i", "0"))
        keys = ("--access-key", ACCESS_KEY_ID, "--secret-key", SECRET_ACCESS_KEY)
        _run(directory, "radosgw-admin", "user", "create", "--uid=silo", "--display-name=silo", *keys)
        running.enter_context(_daemon(directory, "radosgw", "-n", "client.admin"))
        _wait_listening(port)
        yield S3Server(f"http://127.0.0.1:{port}", ACCESS_KEY_ID, SECRET_ACCESS_KEY)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command(directory: Path, program: str, *arguments: str) -> list[str]:
    return [shutil.which(program) or program, "-c", str(directory / "ceph.conf"), *arguments]


def _run(directory: Path, *command: str) -> None:
    done = subprocess.run(
        _command(directory, *command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")


@contextmanager
def _daemon(directory: Path, *command: str) -> Iterator[None]:
    with (directory / f"{command[0]}.out").open("wb") as output:
        process = subprocess.Popen(_command(directory, *command, "-f"), stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_listening(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        finally:
            connection.close()
