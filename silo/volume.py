"""The volume: one owner of a device and of everything that is known about its chunks.

Frontends read and write through it, the syncer reads cuts of it, a migration fills it. They never meet
anywhere else, so what they must agree on is decided here, between two awaits. ``docs/concurrency.md`` holds
the invariants and the crash table; adding an await to this file is a change of locking.

**Two speeds.** ``*_nowait`` serves a request synchronously when nothing stands in its way: the gate is
open, the touched chunks are known locally, no cut needs old content that cannot be copied at once, and the
device does not block. Else it does nothing, and the caller awaits the other form, which removes one obstacle
after the other and *looks again* each time, until the device phase can follow the last look without an await.

**A write**: look, mark dirty, device, residency. When the device phase is asynchronous a cut may be taken
during it; then the chunks are marked again at its end, before the acknowledgement. Chunks that are not
PRESENT are locked for that time, so that no fill can land over the guest's bytes. A failed write leaves its
marks.

**Zeroing** changes the map at once, after the device phases on its chunks; the device follows at the next
flush, or chunk by chunk before a partial write.

Where absent chunks come from is in `silo.hydration`, what is done to a chunk on the device in `silo.localchunks`:
the middle and the lower part of the same owner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from silo.abc import BlockDevice, Buffer
from silo.chunkmap import DIRTY_BITS, FROZEN, LOCKED, RESIDENCY_MASK, WINDOW_SHIFT, ChunkMap
from silo.errors import InvalidRequestError
from silo.gate import Gate
from silo.geometry import Geometry
from silo.heatmap import HeatMap
from silo.hydration import Hydration
from silo.localchunks import PRESENT, ZERO, ZERO_UNPUNCHED, MapKeeper
from silo.throttle import Throttle
from silo.zeros import zeros

__all__ = ["Volume"]

BLOCKS_WRITE = RESIDENCY_MASK | LOCKED | FROZEN

ZERO_STEP = 1 << 18
"""Chunks that one synchronous step of zeroing changes: about a millisecond of numpy."""


class Volume(Hydration):
    """See the module. Extents must have been checked (`Geometry.check_extent`); lengths are positive."""

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
        read_only: bool = False,
    ) -> None:
        super().__init__(name, device, geometry, gate, chunks=chunks, heat=heat, keeper=keeper)
        self.read_only = read_only
        self._throttle: Throttle | None = None
        self._declines = read_only
        """No write is served synchronously: the volume is read-only, or its guest is slowed down."""

    def slow_down(self, throttle: Throttle | None) -> None:
        """From now on writes pay here for the chunks that they make dirty; ``None``: they do not any more."""
        self._throttle = throttle
        self._declines = self.read_only or throttle is not None

    # ---- the guest's side -------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The bytes, or ``None`` when something stands in the way.

        The buffer may be live memory: valid until one of its chunks is next written or the caller awaits.
        """
        if not self.gate.is_open:
            return None
        first = offset >> self._shift
        if (offset + length - 1) >> self._shift != first:
            return self._read_many_nowait(offset, length)
        residency = self._states[first] & RESIDENCY_MASK
        if residency == PRESENT:
            found = self.device.read_nowait(offset, length)
            if found is not None:
                heat = self.heat
                heat.reads[first] += heat.weight
            return found
        if residency >= ZERO:
            return zeros(length)
        return None

    def _read_many_nowait(self, offset: int, length: int) -> Buffer | None:
        first, limit = self.geometry.touched(offset, length)
        residencies = {state & RESIDENCY_MASK for state in self._states[first:limit]}
        if min(residencies) < ZERO:
            return None
        if PRESENT not in residencies:
            return zeros(length)
        whole: Buffer | None
        if ZERO_UNPUNCHED not in residencies:
            whole = self.device.read_nowait(offset, length)  # where a chunk is ZERO the device is, too
        else:
            whole = self._read_runs_nowait(first, limit, offset, length)
        if whole is not None:
            self.heat.note_reads(first, limit)
        return whole

    def _read_runs_nowait(self, first: int, limit: int, offset: int, length: int) -> bytearray | None:
        whole = bytearray(length)
        for low, high, residency in self.chunks.residency_runs(first, limit):
            if residency == PRESENT:
                start, stop = self._clip(low, high, offset, length)
                part = self.device.read_nowait(start, stop - start)
                if part is None:
                    return None
                whole[start - offset : stop - offset] = part
        return whole

    def _clip(self, first: int, limit: int, offset: int, length: int) -> tuple[int, int]:
        """``(start, stop)`` in bytes of what a run of chunks and an extent share."""
        return max(first << self._shift, offset), min(limit << self._shift, offset + length)

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes, hydrating what is absent. Concurrent calls are allowed; cancellation leaves nothing behind.

        Waits as long as the gate is closed, and as long as a source needs; raises what they raise.
        """
        while True:
            await self.gate.wait_open()
            found = self.read_nowait(offset, length)
            if found is not None:
                return found
            first, limit = self.geometry.touched(offset, length)
            if all(state & RESIDENCY_MASK >= ZERO for state in self._states[first:limit]):
                return await self._read_device(first, limit, offset, length)
            await self._hydrate_all(first, limit, demand=True)

    async def _read_device(self, first: int, limit: int, offset: int, length: int) -> Buffer:
        """Read what is known locally through the device's asynchronous form."""
        runs = self.chunks.residency_runs(first, limit)
        self.heat.note_reads(first, limit)
        if len(runs) == 1 and runs[0][2] == PRESENT:
            return await self.device.read(offset, length)
        whole = bytearray(length)
        for low, high, residency in runs:
            if residency == PRESENT:
                start, stop = self._clip(low, high, offset, length)
                whole[start - offset : stop - offset] = await self.device.read(start, stop - start)
        return whole

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Write all of ``data`` and return True, or do nothing (but perhaps mark too much) and return False."""
        first = offset >> self._shift
        state = self._states[first]
        if (
            state & BLOCKS_WRITE != PRESENT
            or (offset + len(data) - 1) >> self._shift != first
            or not self.gate.is_open
            or self._declines
        ):
            return not self._declines and self._write_uncommon_nowait(offset, data)
        marked = state | self._marks
        if marked != state:
            self._states[first] = marked
            self._summary[first >> WINDOW_SHIFT] |= marked & DIRTY_BITS
        if not self.device.write_nowait(offset, data):
            return False
        heat = self.heat
        heat.writes[first] += heat.weight
        return True

    def _write_uncommon_nowait(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        first, limit = self.geometry.touched(offset, length)
        # What a guest writes again and again is all there and all marked: then one look at the run is enough.
        steady = (
            self.gate.is_open
            and bytes(self._states[first:limit]).count(PRESENT | self._marks) == limit - first
        )
        if not steady:
            if self._obstacle(offset, length) is not None:
                return False
            self.chunks.mark_run(first, limit, self._marks)
        try:
            if not self.device.write_nowait(offset, data):
                return False
        except BaseException:
            self._distrust(first, limit)
            raise
        if steady:
            self.heat.note_writes(first, limit)
        else:
            self._settle(first, limit)
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``; it is acknowledged when this returns.

        When it raises or is cancelled, any part may have been written and nothing more will be; the touched
        chunks are marked dirty. Concurrent calls are allowed; overlapping ones are not ordered.
        """
        if self.read_only:
            raise InvalidRequestError(f"{self.name} is read-only")
        length = len(data)
        if self._throttle is not None:
            await self._throttle.pay(self._fresh_bytes(offset, length))
        while not self._write_uncommon_nowait(offset, data):
            obstacle = self._obstacle(offset, length)
            if obstacle is None:
                return await self._write_device(offset, data)
            await obstacle()

    def _fresh_bytes(self, offset: int, length: int) -> int:
        """What a write to the extent adds to what must be carried away: its chunks that are not dirty yet."""
        first, limit = self.geometry.touched(offset, length)
        marks = self._marks
        return sum(state & marks != marks for state in self._states[first:limit]) << self._shift

    def zero_nowait(self, offset: int, length: int) -> bool:
        """As `zero` when that is one bounded step, else do nothing and return False."""
        first, limit = self.geometry.covered(offset, length)
        if (
            limit - first > ZERO_STEP
            or not self.gate.is_open
            or self.read_only
            or self._edges(offset, length)
            or self._locks.busy(first, limit) is not None
        ):
            return False
        self._zero_run(first, limit)
        return True

    async def zero(self, offset: int, length: int) -> None:
        """Make the extent read as zeros. O(chunks of the map); the device gives its space back at the next flush.

        When it raises or is cancelled, any part may be zero. Concurrent calls are allowed.
        """
        if self.read_only:
            raise InvalidRequestError(f"{self.name} is read-only")
        for start, stop in self._edges(offset, length):
            await self._zero_partial(start, stop)
        first, limit = self.geometry.covered(offset, length)
        while first < limit:
            await self.gate.wait_open()
            step = min(limit, first + ZERO_STEP)
            busy = self._locks.busy(first, step)
            if busy is not None:
                await self._locks.wait(busy)
                continue
            self._zero_run(first, step)
            first = step
            if first < limit:
                await asyncio.sleep(0)  # a whole disk is many steps: let others run in between

    async def trim(self, offset: int, length: int) -> None:
        """The guest no longer needs the extent: zero the chunks that it covers, leave the edges as they are."""
        first, limit = self.geometry.covered(offset, length)
        if first < limit:
            start = first << self._shift
            await self.zero(start, min(limit << self._shift, self.geometry.size) - start)

    async def flush(self) -> None:
        """As `LocalChunks.flush`, for a volume that is still ours; the gate's error when that has failed.

        What was acknowledged before another host took the group over is durable on a disk that nobody will read
        again: saying so would be a lie. A gate that is only closed does not hold a flush up: whatever was
        acknowledged is in the handover, and the guest may be waiting for the flush in order to stop.
        """
        self.gate.check()
        await super().flush()
        self.gate.check()  # it may have failed meanwhile

    def flush_nowait(self) -> bool:
        """As `flush` when there is nothing to wait for and nothing to raise, else do nothing and return False."""
        return self.gate.error is None and super().flush_nowait()

    def _edges(self, offset: int, length: int) -> list[tuple[int, int]]:
        """``(start, stop)`` of the parts of an extent that do not cover their chunk."""
        first, limit = self.geometry.covered(offset, length)
        end = offset + length
        if limit <= first:
            low, high = self.geometry.touched(offset, length)
            middle = high - 1 << self._shift
            return [(offset, end)] if high - low == 1 else [(offset, middle), (middle, end)]
        start, stop = first << self._shift, min(limit << self._shift, self.geometry.size)
        return [(low, high) for low, high in ((offset, start), (stop, end)) if low < high]

    async def _zero_partial(self, start: int, stop: int) -> None:
        chunk = start >> self._shift
        await self.gate.wait_open()
        if self._states[chunk] & (RESIDENCY_MASK | LOCKED) not in (ZERO, ZERO_UNPUNCHED):
            await self.write(start, zeros(stop - start))

    async def prefetch(self, offset: int, length: int) -> None:
        """Hydrate the chunks that the extent touches, without delaying guests that wait for others."""
        await self.gate.wait_open()
        await self._hydrate_all(*self.geometry.touched(offset, length), demand=False)

    # ---- obstacles --------------------------------------------------------------------------------------

    def _obstacle(self, offset: int, length: int) -> Callable[[], Awaitable[None]] | None:
        """What stands in the way of writing the extent, as the call that removes it; ``None`` when nothing does.

        Removes by itself what can be removed without waiting.
        """
        self.gate.look()
        if not self.gate.is_open:
            return self.gate.wait_open
        first, limit = self.geometry.touched(offset, length)
        for chunk in range(first, limit):
            state = self._states[chunk]
            if state & BLOCKS_WRITE != PRESENT:
                obstacle = self._obstacle_in(chunk, state, offset, length)
                if obstacle is not None:
                    return obstacle
        return None

    def _obstacle_in(
        self, chunk: int, state: int, offset: int, length: int
    ) -> Callable[[], Awaitable[None]] | None:
        if state & LOCKED:
            return partial(self._locks.wait, chunk)
        if state & FROZEN and not self._copy_aside_nowait(chunk):
            return partial(self._copy_aside, chunk)
        first, limit = self.geometry.covered(offset, length)
        if not first <= chunk < limit:
            residency = state & RESIDENCY_MASK
            if residency < ZERO:
                return partial(self.hydrate, chunk, demand=True)
            if residency == ZERO_UNPUNCHED and not self._punch_nowait(chunk):
                return partial(self._punch_run, chunk, chunk + 1)
        return None
