"""A device and what is known of its chunks, changed together.

The lower part of a `silo.volume.Volume`: everything that touches a chunk on the device and must leave the map
telling the truth. The parts above (hydration, guest requests) decide *when*; here each verb is either one
synchronous step or holds the chunk's lock (`silo.chunklocks`) around its await.

* A **guest write** marks before and after; when it fails, what it touched is not trusted.
* A **fill** writes a chunk only if it is still absent: the guest always wins.
* **Punching** makes the device read as zeros where the map already says zero. Never while a cut is after the
  old bytes.
* **Copying aside** saves what a cut needs before it is overwritten.
* **Flush** makes all of it durable: punch, snapshot the map, flush the device, and then make *that snapshot*
  durable, so that a map never claims bytes that the medium does not have.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Protocol

import numpy as np

from silo.abc import BlockDevice, Buffer
from silo.chunklocks import ChunkLocks
from silo.chunkmap import (
    FROZEN,
    LOCKED,
    MIGRATION_DIRTY,
    RESIDENCY_MASK,
    SYNC_DIRTY,
    WINDOW,
    WINDOW_SHIFT,
    ChunkMap,
    Residency,
    runs_of,
)
from silo.dirtymap import take_ahead, take_migration
from silo.errors import InvalidRequestError, InvariantError
from silo.frozen import VolumeCut
from silo.gate import Gate
from silo.geometry import Geometry
from silo.heatmap import HeatMap
from silo.zeros import is_zero

__all__ = ["LocalChunks", "MapKeeper"]

PRESENT = int(Residency.PRESENT)
ZERO = int(Residency.ZERO)
ZERO_UNPUNCHED = int(Residency.ZERO_UNPUNCHED)

PUNCHABLE_MASK = RESIDENCY_MASK | FROZEN | LOCKED

PUNCH_BYTES = 256 << 20
"""What one device call zeroes at most, so that a guest write never waits for a whole disk."""

PUNCHES_PER_FLUSH = 64
"""Device calls of a flush that leave the rest of a large TRIM to later ones; a device that cannot punch writes."""

PUNCH_SCAN = 32
"""Windows of the map that are looked at in one step."""

INLINE_WRITE = 256 * 1024
"""Bytes per synchronous device call of a fill; what a device takes inline (see `silo.devices.file`)."""


@functools.cache
def _zero_table(marks: int) -> bytes:
    """What zeroing makes of each state: nothing of a chunk that is zero already."""
    return bytes(
        state
        if state & RESIDENCY_MASK in (ZERO, ZERO_UNPUNCHED)
        else state & ~RESIDENCY_MASK | ZERO_UNPUNCHED | marks
        for state in range(256)
    )


class MapKeeper(Protocol):
    """Where the map of a volume survives: the state directory, or nowhere."""

    async def checkpoint(self, states: bytes) -> None:
        """Make this copy of the states durable. The device was flushed after the copy was taken."""


class LocalChunks:
    """See the module. One event loop, no threads of its own."""

    def __init__(
        self,
        name: str,
        device: BlockDevice,
        geometry: Geometry,
        gate: Gate,
        *,
        chunks: ChunkMap | None = None,
        heat: HeatMap | None = None,
        keeper: MapKeeper | None = None,
    ) -> None:
        if device.size < geometry.size:
            raise InvalidRequestError(
                f"the device of {name} has {device.size} bytes, {geometry.size} are needed"
            )
        self.name = name
        self.geometry = geometry
        self.device = device
        self.gate = gate
        self.chunks = chunks or ChunkMap.filled(geometry.chunk_count, Residency.PRESENT)
        if self.chunks.count != geometry.chunk_count:
            raise InvalidRequestError(
                f"the map of {name} has {self.chunks.count} chunks, not {geometry.chunk_count}"
            )
        self.heat = heat or HeatMap(geometry.chunk_count)
        self.cut: VolumeCut | None = None
        """The part of the group's cut in progress that still protects old content."""
        self.filled_bytes = 0
        self._keeper = keeper
        self._states = self.chunks.states
        self._summary = self.chunks.summary
        self._shift = geometry.chunk_shift
        self._marks = SYNC_DIRTY
        self._locks = ChunkLocks(self.chunks)
        self._checkpoint_due = True  # nobody knows what the process before us still owed
        self.keeps_map = True
        """Flushes make the map durable, too. Not while a group arrives: what was pushed may still be taken back, and
        a map that forgets the taking back must not come back after a power loss."""
        self._unpunched = set(self.chunks.windows_with(RESIDENCY_MASK, ZERO_UNPUNCHED))
        """Windows of the map that may have chunks to punch."""
        self._flush_started = 0
        self._flush_done = 0
        self._flush_turn = asyncio.Lock()

    # ---- what a write leaves in the map -----------------------------------------------------------------

    async def _write_device(self, offset: int, data: Buffer) -> None:
        """The asynchronous device phase of a guest write.

        No await may stand between the caller's last look for obstacles and the locks.
        """
        first, limit = self.geometry.touched(offset, len(data))
        with self._locks.writing(first, limit), self.gate.device_phase():
            self.chunks.mark_run(first, limit, self._marks)
            try:
                await self.device.write(offset, data)
            except BaseException:
                self._distrust(first, limit)
                raise
            finally:
                # A cut may have been taken meanwhile: what it took must be dirty again.
                self.chunks.mark_run(first, limit, self._marks)
            self._settle(first, limit)

    def _settle(self, first: int, limit: int) -> None:
        """After a device write: what was touched is on the device, and warmer."""
        self.heat.note_writes(first, limit)
        for chunk in range(first, limit):
            residency = self._states[chunk] & RESIDENCY_MASK
            if residency != PRESENT:
                # After power loss a ZERO chunk is taken from the device as it is, so only the others matter.
                self._checkpoint_due |= residency != ZERO
                self.chunks.set_residency(chunk, Residency.PRESENT)

    def _distrust(self, first: int, limit: int) -> None:
        """After a failed device write: a chunk that was zero on the device may not be so any more."""
        for chunk in range(first, limit):
            if self._states[chunk] & RESIDENCY_MASK == ZERO:
                self._set_unpunched(chunk)

    def _set_unpunched(self, chunk: int) -> None:
        self.chunks.set_residency(chunk, Residency.ZERO_UNPUNCHED)
        self._checkpoint_due = True
        self._unpunched.add(chunk >> WINDOW_SHIFT)

    def _zero_run(self, first: int, limit: int) -> None:
        """Make a run of chunks zero in the map, in one step. None of them may be busy."""
        if self.chunks.translate(first, limit, _zero_table(self._marks)):
            self._checkpoint_due = True
            self._unpunched.update(range(first >> WINDOW_SHIFT, (limit - 1 >> WINDOW_SHIFT) + 1))
            self.chunks.note_run(first, limit, self._marks)

    def record_migration(self, on: bool) -> None:
        """Start or stop marking writes for the migration recorder. Starting begins with every chunk clean."""
        if on:
            take_migration(self.chunks)
        self._marks = SYNC_DIRTY | MIGRATION_DIRTY if on else SYNC_DIRTY

    def begin_cut(self, cut: VolumeCut) -> None:
        """From now on old content is kept for ``cut``, until ``self.cut`` is ``None`` again."""
        self.cut = cut
        # A write under way may land after the cut has read its chunk, and the process may die before it marks again.
        for chunk in self._locks.written:
            self.chunks.mark(chunk, self._marks)

    def take_ahead(self, chunk: int) -> bool:
        """Take the chunk for an upload ahead of the cut; what it holds from now on, until it is written again, is what
        a reader gets. False, and it stays dirty for the cut, when it has no content or somebody is writing to it."""
        return not self._locks.is_written(chunk) and take_ahead(self.chunks, chunk)

    # ---- copy-before-write ------------------------------------------------------------------------------

    def _copy_aside_nowait(self, chunk: int) -> bool:
        if self.cut is None:
            raise InvariantError(f"chunk {chunk} of {self.name} is frozen, but there is no cut")
        old = self.device.read_nowait(*self.geometry.extent_of(chunk))
        if old is None:
            return False
        self.cut.save(chunk, old)
        return True

    async def _copy_aside(self, chunk: int) -> None:
        """Read the old content of a frozen chunk; the lock keeps writers away meanwhile."""
        with self._locks.locked(chunk, chunk + 1):
            cut = self.cut
            old = await self.device.read(*self.geometry.extent_of(chunk))
            if cut is not None and cut is self.cut and self._states[chunk] & FROZEN:
                cut.save(chunk, old)

    # ---- punching ---------------------------------------------------------------------------------------

    def _punch_nowait(self, chunk: int) -> bool:
        if not self.device.zero_nowait(*self.geometry.extent_of(chunk)):
            return False
        self.chunks.set_residency(chunk, Residency.ZERO)
        self._checkpoint_due = True
        return True

    async def _punch_run(self, first: int, limit: int) -> None:
        """Make the device read as zeros where the map says so. None of the chunks may be locked or frozen."""
        start = first << self._shift
        with self._locks.locked(first, limit):
            await self.device.zero(start, min(limit << self._shift, self.geometry.size) - start)
            self.chunks.set_residency_run(first, limit, Residency.ZERO)
            self._checkpoint_due = True

    async def punch(self, calls_max: int | None = None) -> None:
        """Punch whatever was zeroed and is not needed by a cut or a writer; at most so many device calls of it.

        Afterwards, when nothing was in the way, the bare device reads as the volume does.
        """
        for turn, window in enumerate(sorted(self._unpunched), start=1):
            if turn % PUNCH_SCAN == 0:
                await asyncio.sleep(0)  # of a whole disk there are thousands, and a cut may want all of them
            low = window << WINDOW_SHIFT
            high = min(low + WINDOW, self.chunks.count)
            for first, limit in self._punchable_runs(low, high):
                if calls_max == 0:
                    return
                # Earlier runs have awaited: is all of this one still to be punched?
                if len(self.chunks.select(PUNCHABLE_MASK, ZERO_UNPUNCHED, first, limit)) == limit - first:
                    await self._punch_run(first, limit)
                    calls_max = calls_max and calls_max - 1
            if len(self.chunks.select(RESIDENCY_MASK, ZERO_UNPUNCHED, low, high)) == 0:
                self._unpunched.discard(window)

    def _punchable_runs(self, low: int, high: int) -> list[tuple[int, int]]:
        step = PUNCH_BYTES >> self._shift
        return [
            (start, min(start + step, limit))
            for first, limit in runs_of(self.chunks.select(PUNCHABLE_MASK, ZERO_UNPUNCHED, low, high))
            for start in range(first, limit, step)
        ]

    # ---- filling ----------------------------------------------------------------------------------------

    def fill_nowait(self, chunk: int, content: Buffer | None) -> bool:
        """Write a chunk's content if it is still absent and nobody is about to write it; ``None`` means zeros.

        The device is written in bounded synchronous steps. False means that nothing was decided: the chunk
        is not absent, is locked, or the device cannot do it without waiting (then `fill` can).
        """
        if not self._is_fillable(chunk):
            return False
        if content is None or is_zero(content):
            self._set_unpunched(chunk)
            return True
        offset, length = self._check_content(chunk, content)
        view = memoryview(content)
        for start in range(0, length, INLINE_WRITE):
            if not self.device.write_nowait(offset + start, view[start : start + INLINE_WRITE]):
                return False
        self._fill_done(chunk, length)
        return True

    def fill_zeros_nowait(self, first: int, limit: int) -> None:
        """As `fill_nowait` with zeros for every chunk of a run, in one step: those that can be filled are."""
        states = self.chunks.view[first:limit]
        fillable = states & (RESIDENCY_MASK | LOCKED) < ZERO
        if bool(fillable.any()):
            self._checkpoint_due = True
            self._unpunched.update(range(first >> WINDOW_SHIFT, (limit - 1 >> WINDOW_SHIFT) + 1))
            states[fillable] = states[fillable] & (0xFF & ~RESIDENCY_MASK) | np.uint8(ZERO_UNPUNCHED)

    async def fill(self, chunk: int, content: Buffer | None) -> bool:
        """As `fill_nowait`, waiting for the device.

        False: the chunk is not absent any more, or somebody else is writing it at this moment (the guest, or
        another fill). It does not wait for them, because by then the content might be older than an
        invalidation. Cancellation leaves the chunk absent. Concurrent calls are allowed.
        """
        if self.fill_nowait(chunk, content):
            return True
        return content is not None and self._is_fillable(chunk) and await self._fill_device(chunk, content)

    def _is_fillable(self, chunk: int) -> bool:
        return self._states[chunk] & (RESIDENCY_MASK | LOCKED) < ZERO

    async def _fill_device(self, chunk: int, content: Buffer) -> bool:
        offset, length = self._check_content(chunk, content)
        with self._locks.locked(chunk, chunk + 1):
            await self.device.write(offset, content)
            self._fill_done(chunk, length)
        return True

    def _check_content(self, chunk: int, content: Buffer) -> tuple[int, int]:
        offset, length = self.geometry.extent_of(chunk)
        if len(content) != length:
            raise InvariantError(f"{len(content)} bytes were offered for chunk {chunk} of {length} bytes")
        return offset, length

    def _fill_done(self, chunk: int, length: int) -> None:
        self.chunks.set_residency(chunk, Residency.PRESENT)
        self._checkpoint_due = True
        self.filled_bytes += length

    # ---- durability -------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Everything acknowledged before this call survives power loss afterwards, as far as the device does.

        Concurrent calls share the work. When it raises, nothing is promised; call again. No deadline: a flush
        takes as long as the medium needs, and it cannot be taken back.
        """
        ticket = self._flush_started + 1
        async with self._flush_turn:
            if self._flush_done < ticket:
                self._flush_started += 1
                await self._flush_now()
                self._flush_done = self._flush_started

    def flush_nowait(self) -> bool:
        """As `flush` when there is nothing to wait for, else do nothing and return False."""
        if (
            self._unpunched
            or self._flush_turn.locked()
            or (self._checkpoint_due and self._keeper is not None)
        ):
            return False
        return self.device.flush_nowait()

    async def _flush_now(self) -> None:
        # Without a durable map the device itself must be zero where the guest has zeroed.
        await self.punch(PUNCHES_PER_FLUSH if self._keeper is not None else None)
        due = self._checkpoint_due and self.keeps_map
        self._checkpoint_due &= not due
        try:
            snapshot = bytes(self._states) if due and self._keeper is not None else None
            await self.device.flush()
            if snapshot is not None and self._keeper is not None:
                await self._keeper.checkpoint(snapshot)
        except BaseException:
            self._checkpoint_due |= due
            raise

    async def checkpoint(self) -> None:
        """As `flush`, and the whole map is made durable even when little has changed."""
        self._checkpoint_due = True
        await self.flush()
