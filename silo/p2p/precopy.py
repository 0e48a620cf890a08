"""What the source sends next: the planner of a migration.

The planner knows, for every chunk, three things in one byte: whether the target must get it from us (``UNIQUE``:
it changed since the base generation, and its newest content is not acknowledged), whether it shall be sent
(``WANTED``), and whether it is under way (``FLYING``).

::

    begin_round(changed) ──► UNIQUE|WANTED ──take──► UNIQUE|FLYING ──ack of this round──► nothing: it is there
                                  ▲                        │
                                  └── changed, link lost ──┘

Versions (safety rule 12). A *round* begins by taking the migration recorder, in one step with `begin_round`,
and everything sent from then on carries its number. An acknowledgement counts only if the chunk has not
changed in a later round. So what is UNIQUE at the end, together with what the recorder holds, is exactly what
the handover must call missing. A lost link turns everything that flies back into wanted.

Order: before the switchover unique chunks come first, coldest-written first, because those are least likely to
be sent twice; then chunks that the store has too but that are hot. After the switchover unique ones come first
again, hottest-read first, because a guest waits for them. Chunks that the store has and that are cold are never
sent. Ranks are quantised heat, in eight classes; within a class chunks are sent in the order of the disk.

Pure: numbers in, batches out. Four bytes per chunk, and no step looks at more than the windows that have
something to send. When the guest is stopped is decided in `silo.p2p.budget`.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from silo.chunkmap import Indices
from silo.errors import InvariantError, RemoteProtocolError
from silo.geometry import Geometry

__all__ = ["ROUND_MAX", "Batch", "Order", "Planner", "dequantise", "quantise"]

WANTED = 1
FLYING = 2
UNIQUE = 4

WINDOW_SHIFT = 16
WINDOW = 1 << WINDOW_SHIFT
CLASSES = 8
ROUND_MAX = (1 << 16) - 1

Ranks = Callable[[int, int, int], npt.NDArray[np.uint8]]
"""``(volume, first, limit)`` to quantised heat of those chunks."""


def quantise(heat: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Decayed counts as one byte: ``16 * log2(1 + count)``, rounded, at most 255 (which is 63,000)."""
    quantised: npt.NDArray[np.uint8] = np.minimum(np.rint(16 * np.log2(1 + heat)), 255).astype(np.uint8)
    return quantised


