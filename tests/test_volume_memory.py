"""What a volume of a tebibyte costs: at most 16 bytes of memory per chunk, and work for what is dirty only."""

from __future__ import annotations

import json
import subprocess
import sys

from silo.chunkmap import MIGRATION_DIRTY, SYNC_DIRTY, WINDOW, ChunkMap, Residency
from silo.dirtymap import settle, take_migration, take_sync
from silo.geometry import Geometry
from silo.heatmap import HeatMap

TEBIBYTE = 1 << 40
BYTES_PER_CHUNK = 16
FIXED = 48 << 20
"""Room for the interpreter's own growth, one window of scratch space, and the regions of the device."""

PROGRAM = """
import asyncio, json, resource

from silo.chunkmap import Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.geometry import Geometry
from silo.group import Group

def rss_max():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

async def main():
    before = rss_max()
    size = 1 << 40
    group = Group("vm", SystemClock())
    volume = group.add("disk", MemoryDevice(size), Geometry(size))
    chunk = volume.geometry.chunk_size
    group.record_migration(True)
    for place in range(0, size, size // 100):
        offset = place // chunk * chunk
        assert volume.write_nowait(offset, b"x" * 4096)
        assert bytes(volume.read_nowait(offset, 1)) == b"x"
    cut = group.take()
    for number in cut.volumes["disk"].data.tolist():
        await cut.volumes["disk"].read(number)
    cut.commit()
    written = len(cut.volumes["disk"].data)
    await volume.flush()
    await volume.zero(0, size)
    await volume.flush()
    zeros = group.take().volumes["disk"].zeros
    group.cut.commit()
    moved = len(group.take_migration()["disk"])
    volume.heat.advance(1e9)  # touches every count
    counts = volume.chunks.count_residency()
    print(json.dumps({
        "written": written, "zeros": zeros, "moved": moved, "exposed": group.exposed_bytes,
        "zero": counts[Residency.ZERO], "grown": rss_max() - before,
    }))

asyncio.run(main())
"""


def test_the_maps_of_a_tebibyte():
    """The state, both heats and the summary of each chunk."""
    count = Geometry(TEBIBYTE).chunk_count
    chunks, heat = ChunkMap.filled(count, Residency.PRESENT), HeatMap(count)
    held = chunks.view.nbytes + len(chunks.summary) + heat.read_view.nbytes + heat.write_view.nbytes
    assert held <= BYTES_PER_CHUNK * count


def test_a_process_that_serves_a_tebibyte():
    """The peak of the whole process, through writes, a cut, flushes, zeroing all of it and a migration round."""
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    found = json.loads(output)
    count = Geometry(TEBIBYTE).chunk_count
    grown = found.pop("grown")
    assert found == {"written": 101, "zeros": [[0, count]], "moved": count, "exposed": 0, "zero": count}
    assert grown <= BYTES_PER_CHUNK * count + FIXED


def test_taking_costs_what_is_dirty(monkeypatch):
    """Of 4096 windows of a tebibyte those with dirty chunks are looked at, for every recorder."""
    count = Geometry(TEBIBYTE).chunk_count
    chunks = ChunkMap.filled(count, Residency.PRESENT)
    looked: list[int] = []
    dirty_windows = ChunkMap.dirty_windows

    def counted(self, bits):
        for first, states in dirty_windows(self, bits):
            looked.append(first)
            yield first, states

    monkeypatch.setattr(ChunkMap, "dirty_windows", counted)
    for chunk in (5, 6, count // 2, count - 1):
        chunks.mark(chunk, SYNC_DIRTY | MIGRATION_DIRTY)
    present, zero = take_sync(chunks)
    settle(chunks)
    moved = take_migration(chunks)
    assert (present.tolist(), zero) == ([5, 6, count // 2, count - 1], [])
    assert moved.tolist() == present.tolist()
    assert set(looked) == {0, count // 2, count - WINDOW}
    assert len(looked) <= 10 * 3, "a few passes over three windows"
    looked.clear()
    assert take_sync(chunks)[0].tolist() == []
    assert looked == []
