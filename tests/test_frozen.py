"""Room for copies, and the end of a cut."""

from __future__ import annotations

import asyncio

import pytest

from silo.chunkmap import FROZEN, SYNC_DIRTY, SYNC_IN_CUT, Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.errors import CapacityError, InvariantError
from silo.frozen import CopySpace
from silo.group import CopyLimits, Group
from tests.support.held import HeldDevice
from tests.support.volumes import CHUNK, chunks_with, make_volume

OLD, NEW = b"o" * CHUNK, b"n" * CHUNK


def test_copies_go_to_memory_first_and_then_to_a_file(tmp_path):
    """Both give back what was put; dropping gives room back, in the file for copies of the same size."""
    space = CopySpace(memory_limit=10, spill_limit=10, directory=str(tmp_path))
    memory, spilled = space.put(b"12345678"), space.put(b"abcdefgh")
    assert (memory, spilled) == (b"12345678", (0, 8))
    assert [space.get(memory), space.get(spilled)] == [b"12345678", b"abcdefgh"]
    assert space.used == 16
    space.drop(spilled)
    assert space.put(b"xyz") is None, "neither 2 bytes of memory nor 2 of the file are enough"
    space.drop(memory)
    assert space.used == 0
    assert space.put(b"0123456789") == b"0123456789"
    again = space.put(b"ABCDEFGH")
    assert again == (0, 8), "the place of the dropped one"
    assert space.get(again) == b"ABCDEFGH"
    assert space.put(b"12345678") is None
    space.close()


def test_the_file_is_gone_when_the_space_is_closed(tmp_path):
    """It is unlinked from the start; what was spilled cannot be read afterwards. Closing twice is harmless."""
    space = CopySpace(memory_limit=0, spill_limit=10, directory=str(tmp_path))
    kept = space.put(b"abc")
    assert list(tmp_path.iterdir()) == []
    space.close()
    space.close()
    assert space.used == 0
    assert space.put(b"") == b"", "nothing needs no room"
    assert space.put(b"x") is None
    with pytest.raises(InvariantError):
        space.get(kept)


def test_a_directory_that_is_gone_is_no_room(tmp_path):
    """The cut overflows; the guest's write must not fail because of it."""
    space = CopySpace(memory_limit=0, spill_limit=10, directory=str(tmp_path / "gone"))
    assert space.put(b"abc") is None


@pytest.mark.parametrize("written", [OSError("no space left"), 1])
def test_a_full_disk_is_no_room(tmp_path, monkeypatch, written):
    """Whether the disk refuses all of the copy or a part of it."""

    def pwrite(fd, data, offset):
        if isinstance(written, OSError):
            raise written
        return written

    monkeypatch.setattr("silo.frozen.os.pwrite", pwrite)
    space = CopySpace(memory_limit=0, spill_limit=10, directory=str(tmp_path))
    assert space.put(b"abc") is None
    space.close()


def test_a_file_that_was_cut_short_is_noticed(tmp_path, monkeypatch):
    """A copy is returned whole or not at all."""
    space = CopySpace(memory_limit=0, spill_limit=10, directory=str(tmp_path))
    kept = space.put(b"abc")
    monkeypatch.setattr("silo.frozen.os.pread", lambda fd, size, offset: b"ab")
    with pytest.raises(InvariantError):
        space.get(kept)
    space.close()


def two_volumes(**limits: int) -> tuple[Group, list]:
    group = Group("group", SystemClock(), copies=CopyLimits(**limits))
    volumes = []
    for name in ("disk", "memory"):
        _, volume = make_volume(MemoryDevice(4 * CHUNK), group=group, name=name)
        assert volume.write_nowait(0, OLD)
        assert volume.write_nowait(2 * CHUNK, OLD)
        volumes.append(volume)
    return group, volumes


async def test_a_cut_is_what_was_there():
    """The guest writes on; both volumes are read as they were, copied or not."""
    group, volumes = two_volumes()
    assert volumes[0].zero_nowait(3 * CHUNK, CHUNK)
    cut = group.take()
    assert group.cut is cut
    assert (cut.is_empty, cut.chunk_count, cut.copied_bytes) == (False, 5, 0)
    assert volumes[0].write_nowait(0, NEW)
    assert volumes[1].zero_nowait(2 * CHUNK, CHUNK)
    assert cut.copied_bytes == CHUNK, "zeroing needs no copy"
    for name, part in cut.volumes.items():
        assert part.name == name
        assert part.data.tolist() == [0, 2]
        assert [bytes(await part.read(chunk)) for chunk in (0, 2)] == [OLD, OLD]
    assert cut.volumes["disk"].zeros == [(3, 4)]
    cut.commit()
    assert (group.cut, volumes[0].cut) == (None, None)
    assert chunks_with(volumes[0], SYNC_DIRTY) == [0]
    assert chunks_with(volumes[1], SYNC_DIRTY) == [2]
    assert chunks_with(volumes[0], SYNC_IN_CUT) == chunks_with(volumes[0], FROZEN) == []


