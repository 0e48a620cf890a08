"""Rounds of a migration at the source: what the group's maps say, told to the planner.

Every method that begins a round is one synchronous step: it takes the migration recorder and tells the planner
and the queue of announcements, with no await between, so that a guest's write belongs to one round for certain
(safety rule 12). Announcements (INVALIDATE, and runs of zeros) must go out before the first push of their round;
`silo.p2p.pusher` empties the queue first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from silo.chunkmap import MIGRATION_DIRTY, RESIDENCY_MASK, SYNC_DIRTY, SYNC_IN_CUT, Indices, Residency
from silo.group import Group
from silo.p2p.chunksets import SET_WINDOW
from silo.p2p.messages import (
    FINAL_ROUND,
    HEAT_WINDOW,
    Heat,
    Invalidate,
    Message,
    Round,
    VolumeOffer,
    Zeros,
    set_messages,
)
from silo.p2p.precopy import Order, Planner, quantise
from silo.p2p.records import PackedSet, VolumeSets, pack_all, pack_set
from silo.volume import Volume

__all__ = ["Rounds"]

ZERO_CHUNK_COST = 8
"""What a chunk in a run of zeros counts in the window of pushes: about what remembering it costs."""
RANK_HOT = 16
"""Read once within the half-life of heat; below that a chunk counts as cold."""

Ranks = npt.NDArray[np.uint8]


class Rounds:
    """See the module. Volumes are known by their place in ``volumes``, here and on the wire."""

    def __init__(self, group: Group, names: Sequence[str], *, has_store: bool) -> None:
        self.volumes: Sequence[Volume] = tuple(group.volumes[name] for name in names)
        self.planner = Planner([volume.geometry for volume in self.volumes])
        self.announcements: deque[Message] = deque()
        self.count = 0
        """Rounds of pre-copy that were announced."""
        self._group = group
        self._has_store = has_store
        self._is_final = False

    def begin_first(self) -> None:
        """Start the recorder, and plan what the base does not have: with a store, what is dirty or in an undecided
        cut; without one, everything. All zeros too, which the target would have to look up one by one. Nothing is
        announced yet: that is for the next round, once there is somebody to tell."""
        self._group.record_migration(True)
        self.planner.begin_round()
        unsynced = SYNC_DIRTY | SYNC_IN_CUT
        for index, volume in enumerate(self.volumes):
            for first, states in _windows(volume):
                lacking = states & unsynced != 0 if self._has_store else np.ones(len(states), dtype=bool)
                self.planner.changed(index, np.flatnonzero(lacking) + first)
                self.planner.want(index, _zeros(states, first))

    def begin_next(self) -> None:
        """Plan what was written since the last round, and what is still lacking of earlier ones."""
        self.count += 1
        self._begin_taken()
        self._announce()

    def end(self, offers: Sequence[VolumeOffer]) -> tuple[VolumeSets, ...]:
        """The gate is closed and drained: nothing changes any more. Returns what the handover says of each volume.

        Missing is everything that the target lacks the newest content of, also what a commit has covered since:
        the target may hold an older version of that. But it need not be pushed.
        """
        self._begin_taken()
        unsynced = self._group.unsynced() if self._has_store else None
        sets = tuple(
            VolumeSets(
                volume=offer,
                missing=self._pack_missing(index, volume),
                unsynced=pack_all(volume.chunks.count)
                if unsynced is None
                else pack_set(unsynced[volume.name]),
            )
            for index, (volume, offer) in enumerate(zip(self.volumes, offers, strict=True))
        )
        if unsynced is not None:
            for index, volume in enumerate(self.volumes):
                self.planner.keep_unique(index, unsynced[volume.name])
        return sets

    def _pack_missing(self, index: int, volume: Volume) -> PackedSet:
        packed: PackedSet = ()
        for first, _ in _windows(volume):
            packed += pack_set(self.planner.missing(index, first, first + SET_WINDOW))
        return packed

    def offers(self) -> list[VolumeOffer]:
        """The volumes as they are offered. Reads every map once."""
        offers = []
        for volume in self.volumes:
            shape, counts = volume.geometry, volume.chunks.count_residency()
            used = shape.chunk_count - counts[Residency.ZERO] - counts[Residency.ZERO_UNPUNCHED]
            offers.append(
                VolumeOffer(
                    name=volume.name,
                    size=shape.size,
                    chunk_size=shape.chunk_size,
                    block_size=shape.block_size,
                    used=min(used * shape.chunk_size, shape.size),
                )
            )
        return offers

    def begin_final(self, needed: Sequence[Indices] | None = None) -> None:
        """After the handover: plan what is missing, or exactly what the target has said that it needs."""
        if needed is not None:
            self.planner.only(needed)
        self.planner.end_rounds(FINAL_ROUND)
        self.announcements.clear()
        self._push_zeros()
        self._is_final = True
        self.reorder()

    def reorder(self) -> None:
        """Look again at what is to be sent, from the beginning of the order."""
        if self._is_final:
            self.planner.set_order(Order.HOTTEST_FIRST, self._read_ranks)
        else:
            self.planner.set_order(Order.COLDEST_FIRST, self._write_ranks)

    def link_lost(self) -> None:
        """What was not said yet is not said any more. What was under way is dealt with by `link_resumed`."""
        self.announcements.clear()

    def link_resumed(self, dealt: Mapping[int, int]) -> None:
        """The target has dealt with so many more pushes of each lane; the rest of what was under way may not have
        arrived, and the next round begins with it. `RemoteProtocolError` for more than was sent."""
        for lane, pushes in dealt.items():
            self.planner.landed(pushes, lane)
        self.planner.link_lost()

    def dirty_bytes(self) -> int:
        """What the guest has written since the round began, in whole chunks."""
        return sum(
            volume.chunks.count_dirty(MIGRATION_DIRTY) * volume.geometry.chunk_size for volume in self.volumes
        )

    def _begin_taken(self) -> None:
        taken = self._group.take_migration()
        self.planner.begin_round()
        for index, volume in enumerate(self.volumes):
            self.planner.changed(index, taken[volume.name])

    def _announce(self) -> None:
        for index, volume in enumerate(self.volumes):
            for first in range(0, volume.chunks.count, SET_WINDOW):
                lacking = self.planner.missing(index, first, first + SET_WINDOW)
                self.announcements.extend(set_messages(Invalidate, self.planner.round, index, lacking))
        self.announcements.append(Round(round=self.planner.round))
        self._push_zeros()
        self.reorder()

    def _push_zeros(self) -> None:
        """Runs of zeros are pushed as sets, one message per window."""
        for index, volume in enumerate(self.volumes):
            for first, states in _windows(volume):
                batch = self.planner.take_chosen(index, _zeros(states, first))
                if batch is not None:
                    self.planner.launched(batch, 1, ZERO_CHUNK_COST * len(batch.chunks))
                    self.announcements.extend(set_messages(Zeros, batch.round, index, batch.chunks))

    # ---- heat -------------------------------------------------------------------------------------------

    async def want_hot(self, size: int) -> None:
        """Also send the hottest-read chunks that the store has as well, up to so many bytes of them.

        Takes turns with others, as it looks at every chunk's heat twice.
        """
        cost = np.zeros(256, dtype=np.int64)
        for index, _, ranks in self._hot_ranks():
            cost += np.bincount(ranks, minlength=256) * self.volumes[index].geometry.chunk_size
            await asyncio.sleep(0)
        threshold = 256
        while threshold > RANK_HOT and int(cost[threshold - 1]) <= size:
            threshold -= 1
            size -= int(cost[threshold])
        for index, first, ranks in self._hot_ranks():
            edge = np.flatnonzero(ranks == max(threshold - 1, RANK_HOT))
            edge = edge[: size // self.volumes[index].geometry.chunk_size]
            size -= len(edge) * self.volumes[index].geometry.chunk_size
            self.planner.want(index, np.flatnonzero(ranks >= threshold) + first)
            self.planner.want(index, edge + first)
            await asyncio.sleep(0)

    def _hot_ranks(self) -> Iterator[tuple[int, int, Ranks]]:
        """How hot clean chunks are that are here, window by window; all others count as cold."""
        for index, volume in enumerate(self.volumes):
            for first in range(0, volume.chunks.count, HEAT_WINDOW):
                limit = min(first + HEAT_WINDOW, volume.chunks.count)
                states = volume.chunks.view[first:limit]
                clean = states & (RESIDENCY_MASK | SYNC_DIRTY | SYNC_IN_CUT) == Residency.PRESENT
                yield index, first, np.where(clean, self._read_ranks(index, first, limit), np.uint8(0))

    def heat(self) -> Iterator[Heat]:
        """The heat of all volumes, without windows in which nothing is warm."""
        for index, volume in enumerate(self.volumes):
            for first in range(0, volume.chunks.count, HEAT_WINDOW):
                limit = min(first + HEAT_WINDOW, volume.chunks.count)
                reads = self._read_ranks(index, first, limit).tobytes()
                writes = self._write_ranks(index, first, limit).tobytes()
                if any(reads) or any(writes):
                    yield Heat(volume=index, first=first, reads=reads, writes=writes)

    def _write_ranks(self, volume: int, first: int, limit: int) -> Ranks:
        return quantise(self.volumes[volume].heat.write_heat(first, limit))

    def _read_ranks(self, volume: int, first: int, limit: int) -> Ranks:
        return quantise(self.volumes[volume].heat.read_heat(first, limit))


def _windows(volume: Volume) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """The map in windows of one message."""
    for first in range(0, volume.chunks.count, SET_WINDOW):
        yield first, volume.chunks.view[first : first + SET_WINDOW]


def _zeros(states: npt.NDArray[np.uint8], first: int) -> Indices:
    residency = states & RESIDENCY_MASK
    return np.flatnonzero((residency == Residency.ZERO) | (residency == Residency.ZERO_UNPUNCHED)) + first
