"""Every metadata context as other projects' programs see it, on a daemon with a store; and what backups would copy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from silo.exports.nbd_client import NbdClient
from silo.exports.nbd_contexts import CONTEXT_NAMES
from tests.support.daemons import Daemon

pytestmark = pytest.mark.interop

RequireTool = Callable[[str], str]
CHUNK = 64 * 1024
SIZE = 64 * CHUNK
TIMEOUT_S = 40.0


async def ask(*argv: str) -> list[dict[str, object]]:
    """Run a program that prints a list in JSON."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(TIMEOUT_S):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    found: list[dict[str, object]] = json.loads(out)
    return found


def chunks_where(extents: list[dict[str, object]], key: str, value: object) -> list[int]:
    """The chunks of the extents with this value, which begin and end between chunks."""
    found: list[int] = []
    for extent in extents:
        start, length = int(str(extent.get("offset", extent.get("start")))), int(str(extent["length"]))
        assert (start % CHUNK, length % CHUNK) == (0, 0)
        if extent[key] == value:
            found += range(start // CHUNK, (start + length) // CHUNK)
    return found


async def test_every_context_tells_what_happened(tmp_path: Path, require_tool: RequireTool) -> None:
    """Written and stored, written again, trimmed: nbdinfo shows it in each context, QEMU in its own dirty bitmap."""
    nbdinfo, qemu_img = require_tool("nbdinfo"), require_tool("qemu-img")
    socket = f"{tmp_path}/nbd.sock"
    uri = f"nbd+unix:///vm1/disk?socket={socket}"

    async def mapped(context: str) -> list[dict[str, object]]:
        extents = await ask(nbdinfo, "--json", f"--map={context}", uri)
        assert sum(int(str(extent["length"])) for extent in extents) == SIZE, context
        return extents

    async def dirty_for_qemu() -> list[int]:
        where = f"driver=nbd,server.type=unix,server.path={socket},export=vm1/disk"
        bitmap = "x-dirty-bitmap=qemu:dirty-bitmap:sync"
        extents = await ask(qemu_img, "map", "--output=json", "--image-opts", f"{where},{bitmap}")
        return chunks_where(extents, "data", False)  # QEMU shows what is dirty as holes

    daemon = Daemon(
        tmp_path / "a", "--group", "vm1", "--volume", f"disk={tmp_path}/disk.img,size={SIZE}",
        "--listen", f"unix:{socket}", "--store", f"file://{tmp_path}/store", "--sync-interval", "1h",
    )  # fmt: skip
    async with daemon:
        async with await NbdClient.connect(f"unix:{socket}") as guest:
            await guest.write(0, b"a" * 8 * CHUNK)
            await guest.write(20 * CHUNK + 5, b"b")
            assert chunks_where(await mapped("qemu:dirty-bitmap:sync"), "type", 1) == [*range(8), 20]
            assert await dirty_for_qemu() == [*range(8), 20]
            await daemon.call("sync", group="vm1")
            assert await dirty_for_qemu() == []
            await guest.write(3 * CHUNK, b"c")
            await guest.trim(5 * CHUNK, 2 * CHUNK)
            assert await dirty_for_qemu() == [3, 5, 6]
            assert chunks_where(await mapped("qemu:dirty-bitmap:sync"), "type", 1) == [3, 5, 6]
            assert chunks_where(await mapped("qemu:dirty-bitmap:migration"), "type", 1) == []
            local = [0, 1, 2, 3, 4, 7, 20]
            assert chunks_where(await mapped("base:allocation"), "type", 0) == local
            assert chunks_where(await mapped("silo:residency"), "type", 1) == local
            for _ in range(8):
                await guest.read(20 * CHUNK, 512)
            cold = chunks_where(await mapped("silo:heat"), "type", 0)
            assert 20 not in cold
            assert {*range(8, 20), *range(21, SIZE // CHUNK)} <= set(cold)
        assert set(CONTEXT_NAMES) == {
            "base:allocation", "qemu:dirty-bitmap:sync", "qemu:dirty-bitmap:migration", "silo:residency", "silo:heat",
        }  # fmt: skip


async def test_what_is_not_here_yet_is_shown(tmp_path: Path, require_tool: RequireTool) -> None:
    """After a lazy restore chunks are in the store; after an import has begun, at the server it comes from."""
    nbdinfo, nbdkit = require_tool("nbdinfo"), require_tool("nbdkit")
    remote, image = f"{tmp_path}/remote.sock", tmp_path / "remote.img"
    image.write_bytes(b"r" * SIZE)
    server = await asyncio.create_subprocess_exec(
        nbdkit, "-f", "-r", "-U", remote, "--filter=rate", "file", str(image), "rate=100K"
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not Path(remote).exists():
                assert server.returncode is None
                await asyncio.sleep(0.02)
        socket = f"{tmp_path}/nbd.sock"
        daemon = Daemon(
            tmp_path / "a", "--group", "vm1", "--listen", f"unix:{socket}",
            "--volume", f"disk={tmp_path}/disk.img,import=nbd+unix:///?socket={remote}",
        )  # fmt: skip
        async with daemon:
            uri = f"nbd+unix:///vm1/disk?socket={socket}"
            extents = await ask(nbdinfo, "--json", "--map=silo:residency", uri)
            assert chunks_where(extents, "type", 2), "most of it is still at the server"
            allocation = await ask(nbdinfo, "--json", "--map=base:allocation", uri)
            assert chunks_where(allocation, "type", 0) == list(range(SIZE // CHUNK)), (
                "nothing is claimed of it"
            )
    finally:
        server.kill()
        await server.wait()
