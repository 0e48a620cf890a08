"""A cut: the state that all volumes of a group had at one instant, readable while the guest writes on.

`silo.group.Group.take` makes a `Cut` in one synchronous step. For each volume it knows which chunks were
dirty and held data (``data``) and which were dirty and zero (``zeros``). A data chunk stays *frozen* until
its content has been captured: by the uploader (`VolumeCut.read`, then `release`), or by the volume, which
copies the old content aside before it overwrites it (copy-before-write).

Copies live in memory up to a limit, then in an unlinked temporary file up to another. When both are full the
guest is not made to wait: the cut is given up (``overflowed``), every chunk thaws, and the syncer must
`abandon` it, which makes all of its chunks dirty again.

A write that was in a device phase at the instant of the cut was not acknowledged, so any part of it may be
in the cut. The volume marks its chunks dirty again when it ends.
"""

from __future__ import annotations

import abc
import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

import attrs
import numpy as np

from silo.abc import BlockDevice, Buffer
from silo.chunkmap import FROZEN, ChunkMap, Indices
from silo.dirtymap import give_back, settle, take_sync, thaw
from silo.errors import CapacityError, InvariantError
from silo.geometry import Geometry

__all__ = ["CopySpace", "Cut", "Taken", "VolumeCut"]

CAPTURE_STEP = 256 * 1024
"""Bytes that are copied from a fast device before guests get a turn: some tens of microseconds."""


class CopySpace:
    """Bounded room for chunk contents: memory first, then a temporary file in ``directory``."""

    def __init__(self, *, memory_limit: int, spill_limit: int, directory: str | None = None) -> None:
        self._memory_left = memory_limit
        self._spill_left = spill_limit
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._end = 0
        self._free: dict[int, list[int]] = {}
        """Places in the file that are not needed any more, by size: nearly all copies have the same."""
        self.used = 0

    def put(self, content: bytes) -> bytes | tuple[int, int] | None:
        """Keep ``content``; the result goes to `get` and `drop`. ``None`` when there is no room."""
        size = len(content)
        if size <= self._memory_left:
            self._memory_left -= size
            self.used += size
            return content
        if free := self._free.get(size):
            offset = free.pop()
        elif size <= self._spill_left:
            offset = self._end
        else:
            return None
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="silo-copies-", dir=self._directory)  # noqa: SIM115
            written = os.pwrite(self._file.fileno(), content, offset)
        except OSError:
            return None  # a full disk, or a directory that is gone, is one more way of having no room
        if written != size:
            return None
        if offset == self._end:
            self._end += size
            self._spill_left -= size
        self.used += size
        return offset, size

    def get(self, kept: bytes | tuple[int, int]) -> bytes:
        """The content that `put` kept."""
        if isinstance(kept, bytes):
            return kept
        if self._file is None:
            raise InvariantError("a spilled copy outlived its file")
        offset, size = kept
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) != size:
            raise InvariantError("a spilled copy is shorter than what was written")
        return content

    def drop(self, kept: bytes | tuple[int, int]) -> None:
        """Give room back, in memory or for copies of the same size in the file."""
        if isinstance(kept, bytes):
            self._memory_left += len(kept)
            self.used -= len(kept)
        else:
            offset, size = kept
            self._free.setdefault(size, []).append(offset)
            self.used -= size

    def close(self) -> None:
        """Release everything. Twice is harmless."""
        self._memory_left = self._spill_left = self.used = 0
        self._free.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


