"""Disks of other projects' servers, brought in by a daemon that is killed, from a server that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silo.control import ControlClient
from silo.errors import SiloError
from silo.exports.nbd_client import NbdClient
from silo.restoring import restore_volume
from tests.support.certificates import Authority
from tests.support.daemons import Daemon

pytestmark = pytest.mark.interop

RequireTool = Callable[[str], str]
MIB = 1 << 20
SIZE = 16 * MIB
CHUNK = 64 * 1024
TIMEOUT_S = 30.0


class Remote:
    """A server of another project, with a file, at a Unix socket or a TCP port."""

    def __init__(self, *argv: str | Path) -> None:
        self._argv = [str(part) for part in argv]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, path: Path) -> None:
        """Start it, and wait until its socket is there."""
        path.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(*self._argv, stdin=asyncio.subprocess.DEVNULL)
        async with asyncio.timeout(TIMEOUT_S):
            while not path.exists():
                assert self._process.returncode is None, "the server ended"
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def sparse(path: Path, seed: int) -> bytes:
    """A file of data and holes."""
    chance = random.Random(seed)
    content = bytearray(SIZE)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for _ in range(24):
            offset, length = 4096 * chance.randrange(SIZE // 4096), 4096 * chance.randrange(1, 64)
            data = chance.randbytes(min(length, SIZE - offset))
            content[offset : offset + len(data)] = data
            file.seek(offset)
            file.write(data)
    return bytes(content)


def daemon_in(tmp_path: Path) -> Daemon:
    return Daemon(
        tmp_path / "a", "--listen", f"unix:{tmp_path}/{{group}}.sock", "--store", f"file://{tmp_path}/store",
        "--sync-interval", "100ms",
    )  # fmt: skip


async def begin(daemon: Daemon, uri: str) -> None:
    """Ask for an import, and leave as soon as it is served: it goes on."""
    async with ControlClient(daemon.state / "control.sock") as client:
        first = await anext(client.stream("import", group="vm1", volume="disk", uri=uri))
        assert first["event"] == "serving"


async def write_some(guest: NbdClient, model: bytearray, chance: random.Random, requests: int) -> None:
    """Writes and zeros of any alignment; what was acknowledged is in the model."""
    for _ in range(requests):
        length = chance.choice((512, 4096, CHUNK, 3 * CHUNK))
        offset = 512 * chance.randrange((SIZE - length) // 512)
        if chance.random() < 0.7:
            data = chance.randbytes(length)
            await guest.write(offset, data)
        else:
            data = bytes(length)
            await guest.write_zeroes(offset, length)
        model[offset : offset + length] = data


async def stored(tmp_path: Path) -> bytes:
    to = tmp_path / "restored.img"
    await restore_volume(f"file://{tmp_path}/store", "vm1", "disk", to, lambda *_: None)
    return to.read_bytes()


async def test_killed_and_cut_off_it_still_ends_well(tmp_path: Path, require_tool: RequireTool) -> None:
    """The daemon dies three times and the server twice while a guest writes. In the end the disk is what the server
    had, with every write over it; until then the store has nothing, and then it has all of it."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    chance = random.Random(seed)
    image, socket = tmp_path / "remote.img", tmp_path / "remote.sock"
    model = bytearray(sparse(image, seed))
    server = (require_tool("nbdkit"), "-f", "-r", "-U", socket)
    # 256 KiB a second at first: it cannot be over before it was killed.
    remote = Remote(*server, "--filter=rate", "file", image, "rate=2M")
    await remote.start(socket)
    daemon = daemon_in(tmp_path)
    await daemon.start()
    try:
        await begin(daemon, f"nbd+unix:///?socket={socket}")
        for life in range(3):
            async with await NbdClient.connect(f"unix:{tmp_path}/vm1.sock") as guest:
                await write_some(guest, model, chance, 4)
                await guest.flush()
            group = await daemon.group("vm1")
            assert group is not None
            if life == 0:
                assert group["state"] == "importing", "it must be killed in the middle"
            if group["state"] == "importing":
                assert (group["sync"]["generation"], group["sync"]["holds"]) == (0, ["import"])
            await daemon.kill()
            if life < 2:
                await remote.kill()
            await daemon.start()
            if life < 2:
                await daemon.wait_group(
                    "vm1", lambda group: not group["importing"] or group["importing"]["error"]
                )
                await remote.start(socket)
        await daemon.wait_group(
            "vm1", lambda group: group["state"] == "running" and group["sync"]["generation"]
        )
        await daemon.call("sync", group="vm1")
        await remote.kill()
        async with await NbdClient.connect(f"unix:{tmp_path}/vm1.sock") as guest:
            assert await guest.read(0, SIZE) == model, f"seed {seed}"
        assert await stored(tmp_path) == model, f"seed {seed}"
    finally:
        await daemon.kill()
        await remote.kill()


