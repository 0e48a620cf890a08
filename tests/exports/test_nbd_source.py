"""Chunks from an NBD server: their content, what is skipped, and what happens while the server is away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from silo.clock import SystemClock
from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.memory import MemoryDevice
from silo.errors import ClosedError, UnavailableError
from silo.exports.nbd_exports import NbdExport, NbdExports
from silo.exports.nbd_server import NbdServer
from silo.exports.nbd_source import NbdSource
from silo.geometry import Geometry
from silo.volume import Volume
from tests.support.nbd_peer import condition
from tests.support.volumes import CHUNK, make_volume

COUNT = 16
SIZE = (COUNT - 1) * CHUNK + 512
GEOMETRY = Geometry(SIZE, CHUNK)


class Remote:
    """A server at a path, which can go away and return."""

    def __init__(self, path: Path, size: int = SIZE, *, block_size: int = 1) -> None:
        self.device = FaultyDevice(MemoryDevice(size))
        self.volume: Volume = make_volume(self.device)[1]
        self.uri = f"nbd+unix:///disk?socket={path}/remote.sock"
        self._where = f"unix:{path}/remote.sock"
        self._block_size = block_size

    @contextlib.asynccontextmanager
    async def serving(self, **options: object) -> AsyncIterator[NbdServer]:
        exports = NbdExports()
        exports.add(NbdExport("disk", self.volume, block_size=self._block_size, **options))
        async with asyncio.TaskGroup() as tasks:
            server = NbdServer(exports, tasks)
            server.listen(self._where)
            try:
                yield server
            finally:
                await server.aclose()

    def source(self, geometry: Geometry = GEOMETRY) -> NbdSource:
        return NbdSource(self.uri, geometry, SystemClock())


@contextlib.asynccontextmanager
async def closing(source: NbdSource) -> AsyncIterator[NbdSource]:
    try:
        yield source
    finally:
        await source.aclose()


@pytest.mark.parametrize("block_size", [1, 512, 4096])
async def test_chunks_are_what_the_server_has(tmp_path: Path, block_size: int):
    """All at once, the short last one too, whatever the server's blocks are."""
    size = SIZE if block_size <= 512 else COUNT * CHUNK
    geometry = Geometry(size, CHUNK)
    remote = Remote(tmp_path, size, block_size=block_size)
    content = SystemClock().token(size)
    await remote.volume.write(0, content)
    async with remote.serving(), closing(remote.source(geometry)) as source:
        chunks = await asyncio.gather(
            *(source.fetch("disk", chunk, demand=bool(chunk % 2)) for chunk in range(COUNT))
        )
    assert b"".join(chunks) == content
    assert source.fetched_bytes == size


async def test_small_payloads_are_put_together(tmp_path: Path):
    """A server that takes less in one request than a chunk has."""
    remote = Remote(tmp_path, 4 << 20)
    content = SystemClock().token(4 << 20)
    await remote.volume.write(0, content)
    geometry = Geometry(4 << 20, 4 << 20)
    async with remote.serving(payload_max=1 << 16), closing(remote.source(geometry)) as source:
        assert await source.fetch("disk", 0, demand=True) == content


async def test_holes_are_told_as_runs_of_whole_chunks(tmp_path: Path):
    """Only what is zero in all of its bytes; the last chunk too, short as it is."""
    remote = Remote(tmp_path)
    await remote.volume.zero(0, SIZE)
    for chunk in (3, 4, 9):
        await remote.volume.write(chunk * CHUNK + 100, b"x")
    async with remote.serving(), closing(remote.source()) as source:
        runs = [run async for run in source.zero_runs()]
    assert runs == [(0, 3), (5, 9), (10, COUNT)]
    coarse = Geometry(SIZE, 4 * CHUNK)
    async with remote.serving(), closing(remote.source(coarse)) as source:
        assert [run async for run in source.zero_runs()] == [(3, 4)]


async def test_a_demand_waits_for_the_server_to_return(tmp_path: Path):
    """In the background it fails at once, and says why until the server is back."""
    remote = Remote(tmp_path)
    await remote.volume.write(0, b"old" * 100)
    async with closing(remote.source()) as source:
        async with remote.serving():
            assert bytes(await source.fetch("disk", 0, demand=True))[:3] == b"old"
        async with asyncio.TaskGroup() as tasks:
            demand = tasks.create_task(source.fetch("disk", 1, demand=True))
            await condition(lambda: bool(source.error))
            with pytest.raises(UnavailableError, match="cannot be had"):
                await source.fetch("disk", 2, demand=False)
            assert not demand.done()
            async with remote.serving():
                assert await demand == bytes(CHUNK)
                assert source.error == ""


async def test_another_disk_is_not_taken_for_the_same(tmp_path: Path):
    """What returns with another size is waited past, as a server that is away."""
    remote, other = Remote(tmp_path), Remote(tmp_path, 2 * SIZE // 512 * 512)
    async with closing(remote.source()) as source:
        async with other.serving():
            with pytest.raises(UnavailableError, match="is it the same"):
                await source.fetch("disk", 0, demand=False)
        async with remote.serving():
            assert await source.fetch("disk", 0, demand=False) == bytes(CHUNK)


async def test_a_bad_sector_is_an_error_and_not_an_absence(tmp_path: Path):
    """The server's own refusal ends a demand; the connection stays, and the next call may have it."""
    remote = Remote(tmp_path)
    await remote.volume.write(0, b"x")
    async with remote.serving() as server, closing(remote.source()) as source:
        remote.device.fail(Verb.READ)
        with pytest.raises(UnavailableError):
            await source.fetch("disk", 0, demand=True)
        assert bytes(await source.fetch("disk", 0, demand=True))[:1] == b"x"
        assert server.connections == 1


async def test_closing_ends_whoever_waits(tmp_path: Path):
    """A guest that waits for a server that never comes is told when the group is closed."""
    source = Remote(tmp_path).source()
    async with asyncio.TaskGroup() as tasks:

        async def wait() -> None:
            with pytest.raises(ClosedError):
                await source.fetch("disk", 0, demand=True)

        tasks.create_task(wait())
        await condition(lambda: bool(source.error))
        await source.aclose()
        await source.aclose()