class Taken(abc.ABC):
    """What is to be uploaded of one volume. The uploader calls `capture`."""

    def __init__(self, name: str, geometry: Geometry, device: BlockDevice, chunks: ChunkMap) -> None:
        self.name = name
        self.geometry = geometry
        self.data: Indices
        """The chunks with content."""
        self.zeros: list[tuple[int, int]]
        """The runs of those that are zero."""
        self._device = device
        self._chunks = chunks

    async def capture(self, chunks: Sequence[int], into: memoryview) -> list[memoryview]:
        """The contents of some ``data`` chunks, copied to ``into`` one after the other. All of them are released.

        Neighbours are copied together, at most `CAPTURE_STEP` at a time, so that guests get their turns.
        `CapacityError` once the cut has overflowed: it must be abandoned. Then, and after a cancellation, any of the
        chunks may be released.
        """
        size = self.geometry.chunk_size
        contents: list[memoryview] = []
        end = copied = 0
        for run in self._runs(chunks):
            start, end = end, end + (len(run) - 1) * size + self.geometry.extent_of(run[-1])[1]
            parts = [into[at : min(at + size, end)] for at in range(start, end, size)]
            await self._capture_run(run, into[start:end], parts)
            contents += parts
            copied += end - start
            if copied >= CAPTURE_STEP:
                copied = 0
                await asyncio.sleep(0)
        return contents

    def _runs(self, chunks: Sequence[int]) -> Iterator[Sequence[int]]:
        """Neighbours, in the order in which they come."""
        count = max(1, CAPTURE_STEP // self.geometry.chunk_size)
        start = 0
        for position in range(1, len(chunks) + 1):
            if (
                position == len(chunks)
                or position - start == count
                or chunks[position] != chunks[position - 1] + 1
            ):
                yield chunks[start:position]
                start = position

    @abc.abstractmethod
    async def _capture_run(self, run: Sequence[int], room: memoryview, parts: list[memoryview]) -> None:
        """Copy neighbours to ``room``, of which ``parts`` are the single chunks, and release them."""


class VolumeCut(Taken):
    """One volume's part of a cut: contents are those of its instant. The volume calls `save`."""

    def __init__(
        self,
        name: str,
        geometry: Geometry,
        device: BlockDevice,
        chunks: ChunkMap,
        space: CopySpace,
        on_overflow: Callable[[], None],
    ) -> None:
        super().__init__(name, geometry, device, chunks)
        self._space = space
        self._on_overflow = on_overflow
        self._copies: dict[int, bytes | tuple[int, int]] = {}
        self._is_live = True
        self._overflowed = False
        self.data, self.zeros = take_sync(chunks)

    def save(self, chunk: int, content: Buffer) -> None:
        """Keep the old content of a frozen chunk, which then thaws. Synchronous: the write follows at once."""
        kept = self._space.put(bytes(content))
        if kept is None:
            self._on_overflow()
            return
        self._copies[chunk] = kept
        self._chunks.states[chunk] &= ~FROZEN & 0xFF

    async def read(self, chunk: int) -> Buffer:
        """The content that a ``data`` chunk had at the instant of the cut, as bytes that nobody will change.

        Concurrent calls are allowed. Cancellation leaves nothing behind. `CapacityError` once the cut has
        overflowed: it must be abandoned. Not after `release` of the chunk, nor after the end of the cut.
        """
        kept = self._kept(chunk)
        if kept is not None:
            return kept
        offset, length = self.geometry.extent_of(chunk)
        live = self._device.read_nowait(offset, length)
        if live is not None:
            return bytes(live)
        content = await self._device.read(offset, length)
        # While the device was reading, a guest write may have copied the old content aside and gone on.
        kept = self._kept(chunk)
        return content if kept is None else kept

    async def _capture_run(self, run: Sequence[int], room: memoryview, parts: list[memoryview]) -> None:
        offset = self.geometry.extent_of(run[0])[0]
        states = self._chunks.view[run[0] : run[-1] + 1]
        if self._is_live and bool((states & FROZEN).all()) and self._device.copy_nowait(offset, room):
            states &= np.uint8(0xFF & ~FROZEN)
            return
        kept = [self._kept(chunk) for chunk in run]
        if None in kept:
            room[:] = await self._device.read(offset, len(room))
            # While the device was reading, guest writes may have copied old contents aside and gone on.
            kept = [self._kept(chunk) for chunk in run]
        for chunk, part, content in zip(run, parts, kept, strict=True):
            if content is not None:
                part[:] = content
            self.release(chunk)

    def _kept(self, chunk: int) -> bytes | None:
        """The copy of a chunk; ``None`` while the device still has the old content. Else an error."""
        if self._overflowed:
            raise CapacityError(
                "there was no room to keep old content for the cut", hint="abandon it, try again"
            )
        kept = self._copies.get(chunk)
        if kept is not None:
            return self._space.get(kept)
        if not (self._is_live and self._chunks.states[chunk] & FROZEN):
            raise InvariantError(f"chunk {chunk} of {self.name} was released, or its cut has ended")
        return None

    def release(self, chunk: int) -> None:
        """The content is captured elsewhere: the volume may overwrite it without a copy.

        Harmless after the end of the cut, when the chunk may be frozen for another one.
        """
        if not self._is_live:
            return
        kept = self._copies.pop(chunk, None)
        if kept is not None:
            self._space.drop(kept)
        self._chunks.states[chunk] &= ~FROZEN & 0xFF

    def thaw(self, *, overflowed: bool = False) -> None:
        """Stop protecting old content, because the cut is given up or decided."""
        if self._is_live:
            self._is_live = False
            self._overflowed = overflowed
            thaw(self._chunks)
            self._copies.clear()


@attrs.define
class Cut:
    """All volumes at one instant. Exactly one of `commit` and `abandon` must end it.

    ``time_wall`` is the instant in POSIX seconds, ``time_monotonic`` the same on the group's clock.
    """

    volumes: Mapping[str, VolumeCut]
    time_wall: float
    time_monotonic: float
    _maps: Mapping[str, ChunkMap]
    _space: CopySpace
    _on_end: Callable[[], None]
    overflowed: bool = False
    _ended: bool = False

    @property
    def is_empty(self) -> bool:
        """Nothing was dirty: there is nothing to commit."""
        return all(len(part.data) == 0 and not part.zeros for part in self.volumes.values())

    @property
    def chunk_count(self) -> int:
        """How many chunks the cut names, zero ones included."""
        return sum(
            len(part.data) + sum(limit - first for first, limit in part.zeros)
            for part in self.volumes.values()
        )

    @property
    def copied_bytes(self) -> int:
        """Bytes of old content that are kept aside now."""
        return self._space.used

    def overflow(self) -> None:
        """Room for copies ran out: stop protecting, so that the guest goes on. The cut must be abandoned."""
        self.overflowed = True
        for part in self.volumes.values():
            part.thaw(overflowed=True)
        self._space.close()

    def commit(self) -> None:
        """The commit is *known*: what was in the cut is clean, unless it was written again.

        Every chunk must have been released before the store was asked: an overflow after that would be too late.
        """
        if self.overflowed:
            raise InvariantError("a cut that lost old content was about to be committed")
        self._end()
        for chunks in self._maps.values():
            settle(chunks)

    def abandon(self) -> None:
        """The cut will not be committed: its chunks are dirty again. Harmless when the cut has ended.

        What was taken ahead of it stays taken: it is uploaded, and the next cut may refer to it.
        """
        if not self._ended:
            self._end()
            for name, part in self.volumes.items():
                give_back(self._maps[name], part.data, part.zeros)

    def _end(self) -> None:
        if self._ended:
            raise InvariantError("a cut was decided twice")
        self._ended = True
        for part in self.volumes.values():
            part.thaw()
        self._space.close()
        self._on_end()