async def test_a_released_chunk_is_overwritten_without_a_copy():
    """The uploader has it; releasing gives back the copy that there may be."""
    group, (volume, _) = two_volumes()
    cut = group.take()
    part = cut.volumes["disk"]
    captured = await part.read(0)
    part.release(0)
    assert volume.write_nowait(0, NEW)
    assert bytes(captured) == OLD
    assert cut.copied_bytes == 0
    assert volume.write_nowait(2 * CHUNK, NEW)
    assert cut.copied_bytes == CHUNK
    part.release(2)
    assert cut.copied_bytes == 0
    with pytest.raises(InvariantError, match="released"):
        await part.read(0)
    cut.abandon()


class ColdDevice(MemoryDevice):
    """Never answers at once; something may happen while it reads."""

    async def read(self, offset: int, length: int) -> bytes:
        self.while_reading()
        return await super().read(offset, length)

    def copy_nowait(self, offset: int, into: memoryview) -> bool:
        return False

    def while_reading(self) -> None:
        """Replaced by tests."""


@pytest.mark.parametrize("kind", [MemoryDevice, ColdDevice])
async def test_chunks_are_captured_together(kind):
    """Neighbours or not, overwritten before or not, in any order: what the cut froze, released and in its place."""
    device = kind(7 * CHUNK + 512)
    _, volume = make_volume(device)
    old = [bytes([65 + chunk]) * (CHUNK if chunk < 7 else 512) for chunk in range(8)]
    for chunk, content in enumerate(old):
        assert volume.write_nowait(chunk * CHUNK, content)
    group = Group("group", SystemClock())
    group.volumes["disk"] = volume
    cut = group.take()
    part = cut.volumes["disk"]
    assert volume.write_nowait(CHUNK, NEW)
    room = memoryview(bytearray(8 * CHUNK))
    order = [5, 0, 1, 2, 6, 7]
    assert list(map(bytes, await part.capture(order, room))) == [old[chunk] for chunk in order]
    assert bytes(room[: 5 * CHUNK + 512]) == b"".join(old[chunk] for chunk in order)
    assert chunks_with(volume, FROZEN) == [3, 4]
    assert cut.copied_bytes == 0
    with pytest.raises(InvariantError, match="released"):
        await part.capture([0], room)
    cut.abandon()


async def test_what_is_overwritten_while_it_is_captured_is_captured_as_it_was():
    device = ColdDevice(4 * CHUNK)
    _, volume = make_volume(device)
    assert volume.write_nowait(0, OLD * 3)
    group = Group("group", SystemClock())
    group.volumes["disk"] = volume
    cut = group.take()
    device.while_reading = lambda: volume.write_nowait(CHUNK, NEW) and None
    found = await cut.volumes["disk"].capture([0, 1, 2], memoryview(bytearray(3 * CHUNK)))
    assert list(map(bytes, found)) == [OLD, OLD, OLD]
    assert bytes(device.read_nowait(CHUNK, CHUNK)) == NEW
    cut.commit()
    assert chunks_with(volume, SYNC_DIRTY) == [1]


async def test_nothing_is_captured_of_a_cut_that_overflowed():
    group, (volume, _) = two_volumes(memory=0, spill=0)
    cut = group.take()
    assert volume.write_nowait(0, NEW)
    with pytest.raises(CapacityError):
        await cut.volumes["disk"].capture([0, 2], memoryview(bytearray(2 * CHUNK)))
    cut.abandon()


async def test_an_abandoned_cut_is_dirty_again():
    """Nothing was committed, so all of it is for the next cut; abandoning twice is harmless."""
    group, volumes = two_volumes()
    cut = group.take()
    assert volumes[0].write_nowait(0, NEW)
    cut.abandon()
    cut.abandon()
    assert chunks_with(volumes[0], SYNC_DIRTY) == chunks_with(volumes[1], SYNC_DIRTY) == [0, 2]
    again = group.take()
    assert bytes(await again.volumes["disk"].read(0)) == NEW
    again.commit()


async def test_a_cut_is_decided_once():
    """A commit after the end would clean what the next cut has taken."""
    group, _ = two_volumes()
    cut = group.take()
    cut.commit()
    with pytest.raises(InvariantError, match="twice"):
        cut.commit()
    empty = group.take()
    assert empty.is_empty
    with pytest.raises(InvariantError, match="another one"):
        group.take()
    empty.abandon()