def dequantise(ranks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The counts that `quantise` saw, to about two percent."""
    counts: npt.NDArray[np.float32] = np.exp2(ranks.astype(np.float32) / 16) - 1
    return counts


class Order(enum.Enum):
    """Which end of the heat comes first."""

    COLDEST_FIRST = "coldest first"
    HOTTEST_FIRST = "hottest first"


@attrs.frozen
class Batch:
    """Chunks of one volume, ascending, to be sent now as of a round."""

    volume: int
    round: int
    chunks: Indices


@attrs.define
class _Flight:
    """A batch that is under way: so many frames, so many bytes of the window, so many frames acknowledged."""

    batch: Batch
    pushes: int
    size: int
    done: int = 0


class _VolumePlan:
    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.flags = np.zeros(geometry.chunk_count, dtype=np.uint8)
        self.changed_in = np.zeros(geometry.chunk_count, dtype=np.uint16)
        self.classes = np.zeros(geometry.chunk_count, dtype=np.uint8)
        windows = (geometry.chunk_count + WINDOW - 1) >> WINDOW_SHIFT
        self.wanted = np.zeros(windows, dtype=np.int64)
        """How many chunks of each window are WANTED."""
        self.unique = 0
        """How many chunks are UNIQUE."""

    def window(self, index: int) -> slice:
        return slice(index << WINDOW_SHIFT, min((index + 1) << WINDOW_SHIFT, len(self.flags)))

    def add(self, chunks: Indices, bits: int) -> None:
        before = self.flags[chunks]
        fresh = chunks[before & WANTED == 0]
        self.wanted += np.bincount(fresh >> WINDOW_SHIFT, minlength=len(self.wanted))
        if bits & UNIQUE:
            self.unique += int(np.count_nonzero(before & UNIQUE == 0))
        self.flags[chunks] = before & ~np.uint8(FLYING) | np.uint8(bits)

    def take(self, chunks: Indices, *, leaves: int) -> None:
        """WANTED chunks are about to be sent; ``leaves`` is FLYING, or 0 when nobody will acknowledge them."""
        flags = self.flags[chunks] & ~np.uint8(WANTED) | np.uint8(leaves)
        self.flags[chunks] = flags
        self.wanted -= np.bincount(chunks >> WINDOW_SHIFT, minlength=len(self.wanted))

    def land(self, chunks: Indices, round_: int) -> None:
        flags = self.flags[chunks]
        good = (flags & FLYING != 0) & (self.changed_in[chunks] <= round_)
        self.unique -= int(np.count_nonzero(flags[good] & UNIQUE))
        self.flags[chunks[good]] = 0

    def clear(self) -> None:
        self.flags[:] = 0
        self.wanted[:] = 0
        self.unique = 0


class Planner:
    """See the module. ``ranks`` gives the heat by which the present order sorts; it may change between rounds."""

    def __init__(self, geometries: Sequence[Geometry]) -> None:
        self._plans = [_VolumePlan(geometry) for geometry in geometries]
        self._flying: defaultdict[int, deque[_Flight]] = defaultdict(deque)
        """By lane. On each, pushes are acknowledged in the order in which they were sent."""
        self._walk: Iterator[Batch] = iter(())
        self._rest: Batch | None = None
        """What the last step of the walk found and is not sent yet."""
        self.round = 0
        self.flying_bytes = 0

    # ---- what the target must get -----------------------------------------------------------------------

    def begin_round(self) -> int:
        """The next round begins, now. Call it in one step with taking the recorder and with `changed`."""
        if self.round >= ROUND_MAX:
            raise InvariantError(f"a migration had {ROUND_MAX} rounds")
        self.round += 1
        return self.round

    def end_rounds(self, final: int) -> None:
        """The guest is stopped: nothing changes any more. What is sent from here on is of round ``final``."""
        self.round = final

    def changed(self, volume: int, chunks: Indices) -> None:
        """These have changed since the last round (or, in the first, since the base)."""
        plan = self._plans[volume]
        plan.add(chunks, UNIQUE | WANTED)
        plan.changed_in[chunks] = self.round

    def want(self, volume: int, chunks: Indices) -> None:
        """Send these too, though the store has them."""
        plan = self._plans[volume]
        plan.add(chunks[plan.flags[chunks] == 0], WANTED)

    def only(self, needed: Sequence[Indices]) -> None:
        """Forget everything else: exactly these are unique and wanted. What flies lands for nothing."""
        self._flying.clear()
        self.flying_bytes = 0
        self._walk, self._rest = iter(()), None
        for plan, chunks in zip(self._plans, needed, strict=True):
            plan.clear()
            plan.add(chunks, UNIQUE | WANTED)

    def keep_unique(self, volume: int, unsynced: Indices) -> None:
        """After the last commit: what it covers can be had from the store and need not come from us."""
        plan = self._plans[volume]
        spare = np.ones(len(plan.flags), dtype=bool)
        spare[unsynced] = False
        covered = np.flatnonzero(spare & (plan.flags & UNIQUE != 0))
        wanted = covered[plan.flags[covered] & WANTED != 0]
        plan.take(wanted, leaves=0)
        plan.flags[covered] = 0
        plan.unique -= len(covered)

    def missing(self, volume: int, first: int = 0, limit: int | None = None) -> Indices:
        """The chunks (of a run of them) of which the target lacks the newest content, ascending."""
        return np.flatnonzero(self._plans[volume].flags[first:limit] & UNIQUE) + first

    @property
    def unique_bytes(self) -> int:
        """About how much only we have, in whole chunks."""
        return sum(plan.unique * plan.geometry.chunk_size for plan in self._plans)

    @property
    def wanted_chunks(self) -> int:
        """How many chunks are still to be sent."""
        return sum(int(plan.wanted.sum()) for plan in self._plans)

    @property
    def wanted_bytes(self) -> int:
        """About how much is still to be sent, in whole chunks."""
        return sum(int(plan.wanted.sum()) * plan.geometry.chunk_size for plan in self._plans)

    @property
    def is_settled(self) -> bool:
        """Nothing is to be sent, and everything sent was acknowledged."""
        return not any(self._flying.values()) and all(not plan.wanted.any() for plan in self._plans)

    # ---- sending ----------------------------------------------------------------------------------------

    def set_order(self, order: Order, ranks: Ranks) -> None:
        """From now on chunks come in this order. Ranks are asked for window by window, as they are needed."""
        self._walk, self._rest = self._in_order(order, ranks), None

    def take_batch(self, size: int) -> Batch | None:
        """The next chunks to send, about ``size`` bytes of them, or ``None``. They fly until acknowledged.

        A chunk that became wanted behind the present place in the order comes after the next `set_order`.
        """
        while (found := self._rest or next(self._walk, None)) is not None:
            plan = self._plans[found.volume]
            room = max(1, size // plan.geometry.chunk_size)
            now, later = found.chunks[:room], found.chunks[room:]
            self._rest = Batch(found.volume, found.round, later) if len(later) else None
            batch = self.take_chosen(found.volume, now)
            if batch is not None:
                return batch
        return None

    def take_chosen(self, volume: int, chunks: Indices) -> Batch | None:
        """Those of the given chunks that are still to be sent, out of turn; ``None`` when there are none."""
        plan = self._plans[volume]
        wanted = chunks[plan.flags[chunks] & WANTED != 0]
        if not len(wanted):
            return None
        plan.take(wanted, leaves=FLYING)
        return Batch(volume, self.round, wanted)

    def launched(self, batch: Batch, pushes: int, size: int, lane: int = 0) -> None:
        """A batch goes out as so many frames: one per chunk, or a single one. ``size`` counts for the window."""
        self._flying[lane].append(_Flight(batch, pushes, size))
        self.flying_bytes += size

    def take_neighbours(self, volume: int, chunk: int, count: int) -> Indices:
        """The demanded chunk, if it is still to be sent, and up to ``count`` wanted ones behind it.

        They will not be pushed any more; nobody acknowledges what goes over the demand lane.
        """
        plan = self._plans[volume]
        limit = min(len(plan.flags), chunk + 1 + 4 * count)
        near = np.flatnonzero(plan.flags[chunk:limit] & WANTED)[: count + 1] + chunk
        plan.take(near, leaves=0)
        plan.unique -= int(np.count_nonzero(plan.flags[near] & UNIQUE))
        plan.flags[near] = 0
        return near

    def landed(self, pushes: int, lane: int = 0) -> None:
        """So many more frames of a lane were acknowledged, in the order in which they were sent."""
        flights = self._flying[lane]
        while pushes:
            if not flights:
                raise RemoteProtocolError("the peer acknowledged more than it was sent")
            flight = flights[0]
            batch, before = flight.batch, flight.done
            flight.done = min(before + pushes, flight.pushes)
            pushes -= flight.done - before
            self.flying_bytes -= (
                flight.size * flight.done // flight.pushes - flight.size * before // flight.pushes
            )
            whole = flight.done == flight.pushes
            chunks = batch.chunks[before:] if whole else batch.chunks[before : flight.done]
            self._plans[batch.volume].land(chunks, batch.round)
            if whole:
                flights.popleft()

    def lane_lost(self, lane: int) -> None:
        """What flies on a lane may have arrived or not: it is wanted again."""
        for flight in self._flying.pop(lane, ()):
            plan = self._plans[flight.batch.volume]
            chunks = flight.batch.chunks
            plan.add(chunks[plan.flags[chunks] & FLYING != 0], WANTED)
            self.flying_bytes -= flight.size - flight.size * flight.done // flight.pushes

    def link_lost(self) -> None:
        """As `lane_lost`, of all lanes."""
        for lane in list(self._flying):
            self.lane_lost(lane)

    def flights(self, lane: int) -> int:
        """How many frames of a lane are under way."""
        return sum(flight.pushes - flight.done for flight in self._flying[lane])

    def _in_order(self, order: Order, ranks: Ranks) -> Iterator[Batch]:
        """Every window that has something to send, class by class, unique chunks before the others."""
        for volume, plan in enumerate(self._plans):
            for index in np.flatnonzero(plan.wanted):
                window = plan.window(int(index))
                coldness = ranks(volume, window.start, window.stop) >> 5
                plan.classes[window] = coldness if order is Order.COLDEST_FIRST else CLASSES - 1 - coldness
        for bits in (WANTED | UNIQUE, WANTED):
            for class_ in range(CLASSES):
                for volume, plan in enumerate(self._plans):
                    for index in np.flatnonzero(plan.wanted):
                        window = plan.window(int(index))
                        found = (plan.flags[window] & bits == bits) & (plan.classes[window] == class_)
                        chunks = np.flatnonzero(found) + window.start
                        if len(chunks):
                            yield Batch(volume, self.round, chunks)
