"""Where the map of a volume lives: in files that survive, or only in memory.

A volume needs two things of it: ``buffer``, one writable byte per chunk that a `silo.chunkmap.ChunkMap` is put on,
and ``checkpoint``, which makes a copy of those bytes durable after the device was flushed.

`DurableState` is a folder with the mapped file and the two checkpoints that take turns::

    map            survives the process (`silo.mapfile`)
    checkpoint.a   survives the machine (`silo.checkpoint`)
    checkpoint.b

The folder comes into being under a temporary name, with a first durable checkpoint in it, and is then renamed.
So where there is a folder there is a valid checkpoint, whatever happened, and one without is damage. A
checkpoint is written over the *older* one: while it is torn the newer one counts, which is what the flush that
has not returned yet had promised before.

A failed sync of a checkpoint needs no memory, unlike one of a device: the next attempt writes the whole file
again.
"""

from __future__ import annotations

import abc
import enum
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import numpy as np

from silo.abc import Buffer
from silo.checkpoint import (
    Checkpoint,
    decode_checkpoint,
    encode_checkpoint,
    kept_of,
    states_after_power_loss,
)
from silo.chunkmap import SYNC_DIRTY, Residency
from silo.errors import ClosedError, CorruptionError, InvalidRequestError
from silo.files import os_error, pwrite_all, replace_file, sync_directory
from silo.geometry import Geometry
from silo.mapfile import MapFile
from silo.threads import run_to_completion

__all__ = ["DurableState", "EphemeralState", "Origin", "VolumeState", "read_folder", "states_of_extents"]

_MAP = "map"
_SLOTS = ("checkpoint.a", "checkpoint.b")


class Origin(enum.Enum):
    """Where the states in ``buffer`` came from when they were opened."""

    FRESH = "fresh"
    """The caller's: there was nothing before."""
    MAP = "map"
    """From a process of this boot, to the last store."""
    CHECKPOINT = "checkpoint"
    """The machine went down. What the device holds is right, but nobody knows what of it is stored already."""


