"""How much memory sync needs: at most 16 bytes per chunk, and what is really used of that on a sparse disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from silo.chunkmap import ChunkMap, Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.geometry import Geometry
from silo.group import Group
from silo.sync.file_store import FileStore
from silo.sync.reader import StoreReader
from silo.sync.restore import mark_absent, open_newest
from silo.sync.store_source import StoreSource
from tests.support.sync import FETCH, syncing

TIB = 1 << 40
CHUNK = 64 * 1024
BUFFERS = 64 << 20


def resident() -> int:
    """Bytes of this process in memory, shared pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_sparse_disk_of_a_tebibyte(clock: SystemClock, tmp_path: Path) -> None:
    """Written here and there, trimmed as a whole, synced, and restored lazily: far below 16 bytes per chunk."""
    store = FileStore(tmp_path / "store", clock)
    before = resident()
    group = Group("vm1", clock)
    geometry = Geometry(TIB, chunk_size=CHUNK)
    limit = 16 * geometry.chunk_count + BUFFERS
    group.add(
        "disk", MemoryDevice(TIB), geometry, chunks=ChunkMap.filled(geometry.chunk_count, Residency.ZERO)
    )
    places = np.linspace(0, geometry.chunk_count - 1, 40).astype(int).tolist()
    async with syncing(store, clock, group=group) as it:
        for chunk in places:
            await it.disk.write(chunk * CHUNK, b"%d" % chunk * 1000)
        await it.syncer.sync_now()
        await it.disk.zero(0, TIB)
        await it.disk.write(places[7] * CHUNK, b"kept" * 1000)
        await it.syncer.sync_now()
        assert resident() - before < limit
        assert it.syncer.status.sent_bytes < 1 << 20
        assert it.syncer.manifest.volume("disk").file_bytes < 1 << 20
    reader = StoreReader(store, clock, FETCH)
    manifest = await open_newest(reader, "vm1")
    source = StoreSource(manifest, reader)
    chunks = ChunkMap.filled(geometry.chunk_count, Residency.PRESENT)
    mark_absent(manifest, "disk", chunks, device_is_zero=True)
    assert chunks.count_residency()[Residency.ABSENT_STORE] == 1
    content = await source.fetch("disk", places[7], demand=True)
    assert content is not None
    assert bytes(content).startswith(b"kept" * 1000)
    assert resident() - before < limit
    await source.aclose()
    manifest.close()