async def test_from_qemu_and_over_tls(tmp_path: Path, require_tool: RequireTool) -> None:
    """A qcow2 image behind qemu-nbd, which takes one connection; and nbdkit, which asks for our certificate."""
    source, image = tmp_path / "source.img", tmp_path / "image.qcow2"
    content = sparse(source, 5)
    convert = await asyncio.create_subprocess_exec(
        require_tool("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", str(source), str(image)
    )
    assert await convert.wait() == 0
    pki = tmp_path / "pki"
    pki.mkdir()
    authority = Authority(tmp_path)
    shutil.copy(authority.path, pki / "ca-cert.pem")
    for name in ("server", "client"):
        certificate, key = authority.issue(name)
        shutil.copy(certificate, pki / f"{name}-cert.pem")
        shutil.copy(key, pki / f"{name}-key.pem")
    tls = ("--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer")
    servers: list[tuple[str, tuple[Any, ...], str]] = [
        ("qemu", (require_tool("qemu-nbd"), "--read-only", "-t", "-f", "qcow2", image, "-k"), "nbd"),
        ("nbdkit", (require_tool("nbdkit"), "-f", "-r", *tls, "file", source, "-U"), "nbds"),
    ]
    silo = [sys.executable, "-m", "silo"]
    for name, argv, scheme in servers:
        socket, to = tmp_path / f"{name}.sock", tmp_path / f"{name}.img"
        remote = Remote(*argv, socket)
        await remote.start(socket)
        try:
            query = f"&tls-certificates={pki}&tls-hostname=localhost" if scheme == "nbds" else ""
            uri = f"{scheme}+unix:///?socket={socket}{query}"
            process = await asyncio.create_subprocess_exec(*silo, "import", uri, "--to", str(to), "--json")
            async with asyncio.timeout(TIMEOUT_S):
                assert await process.wait() == 0
            assert to.read_bytes() == content, name
        finally:
            await remote.kill()


async def test_what_an_import_refuses(tmp_path: Path, require_tool: RequireTool) -> None:
    """A name that is taken, here or in the store; a server that is not there. The daemon goes on."""
    image, socket = tmp_path / "remote.img", tmp_path / "remote.sock"
    content = sparse(image, 7)
    uri = f"nbd+unix:///?socket={socket}"
    remote = Remote(require_tool("nbdkit"), "-f", "-r", "-U", socket, "file", image)
    async with daemon_in(tmp_path) as daemon:
        with pytest.raises(SiloError, match="cannot be reached"):
            await daemon.call("import", group="vm1", volume="disk", uri=uri)
        await remote.start(socket)
        try:
            with pytest.raises(SiloError, match="NBD server"):
                await daemon.call("import", group="vm1", volume="disk", uri="http://host/")
            with pytest.raises(SiloError, match="cannot name"):
                await daemon.call("import", group="../vm1", volume="disk", uri=uri)
            assert await daemon.call("import", group="vm1", volume="disk", uri=uri) == {
                "group": "vm1",
                "size": SIZE,
            }
            with pytest.raises(SiloError, match="vm1"):
                await daemon.call("import", group="vm1", volume="disk", uri=uri)
            assert await daemon.call("sync", group="vm1") == {"generation": 1}
            await daemon.stop()
            other = Daemon(tmp_path / "b", "--store", f"file://{tmp_path}/store")
            async with other:
                with pytest.raises(SiloError, match="the store has a group vm1"):
                    await other.call("import", group="vm1", volume="disk", uri=uri)
        finally:
            await remote.kill()
    assert await stored(tmp_path) == content