class VolumeState(abc.ABC):
    """The port between a volume and the place of its map."""

    buffer: bytearray | memoryview
    """One byte per chunk."""
    origin: Origin

    @property
    def needs_compare(self) -> bool:
        """Whether the dirty chunks are only suspects, to be compared with the manifest before they are uploaded."""
        return self.origin is Origin.CHECKPOINT

    @abc.abstractmethod
    async def checkpoint(self, states: bytes) -> None:
        """Make a copy of ``buffer`` durable. The device was flushed after the copy was taken.

        When it raises, the previous checkpoint still counts, or this one; call again. Cancellation waits for
        the disk. Concurrent calls are made one after the other.
        """

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Give up the files. Does not write a checkpoint. May be called twice."""


class EphemeralState(VolumeState):
    """A map in memory: gone with the process, as is right for a device in memory."""

    origin = Origin.FRESH

    def __init__(self, geometry: Geometry, fresh: Buffer) -> None:
        _check_fresh(geometry, fresh)
        self.buffer = bytearray(fresh)

    async def checkpoint(self, states: bytes) -> None:
        """Nothing to do: nothing survives anyway."""

    async def aclose(self) -> None:
        """Nothing to give up."""


class DurableState(VolumeState):
    """A map in a folder of the state directory. Made by `silo.statedir.GroupState.open_volume`."""

    def __init__(
        self, folder: Path, geometry: Geometry, owner: bytes, executor: ThreadPoolExecutor, opened: Opened
    ) -> None:
        self.buffer = opened.map.states
        self.origin = opened.origin
        self._folder = folder
        self._geometry = geometry
        self._owner = owner
        self._executor = executor
        self._map = opened.map
        self._sequence = opened.sequence
        self._slot = opened.slot
        self._turn = threading.Lock()
        self.closed = False

    async def checkpoint(self, states: bytes) -> None:
        if self.closed:
            raise self._closed_error()
        await run_to_completion(self._executor, self._checkpoint_blocking, states)

    async def aclose(self) -> None:
        """As the port says. Waits for a checkpoint that is being written."""
        if not self.closed:
            await run_to_completion(self._executor, self.close_blocking)

    def close_blocking(self) -> None:
        """As `aclose`, in a thread."""
        with self._turn:
            self.closed = True
            self._map.close()

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the state in {self._folder} was closed")

    def _checkpoint_blocking(self, states: bytes) -> None:
        with self._turn:
            if self.closed:
                raise self._closed_error()
            self._write_older(encode_checkpoint(self._sequence + 1, self._geometry, self._owner, states))

    def _write_older(self, data: bytes) -> None:
        path = self._folder / _SLOTS[1 - self._slot]
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                pwrite_all(fd, data, 0)
                os.ftruncate(fd, len(data))
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise os_error(error, f"write {path}") from error
        self._sequence += 1
        self._slot = 1 - self._slot


@attrs.frozen(eq=False)
class Opened:
    """What `open_folder` found."""

    map: MapFile
    origin: Origin
    sequence: int
    slot: int
    """Index of the newest checkpoint; the other one is overwritten next."""


def create_folder(folder: Path, geometry: Geometry, owner: bytes, boot: str, fresh: Buffer) -> Opened:
    """Make the folder of a new volume, durably and all at once. Blocks; raises `OSError`."""
    _check_fresh(geometry, fresh)
    temporary = folder.with_name(f".{folder.name}.new")
    if temporary.exists():
        shutil.rmtree(temporary)  # an earlier attempt failed half way
    temporary.mkdir(mode=0o700)
    replace_file(temporary / _SLOTS[0], encode_checkpoint(1, geometry, owner, fresh))
    replace_file(temporary / _SLOTS[1], b"")
    mapped = MapFile.create(temporary / _MAP, geometry, owner, boot, fresh)
    os.rename(temporary, folder)
    sync_directory(folder.parent)
    return Opened(mapped, Origin.FRESH, sequence=1, slot=0)


def open_folder(folder: Path, geometry: Geometry, owner: bytes, boot: str) -> Opened:
    """Open the folder of a volume and return what may be trusted of it. Blocks; raises `OSError`.

    `CorruptionError` when neither checkpoint is valid, `InvalidRequestError` when the volume was made with
    another geometry.
    """
    newest, slot = _newest_checkpoint(folder, geometry, owner)
    mapped, origin = MapFile.reopen(folder / _MAP, geometry, owner, boot), Origin.MAP
    if mapped is None:
        states = states_after_power_loss(newest.kept)
        mapped, origin = MapFile.create(folder / _MAP, geometry, owner, boot, states.data), Origin.CHECKPOINT
    return Opened(mapped, origin, newest.sequence, slot)


def read_folder(folder: Path, geometry: Geometry, owner: bytes, boot: str) -> bytearray:
    """A copy of the states in a folder, as after a power loss, for whoever only reads. Nothing is changed.

    Blocks; raises `OSError` and what `open_folder` raises. `InvalidRequestError` when a process of this boot left
    more than it had made durable: what it left could still vanish.
    """
    newest, _ = _newest_checkpoint(folder, geometry, owner)
    mapped = MapFile.read(folder / _MAP, geometry, owner, boot)
    if mapped is not None and not np.array_equal(kept_of(mapped), newest.kept):
        raise InvalidRequestError(
            f"not everything in {folder} was made durable", hint="open it for writing once, and flush"
        )
    return bytearray(states_after_power_loss(newest.kept).data)


def _newest_checkpoint(folder: Path, geometry: Geometry, owner: bytes) -> tuple[Checkpoint, int]:
    valid: list[tuple[int, int, Checkpoint]] = []
    reasons: list[str] = []
    for slot, name in enumerate(_SLOTS):
        try:
            found = decode_checkpoint((folder / name).read_bytes(), owner)
        except (CorruptionError, FileNotFoundError) as error:
            reasons.append(f"{name}: {error}")
        else:
            valid.append((found.sequence, slot, found))
    if not valid:
        raise CorruptionError(
            f"no checkpoint in {folder} can be read: {'; '.join(reasons)}",
            hint="what the device holds cannot be told any more; restore the group from its store",
        )
    _, slot, newest = max(valid, key=lambda item: item[0])
    if newest.geometry != geometry:
        raise InvalidRequestError(
            f"the volume in {folder} was made as {newest.geometry}, not as {geometry}",
            hint="open it with the same size, chunk size and block size",
        )
    return newest, slot


def states_of_extents(geometry: Geometry, extents: Iterable[tuple[int, int]]) -> bytearray:
    """Fresh states for a device that holds data only in these extents: present and dirty there, zero elsewhere."""
    states = np.full(geometry.chunk_count, Residency.ZERO, dtype=np.uint8)
    for offset, length in extents:
        first, limit = geometry.touched(offset, length)
        states[first:limit] = Residency.PRESENT | SYNC_DIRTY
    return bytearray(states.data)


def _check_fresh(geometry: Geometry, fresh: Buffer) -> None:
    if len(fresh) != geometry.chunk_count:
        raise InvalidRequestError(f"{len(fresh)} states were given for {geometry.chunk_count} chunks")
