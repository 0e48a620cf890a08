"""A device and what is known of its chunks, changed together.

The lower half of a `silo.volume.Volume`: everything that touches a chunk on the device and must leave the map
telling the truth. The upper half (guest requests, hydration) decides *when*; here each verb is either one
synchronous step or holds the chunk's lock around its await.

* A **lock** (the ``LOCKED`` bit) belongs to one asynchronous device phase. Whoever needs the chunk waits.
* A **fill** writes a chunk only if it is still absent: the guest always wins.
* **Punching** makes the device read as zeros where the map already says zero. Never while a cut is after the
  old bytes.
* **Copying aside** saves what a cut needs before it is overwritten.
* **Flush** makes all of it durable: punch, snapshot the map, flush the device, and then make *that snapshot*
  durable, so that a map never claims bytes that the medium does not have.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import numpy as np

from silo.abc import BlockDevice, Buffer
from silo.chunkmap import (
    FROZEN,
    LOCKED,
    MIGRATION_DIRTY,
    RESIDENCY_MASK,
    SYNC_DIRTY,
    ChunkMap,
    Residency,
    runs_of,
)
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

PUNCH_STEP = 4096
"""Chunks locked and punched by one device call, so that a guest write never waits for a whole disk."""

INLINE_WRITE = 256 * 1024
"""Bytes per synchronous device call of a fill; what a device takes inline (see `silo.devices.file`)."""


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
        self.heat = heat or HeatMap(geometry.chunk_count)
        self.cut: VolumeCut | None = None
        """The part of the group's cut in progress that still protects old content."""
        self.filled_bytes = 0
        self._keeper = keeper
        self._states = self.chunks.states
        self._summary = self.chunks.summary
        self._shift = geometry.chunk_shift
        self._marks = SYNC_DIRTY
        self._waiting: dict[int, asyncio.Event] = {}
        self._checkpoint_due = False
        self._punch_due = True
        self._flush_started = 0
        self._flush_done = 0
        self._flush_turn = asyncio.Lock()

    # ---- locks ------------------------------------------------------------------------------------------

    def _lock(self, chunk: int) -> None:
        if self._states[chunk] & LOCKED:
            raise InvariantError(f"chunk {chunk} of {self.name} was locked twice")
        self._states[chunk] |= LOCKED

    def _unlock(self, chunk: int) -> None:
        self._states[chunk] &= ~LOCKED & 0xFF
        waiting = self._waiting.pop(chunk, None)
        if waiting is not None:
            waiting.set()

    async def _wait_unlocked(self, chunk: int) -> None:
        """No deadline: a lock is held around one device call, which cannot be shortened."""
        if self._states[chunk] & LOCKED:
            await self._waiting.setdefault(chunk, asyncio.Event()).wait()

    # ---- what a write leaves in the map -----------------------------------------------------------------

    def _mark(self, first: int, limit: int) -> None:
        """Every chunk of the run counts as written, for all recorders and for heat."""
        heat = self.heat
        if limit - first > 1024:
            heat.write_view[first:limit] += np.float32(heat.weight)
            self.chunks.mark_run(first, limit, self._marks)
            return
        for chunk in range(first, limit):
            heat.writes[chunk] += heat.weight
            self.chunks.mark(chunk, self._marks)

    def _settle(self, first: int, limit: int) -> None:
        """After a device write: what was touched is on the device."""
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
                self.chunks.set_residency(chunk, Residency.ZERO_UNPUNCHED)
                self._checkpoint_due = self._punch_due = True

    def _zero_run_nowait(self, first: int, limit: int) -> bool:
        """Make a run of chunks zero in the map, in one step; False when one of them is locked."""
        states = self.chunks.view[first:limit]
        if bool((states & LOCKED).any()):
            return False
        changed = states & RESIDENCY_MASK != ZERO
        if bool(changed.any()):
            self._checkpoint_due = self._punch_due = True
            states &= 0xFF & ~RESIDENCY_MASK
            states |= np.where(changed, np.uint8(ZERO_UNPUNCHED), np.uint8(ZERO))
            self._mark(first, limit)
        return True

    def record_migration(self, on: bool) -> None:
        """Start or stop marking writes for the migration recorder. Starting begins with every chunk clean."""
        if on:
            self.chunks.clear_many(self.chunks.select_dirty(MIGRATION_DIRTY), MIGRATION_DIRTY)
        self._marks = SYNC_DIRTY | MIGRATION_DIRTY if on else SYNC_DIRTY

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
        self._lock(chunk)
        try:
            cut = self.cut
            old = await self.device.read(*self.geometry.extent_of(chunk))
            if cut is not None and cut is self.cut and self._states[chunk] & FROZEN:
                cut.save(chunk, old)
        finally:
            self._unlock(chunk)

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
        states = self.chunks.view[first:limit]
        states |= LOCKED
        try:
            with self.gate.device_phase():
                await self.device.zero(start, min(limit << self._shift, self.geometry.size) - start)
            self.chunks.set_residency_run(first, limit, Residency.ZERO)
            self._checkpoint_due = True
        finally:
            states &= ~LOCKED & 0xFF
            for chunk in [chunk for chunk in self._waiting if first <= chunk < limit]:
                self._unlock(chunk)

    async def _punch(self) -> None:
        """Punch whatever was zeroed and is not needed by a cut."""
        if not self._punch_due:
            return
        self._punch_due = False
        for low in range(0, self.chunks.count, PUNCH_STEP):
            high = min(low + PUNCH_STEP, self.chunks.count)
            unpunched = self.chunks.select(RESIDENCY_MASK, ZERO_UNPUNCHED, low, high)
            if len(unpunched) == 0:
                continue
            for first, limit in runs_of(unpunched):
                # Earlier runs have awaited: look again, and leave what a cut or a writer holds for next time.
                free = self.chunks.select(RESIDENCY_MASK | FROZEN | LOCKED, ZERO_UNPUNCHED, first, limit)
                self._punch_due |= len(free) < limit - first
                for run in runs_of(free):
                    await self._punch_free(*run)

    async def _punch_free(self, first: int, limit: int) -> None:
        """`_punch_run` on what is still free of the run, as the caller has awaited since it looked."""
        free = self.chunks.select(RESIDENCY_MASK | FROZEN | LOCKED, ZERO_UNPUNCHED, first, limit)
        if len(free) == limit - first:
            await self._punch_run(first, limit)
        else:
            self._punch_due = True

    # ---- filling ----------------------------------------------------------------------------------------

    def fill_nowait(self, chunk: int, content: Buffer | None) -> bool:
        """Write a chunk's content if it is still absent and nobody is about to write it; ``None`` means zeros.

        The device is written in bounded synchronous steps. False means that nothing was decided: the chunk
        is not absent, is locked, or the device cannot do it without waiting (then `fill` can).
        """
        state = self._states[chunk]
        if state & LOCKED or state & RESIDENCY_MASK >= ZERO:
            return False
        if content is None or is_zero(content):
            self._punch_due = True
            return self._fill_done(chunk, Residency.ZERO_UNPUNCHED, 0)
        offset, length = self._check_content(chunk, content)
        view = memoryview(content)
        for start in range(0, length, INLINE_WRITE):
            if not self.device.write_nowait(offset + start, view[start : start + INLINE_WRITE]):
                return False
        return self._fill_done(chunk, Residency.PRESENT, length)

    async def fill(self, chunk: int, content: Buffer | None) -> bool:
        """As `fill_nowait`, waiting for the device. False: the chunk was not absent (any more), the guest won.

        Cancellation leaves the chunk absent. Concurrent calls are allowed; the first one wins.
        """
        while not self.fill_nowait(chunk, content):
            if self._states[chunk] & LOCKED:
                await self._wait_unlocked(chunk)
            elif self._states[chunk] & RESIDENCY_MASK >= ZERO or content is None:
                return False
            else:
                return await self._fill_device(chunk, content)
        return True

    async def _fill_device(self, chunk: int, content: Buffer) -> bool:
        offset, length = self._check_content(chunk, content)
        self._lock(chunk)
        try:
            with self.gate.device_phase():
                await self.device.write(offset, content)
            return self._fill_done(chunk, Residency.PRESENT, length)
        finally:
            self._unlock(chunk)

    def _check_content(self, chunk: int, content: Buffer) -> tuple[int, int]:
        offset, length = self.geometry.extent_of(chunk)
        if len(content) != length:
            raise InvariantError(f"{len(content)} bytes were offered for chunk {chunk} of {length} bytes")
        return offset, length

    def _fill_done(self, chunk: int, residency: Residency, length: int) -> bool:
        self.chunks.set_residency(chunk, residency)
        self._checkpoint_due = True
        self.filled_bytes += length
        return True

    async def invalidate(self, first: int, limit: int, residency: Residency) -> None:
        """Target of a migration, before the claim: the source has newer content of these chunks."""
        if residency not in (Residency.ABSENT_PEER, Residency.ABSENT_STORE):
            raise InvariantError(f"a chunk cannot be invalidated to {residency.name}")
        for chunk in self.chunks.select(LOCKED, LOCKED, first, limit):
            await self._wait_unlocked(int(chunk))
        self.chunks.set_residency_run(first, limit, residency)
        self._checkpoint_due = True

    # ---- durability -------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Everything acknowledged before this call survives power loss afterwards, as far as the device does.

        Concurrent calls share the work. When it raises, nothing is promised; call again. No deadline: a flush
        takes as long as the medium needs, and it cannot be taken back.
        """
        ticket = self._flush_started + 1
        while self._flush_done < ticket:
            async with self._flush_turn:
                if self._flush_done < ticket:
                    self._flush_started += 1
                    started = self._flush_started
                    await self._flush_now()
                    self._flush_done = started

    async def _flush_now(self) -> None:
        await self._punch()
        due, self._checkpoint_due = self._checkpoint_due, False
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