async def test_an_overflow_gives_the_cut_up_and_not_the_guest():
    """Room for one copy: the second write goes through, the cut can only be abandoned, on all volumes."""
    group, (volume, other) = two_volumes(memory=CHUNK, spill=0)
    cut = group.take()
    part = cut.volumes["disk"]
    assert volume.write_nowait(0, NEW)
    assert volume.write_nowait(2 * CHUNK, NEW)
    assert cut.overflowed
    assert cut.copied_bytes == 0
    assert chunks_with(volume, FROZEN) == chunks_with(other, FROZEN) == []
    for lost in (part, cut.volumes["memory"]):
        with pytest.raises(CapacityError, match="no room"):
            await lost.read(0)
    part.release(0)
    with pytest.raises(InvariantError, match="lost old content"):
        cut.commit()
    assert group.cut is cut, "an overflowed cut still has to be abandoned"
    cut.abandon()
    assert chunks_with(volume, SYNC_DIRTY) == [0, 2]
    with pytest.raises(CapacityError):
        await part.read(0)


async def test_an_overflow_in_the_middle_of_a_large_write():
    """The write covers three frozen chunks with room for one: all of it is written, and nothing is frozen."""
    group, volume = make_volume(MemoryDevice(4 * CHUNK), copies=CopyLimits(memory=CHUNK, spill=0))
    assert volume.write_nowait(0, OLD * 4)
    cut = group.take()
    assert volume.write_nowait(0, NEW * 3)
    assert cut.overflowed
    assert bytes(await volume.read(0, 4 * CHUNK)) == NEW * 3 + OLD
    cut.abandon()
    assert chunks_with(volume, SYNC_DIRTY) == [0, 1, 2, 3]


async def test_a_late_uploader_cannot_thaw_the_next_cut():
    """It releases a chunk of a cut that has ended; the next cut has the same chunk frozen."""
    group, (volume, _) = two_volumes()
    late = group.take().volumes["disk"]
    group.cut.abandon()
    cut = group.take()
    late.release(0)
    assert volume.write_nowait(0, NEW)
    assert bytes(await cut.volumes["disk"].read(0)) == OLD
    with pytest.raises(InvariantError, match="ended"):
        await late.read(2)
    cut.commit()


async def test_copies_spill_to_disk(tmp_path):
    """Memory for one chunk and a directory for the rest: the cut survives."""
    group, volume = make_volume(
        MemoryDevice(4 * CHUNK), copies=CopyLimits(memory=CHUNK, spill=8 * CHUNK, directory=str(tmp_path))
    )
    for chunk in range(4):
        assert volume.write_nowait(chunk * CHUNK, bytes([chunk + 1]) * CHUNK)
    cut = group.take()
    assert volume.write_nowait(0, NEW * 4)
    part = cut.volumes["disk"]
    assert [bytes(await part.read(chunk))[0] for chunk in range(4)] == [1, 2, 3, 4]
    part.release(3)
    cut.commit()


async def test_the_cut_of_a_restarted_process_must_be_made_meaningful_first():
    """Chunks that were frozen for the cut of a dead process are refused, not silently mixed with a new cut."""
    group, volume = make_volume(MemoryDevice(CHUNK))
    volume.chunks.mark(0, SYNC_IN_CUT)
    volume.chunks.states[0] |= FROZEN
    with pytest.raises(InvariantError):
        group.take()
    assert volume.chunks.residency(0) is Residency.PRESENT


async def test_what_was_taken_ahead_is_settled_and_survives_an_abandoned_cut():
    """It is in no cut's lists; guests write to it as they like; only a commit, or their writes, change what it is."""
    group, volume = make_volume(MemoryDevice(4 * CHUNK))
    for chunk in range(4):
        assert volume.write_nowait(chunk * CHUNK, OLD)
    assert all(volume.take_ahead(chunk) for chunk in range(3))
    assert not volume.take_ahead(0), "it is taken already"
    assert volume.write_nowait(0, NEW)
    cut = group.take()
    assert cut.volumes["disk"].data.tolist() == [0, 3]
    assert cut.volumes["disk"].zeros == []
    assert volume.write_nowait(CHUNK, NEW)
    assert cut.copied_bytes == 0
    cut.abandon()
    assert volume.chunks.select_dirty(SYNC_DIRTY).tolist() == [0, 1, 3]
    assert volume.chunks.select_dirty(SYNC_IN_CUT).tolist() == [1, 2]
    cut = group.take()
    assert cut.volumes["disk"].data.tolist() == [0, 1, 3]
    cut.commit()
    assert group.exposed_bytes == 0


async def test_a_chunk_that_is_being_written_is_not_taken_ahead():
    """Nobody knows yet what it will hold, and the process may die before the write marks it again."""
    device = HeldDevice(4 * CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    volume.chunks.mark(0, SYNC_DIRTY)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW))
        held = await device.next("write")
        assert not volume.take_ahead(0)
        held.release()
    assert volume.take_ahead(0)
