"""The folder of a volume: which of its files is believed after which death."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from silo.checkpoint import encode_checkpoint, owner_tag
from silo.chunkmap import SYNC_DIRTY, ChunkMap, Residency
from silo.errors import CapacityError, ClosedError, CorruptionError, InvalidRequestError, UnavailableError
from silo.geometry import Geometry
from silo.volumestate import (
    DurableState,
    EphemeralState,
    Origin,
    create_folder,
    open_folder,
    read_folder,
    states_of_extents,
)

GEOMETRY = Geometry(8 * 4096, 4096)
OWNER = owner_tag("vm1", "disk")
ABSENT = bytes([Residency.ABSENT_STORE]) * 8
SUSPECT = Residency.PRESENT | SYNC_DIRTY


class Disk:
    """One folder, opened and abandoned as often as a test likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.boot = 1
        self.executor = ThreadPoolExecutor(1)

    def open(self, geometry: Geometry = GEOMETRY, fresh: bytes = ABSENT) -> DurableState:
        boot = f"boot {self.boot}"
        if self.folder.exists():
            opened = open_folder(self.folder, geometry, OWNER, boot)
        else:
            opened = create_folder(self.folder, geometry, OWNER, boot, fresh)
        return DurableState(self.folder, geometry, OWNER, self.executor, opened)

    def slots(self) -> tuple[bytes, bytes]:
        return (self.folder / "checkpoint.a").read_bytes(), (self.folder / "checkpoint.b").read_bytes()


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "disk")


async def test_a_fresh_volume_is_durable_before_its_first_use(disk: Disk) -> None:
    state = disk.open()
    assert (state.origin, state.needs_compare, bytes(state.buffer)) == (Origin.FRESH, False, ABSENT)
    disk.boot += 1  # the machine dies before anything else happens
    again = disk.open()
    assert (again.origin, again.needs_compare, bytes(again.buffer)) == (Origin.CHECKPOINT, True, ABSENT)


async def test_the_map_counts_after_the_death_of_the_process(disk: Disk) -> None:
    """Dirty bits too, and without any checkpoint."""
    state = disk.open()
    ChunkMap(state.buffer, 8).mark(3, SYNC_DIRTY)
    again = disk.open()
    assert (again.origin, again.needs_compare) == (Origin.MAP, False)
    assert bytes(again.buffer) == ABSENT[:3] + bytes([SYNC_DIRTY]) + ABSENT[4:]


async def test_only_the_checkpoint_counts_after_the_death_of_the_machine(disk: Disk) -> None:
    state = disk.open()
    state.buffer[0:3] = bytes([Residency.PRESENT, Residency.ZERO, Residency.ABSENT_PEER])
    await state.checkpoint(bytes(state.buffer))
    state.buffer[5] = Residency.PRESENT  # never in a checkpoint: may be in the map on disk, or not
    disk.boot += 1
    again = disk.open()
    assert again.needs_compare
    assert list(again.buffer) == [SUSPECT, SUSPECT, Residency.ABSENT_PEER | SYNC_DIRTY, 0, 0, 0, 0, 0]
    third = disk.open()  # and from here on the map counts again
    assert (third.origin, bytes(third.buffer)) == (Origin.MAP, bytes(again.buffer))


async def test_a_torn_map_falls_back_to_the_checkpoint(disk: Disk) -> None:
    disk.open().buffer[1] = Residency.PRESENT
    os.truncate(disk.folder / "map", 100)
    assert disk.open().origin is Origin.CHECKPOINT


async def test_checkpoints_take_turns(disk: Disk) -> None:
    """The older one is overwritten, also after reopening."""
    state = disk.open()
    before = disk.slots()
    for turn in range(1, 5):
        await state.checkpoint(bytes([Residency.PRESENT]) * turn + ABSENT[turn:])
        after = disk.slots()
        assert [old == new for old, new in zip(before, after, strict=True)] == [turn % 2 == 1, turn % 2 == 0]
        before = after
        disk.boot += turn == 2
        state = disk.open()


