"""The load: one run of fio against one NBD server, and what it saw."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from benchmarks.common.child import cpu_seconds
from benchmarks.common.machine import busy_time
from silo.errors import UnavailableError

__all__ = ["Cell", "Client", "fill", "run_cell"]

_GRACE_S = 60.0
"""What a run may take beyond its own time before it counts as hung: starting up, and the last slow requests."""

_FILL_TIMEOUT_S = 300.0


@attrs.frozen
class Cell:
    """One row of the table: a pattern of requests."""

    name: str
    rw: str
    """fio's word: ``randread``, ``randwrite``, ``read``, ``write``."""
    request_size: int
    depth: int = 1
    jobs: int = 1
    sync_every_write: bool = False

    @property
    def reads(self) -> bool:
        """Whether this pattern only reads."""
        return self.rw.endswith("read")


@attrs.frozen
class Client:
    """How fio reaches a server. ``home`` holds the certificates for TLS, see `_environment`."""

    uri: str
    home: Path | None = None


def fill(client: Client, size: int) -> None:
    """Write everything once, so that nobody serves holes, with bytes that do not compress and are not zero."""
    job = {
        "name": "fill",
        "rw": "write",
        "bs": "1m",
        "iodepth": "4",
        "size": str(size),
        "refill_buffers": "1",
    }
    _fio(client, job, _FILL_TIMEOUT_S)


def run_cell(
    cell: Cell, client: Client, pid: int, size: int, runtime_s: float, seed: int
) -> dict[str, float]:
    """Run a pattern against the server ``pid``; what came out, per quantity.

    ``iops``, ``mib_s``; ``p50_us`` and ``p99_us`` (completion latency as the client sees it); ``cpu_us`` (CPU time of
    the server per request, in user space and kernel); ``others_cpu`` (share of the machine that neither the server
    nor fio used: other tenants, and the network stack's own threads).
    """
    before_machine, before_server = busy_time(), cpu_seconds(pid)
    report = _fio(client, _job(cell, size, runtime_s, seed), runtime_s)
    after_machine, after_server = busy_time(), cpu_seconds(pid)
    job = report["jobs"][0]
    side = job["read" if cell.reads else "write"]
    requests = side["total_ios"]
    server_s = after_server - before_server
    fio_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    elapsed_s = after_machine.total_s - before_machine.total_s
    others_s = after_machine.busy_s - before_machine.busy_s - server_s - fio_s
    percentiles = side["clat_ns"]["percentile"]
    return {
        "iops": side["iops"],
        "mib_s": side["bw_bytes"] / 2**20,
        "p50_us": percentiles["50.000000"] / 1000,
        "p99_us": percentiles["99.000000"] / 1000,
        "cpu_us": server_s / requests * 1e6,
        "others_cpu": max(0.0, others_s / elapsed_s),
    }


def _job(cell: Cell, size: int, runtime_s: float, seed: int) -> dict[str, str]:
    job = {
        "name": "cell",
        "rw": cell.rw,
        "bs": str(cell.request_size),
        "iodepth": str(cell.depth),
        "numjobs": str(cell.jobs),
        "size": str(size),
        "time_based": "1",
        "runtime": f"{runtime_s * 1000:.0f}ms",
        "randseed": str(seed),
        "norandommap": "1",
        "randrepeat": "1",
        "group_reporting": "1",
        "percentile_list": "50:99",
    }
    if cell.sync_every_write:
        job["fsync"] = "1"
    return job


def _fio(client: Client, job: Mapping[str, str], runtime_s: float) -> Any:
    argv = ["fio", "--ioengine=nbd", f"--uri={client.uri}", "--thread", "--output-format=json"]
    argv += [f"--{option}={value}" for option, value in job.items()]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=runtime_s + _GRACE_S,
        check=False,
        cwd=client.home,
        **_environment(client),
    )
    if done.returncode != 0:
        raise UnavailableError(f"fio failed against {client.uri}: {(done.stdout + done.stderr)[-2000:]}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def _environment(client: Client) -> dict[str, Any]:
    """fio cannot be told where certificates are; the library below it looks into the home of whoever is not root."""
    if client.home is None:
        return {}
    nobody = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    return {"env": {**os.environ, "HOME": str(client.home)}, **nobody}
