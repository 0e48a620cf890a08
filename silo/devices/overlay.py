"""Copy-on-write: a device of its own over a base that many share and nobody changes.

The device is divided into *cells* (a power of two from 4 KiB to 4 MiB, 64 KiB unless told otherwise; the last may be
shorter). The map says for each cell where its content is:

=======  ======================  ============================================================
cell     in the map              content
=======  ======================  ============================================================
below    ``ABSENT_STORE``        in the base; what the overlay's data holds there means nothing
zero     ``ZERO_UNPUNCHED``      zeros; what the data holds there means nothing
owned    ``PRESENT``             in the data, at the same offset
=======  ======================  ============================================================

A cell never goes back to *below*. The map is the same kind as a volume's, so `silo.volumestate` keeps it: mapped for
the death of the process, in checkpoints for that of the machine. It only ever says what holds already:

* **Writing** to owned cells goes straight to the data. Else the extent is first widened to whole cells with what the
  device reads there now (*copy-up*); a cell that the write covers is not read. Then one device call writes all of it,
  and only after that the cells are owned. When any of it fails, or the process dies, they are still below or zero.
* **Zeroing** makes covered cells zero in the map; what they had in the data is given back first. Nothing is copied
  but the edges.
* **Flushing** copies the map, flushes the data, and makes *that copy* durable, as a volume does. So what was flushed
  survives a power loss, and a cell that the map owns has its content in the data.

While the device is busy with a cell, `silo.chunklocks` keeps others from it: writes to owned cells go on side by side,
zeroing waits for them; a cell that is about to be owned, or to be zero, is locked. Readers never wait.

The other form without waiting is served when base and data can do that. An overlay may be the base of another; how
one is opened, and its base recognised, is in `silo.devices.overlay_open`.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from collections.abc import Iterator, Sequence

from silo.abc import BlockDevice, Buffer
from silo.chunklocks import ChunkLocks
from silo.chunkmap import LOCKED, RESIDENCY_MASK, ChunkMap, Residency, runs_of
from silo.errors import ClosedError, CorruptionError, InvalidRequestError
from silo.geometry import Geometry
from silo.volumestate import VolumeState
from silo.zeros import zeros

__all__ = ["OverlayDevice"]

BELOW = int(Residency.ABSENT_STORE)
ZERO = int(Residency.ZERO_UNPUNCHED)
OWNED = int(Residency.PRESENT)

ZERO_STEP = 1 << 18
"""Cells that one synchronous step of zeroing changes: about a millisecond of numpy."""

COPY_UP_INLINE_MAX = 256 * 1024
"""More bytes are copied up only where one may wait; a device would hardly take them inline."""


class OverlayDevice(BlockDevice):
    """See the module. Owns ``base``, ``data`` and ``state``: closing it closes them. Concurrent calls are allowed.

    ``data`` has the size of the overlay, ``base`` that or less; beyond the base's end the map must say zero or owned.
    ``state`` has one byte for each of the ``cells``. `CorruptionError` when the map says what no overlay can be.
    """

    def __init__(self, base: BlockDevice, data: BlockDevice, cells: Geometry, state: VolumeState) -> None:
        if data.size != cells.size:
            raise InvalidRequestError(
                f"an overlay of {cells.size} bytes cannot have data of {data.size} bytes"
            )
        self.size = cells.size
        self.cells = cells
        self._base = base
        self._data = data
        self._state = state
        self._map = ChunkMap(state.buffer, cells.chunk_count)
        self._map.view &= RESIDENCY_MASK  # what else a volume's map has to say means nothing here
        self._states = self._map.states
        self._shift = cells.chunk_shift
        self._locks = ChunkLocks(self._map)
        self._checkpoint_due = True  # nobody knows what the process before us still owed
        self._flush_turn = asyncio.Lock()
        self._closed = False
        self._check_map()

    def __repr__(self) -> str:
        return f"OverlayDevice({self._data!r} over {self._base!r})"

    # ---- reading ----------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        self._check_open()
        first = offset >> self._shift
        if (offset + length - 1) >> self._shift == first:
            return self._read_part_nowait(self._states[first] & RESIDENCY_MASK, offset, length)
        runs = self._runs(offset, length)
        if len(runs) == 1:
            return self._read_part_nowait(runs[0][2], offset, length)
        whole = bytearray(length)
        for start, stop, residency in runs:
            if residency != ZERO:
                part = self._read_part_nowait(residency, start, stop - start)
                if part is None:
                    return None
                whole[start - offset : stop - offset] = part
        return whole

    async def read(self, offset: int, length: int) -> Buffer:
        self._check_open()
        runs = self._runs(offset, length)
        if len(runs) == 1:
            return await self._read_part(runs[0][2], offset, length)
        whole = bytearray(length)
        for start, stop, residency in runs:
            if residency != ZERO:
                whole[start - offset : stop - offset] = await self._read_part(residency, start, stop - start)
        return whole

    def _runs(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """``(start, stop, residency)`` in bytes, of the parts of an extent that are in one place each."""
        end, shift = offset + length, self._shift
        return [
            (max(first << shift, offset), min(limit << shift, end), residency)
            for first, limit, residency in self._map.residency_runs(*self.cells.touched(offset, length))
        ]

    def _read_part_nowait(self, residency: int, offset: int, length: int) -> Buffer | None:
        if residency == OWNED:
            return self._data.read_nowait(offset, length)
        inside = self._base.size - offset
        if residency == ZERO or inside <= 0:
            return zeros(length)
        if inside >= length:
            return self._base.read_nowait(offset, length)
        found = self._base.read_nowait(offset, inside)
        return None if found is None else b"".join((found, zeros(length - inside)))

    async def _read_part(self, residency: int, offset: int, length: int) -> Buffer:
        if residency == OWNED:
            return await self._data.read(offset, length)
        inside = self._base.size - offset
        if residency == ZERO or inside <= 0:
            return zeros(length)
        if inside >= length:
            return await self._base.read(offset, length)
        return b"".join((await self._base.read(offset, inside), zeros(length - inside)))

    # ---- writing ----------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self._check_open()
        end = offset + len(data)
        first = offset >> self._shift
        if (end - 1) >> self._shift == first and self._states[first] == OWNED:
            return self._data.write_nowait(offset, data)
        first, limit = self.cells.touched(offset, len(data))
        if len(self._map.select(LOCKED, LOCKED, first, limit)):
            return False
        start, stop = self._widened(first, limit, offset, end)
        if stop - start - len(data) > COPY_UP_INLINE_MAX:
            return False
        head = self.read_nowait(start, offset - start) if start < offset else b""
        tail = self.read_nowait(end, stop - end) if end < stop else b""
        if head is None or tail is None or not self._data.write_nowait(start, _joined(head, data, tail)):
            return False
        self._set(first, limit, OWNED)
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        self._check_open()
        end = offset + len(data)
        first, limit = self.cells.touched(offset, len(data))
        while len(locked := self._map.select(LOCKED, LOCKED, first, limit)):
            await self._locks.wait(int(locked[0]))
            self._check_open()
        with self._locks.writing(first, limit):
            start, stop = self._widened(first, limit, offset, end)
            head = await self.read(start, offset - start) if start < offset else b""
            tail = await self.read(end, stop - end) if end < stop else b""
            await self._data.write(start, _joined(head, data, tail))
            self._set(first, limit, OWNED)

    def _widened(self, first: int, limit: int, start: int, stop: int) -> tuple[int, int]:
        """What must be written, in bytes from ``start`` to ``stop``, so that all touched cells can be owned."""
        if first < limit and self._states[first] & RESIDENCY_MASK != OWNED:
            start = first << self._shift
        if first < limit and self._states[limit - 1] & RESIDENCY_MASK != OWNED:
            stop = min(limit << self._shift, self.size)
        return start, stop

    # ---- zeroing ----------------------------------------------------------------------------------------

    def zero_nowait(self, offset: int, length: int) -> bool:
        self._check_open()
        first, limit = self.cells.touched(offset, length)
        if limit - first > ZERO_STEP or self._locks.busy(first, limit) is not None:
            return False
        if self._edges_below(offset, length):
            return limit - first == 1 and self.write_nowait(offset, zeros(length))
        owned = runs_of(self._map.select(RESIDENCY_MASK, OWNED, first, limit))
        if len(owned) > 1:
            return False  # one call that declines is no harm, the second of two would be
        for start, stop in self._clipped(owned, offset, length):
            if not self._data.zero_nowait(start, stop - start):
                return False
        self._set(*self.cells.covered(offset, length), ZERO)
        return True

    async def zero(self, offset: int, length: int) -> None:
        self._check_open()
        for start, stop in self._edges_below(offset, length):
            await self.write(start, zeros(stop - start))  # afterwards the cell is owned, or zero: never below
        end = offset + length
        step = ZERO_STEP << self._shift
        while offset < end:
            stop = min(end, (offset // step + 1) * step)
            await self._zero_step(offset, stop - offset)
            offset = stop

    async def _zero_step(self, offset: int, length: int) -> None:
        first, limit = self.cells.touched(offset, length)
        while (busy := self._locks.busy(first, limit)) is not None:
            await self._locks.wait(busy)
            self._check_open()
        owned = runs_of(self._map.select(RESIDENCY_MASK, OWNED, first, limit))
        with self._locks.locked(first, limit):
            for start, stop in self._clipped(owned, offset, length):
                await self._data.zero(start, stop - start)
            self._set(*self.cells.covered(offset, length), ZERO)
        await asyncio.sleep(0)  # a whole disk is many steps: let others run in between

    def _edges_below(self, offset: int, length: int) -> list[tuple[int, int]]:
        """``(start, stop)`` of the parts of an extent in cells that it does not cover and that are below."""
        first, limit = self.cells.touched(offset, length)
        covered_first, covered_limit = self.cells.covered(offset, length)
        edges = {first, limit - 1} if first < limit else set()
        return [
            extent
            for cell in sorted(edges)
            if not covered_first <= cell < covered_limit and self._states[cell] & RESIDENCY_MASK == BELOW
            for extent in self._clipped([(cell, cell + 1)], offset, length)
        ]

    def _clipped(self, runs: list[tuple[int, int]], offset: int, length: int) -> list[tuple[int, int]]:
        """``(start, stop)`` in bytes of what runs of cells and an extent share."""
        end, shift = offset + length, self._shift
        return [(max(first << shift, offset), min(limit << shift, end)) for first, limit in runs]

    # ---- the map ----------------------------------------------------------------------------------------

    def _set(self, first: int, limit: int, residency: int) -> None:
        """Say where the content of a run of cells is from now on; it must be there already."""
        if first < limit and len(self._map.select(RESIDENCY_MASK, residency, first, limit)) < limit - first:
            self._map.set_residency_run(first, limit, Residency(residency))
            self._checkpoint_due = True

    def _check_map(self) -> None:
        """Raise `CorruptionError` for a map that no overlay over this base can have."""
        possible = [len(self._map.select(RESIDENCY_MASK, residency)) for residency in (BELOW, ZERO, OWNED)]
        limit = self.cells.touched(0, self._base.size)[1]
        if sum(possible) != self._map.count or len(self._map.select(RESIDENCY_MASK, BELOW, limit)):
            raise CorruptionError(
                f"the map of {self!r} says what cannot be", hint="keep its files and report it"
            )

    # ---- the whole --------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """As the port says. When it raises, nothing is promised; call again."""
        self._check_open()
        # One after the other, without a deadline: none may return before the map of an earlier one is safe.
        async with self._flush_turn:
            due, self._checkpoint_due = self._checkpoint_due, False
            try:
                snapshot = bytes(self._states) if due else None
                await self._data.flush()
                if snapshot is not None:
                    await self._state.checkpoint(snapshot)
            except BaseException:
                self._checkpoint_due |= due
                raise

    async def data_extents(self) -> Sequence[tuple[int, int]]:
        """Cells that are owned, and what the base holds in those that are below."""
        self._check_open()
        runs = self._runs(0, self.size)  # first: what changes during the call need not be in the answer
        below = await self._base.data_extents()
        extents: list[tuple[int, int]] = []
        for start, stop, residency in runs:
            inside = _inside(below, start, stop) if residency == BELOW else [(start, stop)]
            for low, high in inside if residency != ZERO else ():
                if extents and sum(extents[-1]) == low:
                    low = extents.pop()[0]
                extents.append((low, high - low))
        return extents

    async def aclose(self) -> None:
        """As the port says. Waits for changes of the map that are under way."""
        if self._closed:
            return
        self._closed = True
        try:
            while (busy := self._locks.busy(0, self._map.count)) is not None:
                await self._locks.wait(busy)
        finally:
            async with contextlib.AsyncExitStack() as stack:
                for part in (self._base, self._data, self._state):
                    stack.push_async_callback(part.aclose)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the overlay was closed")


def _inside(extents: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """``(low, high)`` of what ascending extents have between two offsets."""
    position = bisect.bisect_right(extents, start, key=sum)
    while position < len(extents) and extents[position][0] < stop:
        offset, length = extents[position]
        yield max(offset, start), min(offset + length, stop)
        position += 1


def _joined(head: Buffer, data: Buffer, tail: Buffer) -> Buffer:
    return b"".join((head, data, tail)) if head or tail else data