async def test_wherever_a_checkpoint_is_torn_the_old_one_or_the_new_one_counts(disk: Disk) -> None:
    """At every byte boundary; and the next checkpoint does not destroy the one that counted."""
    state = disk.open()
    old = bytes([Residency.PRESENT] * 2 + [0] * 6)
    new = bytes([Residency.PRESENT] * 5 + [0] * 3)
    await state.checkpoint(bytes([Residency.PRESENT]) + ABSENT[1:])
    await state.checkpoint(old)
    overwritten, kept = disk.slots()[1], disk.slots()[0]
    whole = encode_checkpoint(4, GEOMETRY, OWNER, new)
    seen = set()
    for length in range(len(whole) + 1):
        for rest in (overwritten[length:], b"", bytes(len(whole) - length)):
            (disk.folder / "checkpoint.b").write_bytes(whole[:length] + rest)
            (disk.folder / "checkpoint.a").write_bytes(kept)
            disk.boot += 1
            again = disk.open()
            count = bytes(again.buffer).count(SUSPECT)
            assert bytes(again.buffer) == bytes([SUSPECT]) * count + ABSENT[count:]
            assert count in {2, 5}
            assert (count == 5) == ((whole[:length] + rest) == whole)
            seen.add(count)
            await again.checkpoint(bytes([Residency.PRESENT] * 7 + [0]))
            assert (kept in disk.slots()) == (count == 2)
    assert seen == {2, 5}


async def test_no_valid_checkpoint_is_an_error(disk: Disk) -> None:
    disk.open()
    disk.boot += 1
    (disk.folder / "checkpoint.a").write_bytes(b"rust")
    with pytest.raises(CorruptionError, match=r"checkpoint.a: .*; checkpoint.b: "):
        disk.open()
    (disk.folder / "checkpoint.a").unlink()
    with pytest.raises(CorruptionError, match="no checkpoint"):
        disk.open()


async def test_another_geometry_is_refused(disk: Disk) -> None:
    disk.open()
    for geometry in (Geometry(4 * 4096, 4096), Geometry(8 * 4096, 8192), Geometry(8 * 4096, 4096, 4096)):
        with pytest.raises(InvalidRequestError, match="was made as"):
            disk.open(geometry)


async def test_fresh_states_must_fit(disk: Disk) -> None:
    with pytest.raises(InvalidRequestError, match="3 states were given for 8 chunks"):
        disk.open(fresh=bytes(3))
    with pytest.raises(InvalidRequestError, match="3 states were given for 8 chunks"):
        EphemeralState(GEOMETRY, bytes(3))
    assert not disk.folder.exists()


async def test_closing(disk: Disk) -> None:
    state = disk.open()
    await state.aclose()
    await state.aclose()
    with pytest.raises(ClosedError):
        await state.checkpoint(ABSENT)
    assert disk.open().origin is Origin.MAP


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fdatasync", "open"])
async def test_a_failed_checkpoint_leaves_the_last_one_and_can_be_repeated(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    state = disk.open()
    await state.checkpoint(bytes([Residency.PRESENT]) + ABSENT[1:])

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC if call == "pwrite" else errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CapacityError if call == "pwrite" else UnavailableError):
            await state.checkpoint(bytes([Residency.PRESENT] * 2) + ABSENT[2:])
    await state.checkpoint(bytes([Residency.PRESENT] * 3) + ABSENT[3:])
    disk.boot += 1
    assert bytes(disk.open().buffer).count(SUSPECT) == 3


class Died(BaseException):
    """Stands for the end of the process: nobody catches it on the way."""


def dying(patch: pytest.MonkeyPatch, nth: int) -> Callable[[], bool]:
    """Let the n-th system call that changes files not happen. The answer tells whether it came to that."""
    calls = 0

    def wrap(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls >= nth:
                raise Died
            return real(*args, **kwargs)

        return call

    for name in ("open", "pwrite", "fsync", "fdatasync", "ftruncate", "rename", "mkdir", "posix_fallocate"):
        patch.setattr(os, name, wrap(getattr(os, name)))
    return lambda: calls >= nth


@pytest.mark.parametrize("same_boot", [True, False])
async def test_dying_anywhere_while_a_volume_is_made_leaves_nothing_or_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_boot: bool
) -> None:
    """Fail the first system call, then the second, and so on; what is left can be opened, or made again."""
    origins = set()
    for nth in range(1, 100):
        disk = Disk(tmp_path / str(nth) / "disk")
        disk.folder.parent.mkdir()
        with monkeypatch.context() as patch:
            died = dying(patch, nth)
            with contextlib.suppress(Died):
                disk.open()
        disk.boot += not same_boot
        again = disk.open()
        assert bytes(again.buffer) == ABSENT
        origins.add(again.origin)
        if not died():
            break
    assert not died()
    assert nth > 10
    assert origins == {Origin.FRESH, Origin.MAP if same_boot else Origin.CHECKPOINT}


async def test_dying_anywhere_while_the_map_is_made_anew_leaves_the_checkpoint(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await disk.open().checkpoint(bytes([Residency.PRESENT] * 4) + ABSENT[4:])
    for nth in range(1, 100):
        disk.boot += 1
        with monkeypatch.context() as patch:
            died = dying(patch, nth)
            with contextlib.suppress(Died):
                disk.open()
        if not died():
            break
        again = disk.open()
        assert bytes(again.buffer) == bytes([SUSPECT] * 4) + ABSENT[4:]
    assert 5 < nth < 99


async def test_a_reader_gets_a_copy_of_what_is_durable(disk: Disk) -> None:
    """And is refused while the map of this boot says more than the checkpoint."""
    state = disk.open()
    state.buffer[0:2] = bytes([Residency.PRESENT, Residency.ZERO_UNPUNCHED])
    with pytest.raises(InvalidRequestError, match=r"not everything in .* was made durable"):
        read_folder(disk.folder, GEOMETRY, OWNER, "boot 1")
    assert read_folder(disk.folder, GEOMETRY, OWNER, "boot 2") == ABSENT
    await state.checkpoint(bytes(state.buffer))
    state.buffer[0] |= SYNC_DIRTY
    before = disk.slots(), (disk.folder / "map").read_bytes()
    expected = bytes([SUSPECT, Residency.ZERO_UNPUNCHED | SYNC_DIRTY]) + ABSENT[2:]
    for boot in ("boot 1", "boot 2"):
        assert read_folder(disk.folder, GEOMETRY, OWNER, boot) == expected
    assert (disk.slots(), (disk.folder / "map").read_bytes()) == before
    with pytest.raises(InvalidRequestError, match="was made as"):
        read_folder(disk.folder, Geometry(4 * 4096, 4096), OWNER, "boot 1")
    with pytest.raises(CorruptionError, match="belongs to another volume"):
        read_folder(disk.folder, GEOMETRY, owner_tag("vm1", "other"), "boot 1")


async def test_a_map_in_memory(disk: Disk) -> None:
    state = EphemeralState(GEOMETRY, ABSENT)
    ChunkMap(state.buffer, 8).set_residency(2, Residency.PRESENT)
    await state.checkpoint(bytes(state.buffer))
    assert (state.origin, state.needs_compare, state.buffer[2]) == (Origin.FRESH, False, Residency.PRESENT)
    await state.aclose()


def test_fresh_states_for_a_device_that_holds_something() -> None:
    """A chunk that an extent touches is present and dirty, every other one is zero; what is too long is cut off."""
    states = states_of_extents(GEOMETRY, [(100, 1), (2 * 4096 - 1, 2), (7 * 4096, 1 << 30), (1 << 31, 5)])
    assert [chunk for chunk in range(8) if states[chunk] == SUSPECT] == [0, 1, 2, 7]
    assert [chunk for chunk in range(8) if states[chunk] == Residency.ZERO] == [3, 4, 5, 6]
    assert list(states_of_extents(GEOMETRY, [])) == [Residency.ZERO] * 8
