"""What a collector may delete: the decisions behind safety rule 17, as functions and one table.

*Dead is for ever.* A key that the newest committed head does not reach, and that is not on its way into the next one,
will never be referred to again by this group: segments are uploaded for the next head only, and under names that are
never used twice. Only somebody who still holds an *older* head may need it: a restore, a fork, a restore point. They
leave records (`silo.sync.pins`), and the two sides meet over one number in the head, the *floor*::

    collector                                     pinner of generation g
    1  see which keys generation d does not reach   1  read head: generation g
    2  raise the floor to d, by compare-and-swap    2  write the record
    3  list the records                             3  read head: if its floor is above g, withdraw, start again
    4  delete what no record reaches                4  use what generation g reaches

When a pinner reads a floor of at most g, the collector had not yet done its step 2 for any d above g; so its step 3
comes after the pinner's step 2 and finds the record. A record may also be made on the authority of another record
instead of the floor: write the new one, then see that the old one is still there.

`Docket` remembers since when keys are known to be dead, so that they can be left alone for a while (*grace*): whoever
reads without a record then has time to notice a newer head.

Pure. A docket belongs to one collector.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping

import attrs

from silo.errors import CorruptionError, InvariantError
from silo.sync.claim import Owner
from silo.sync.head import Head
from silo.sync.layout import parse_segment_key

__all__ = ["Dead", "Docket", "Horizon", "deletable", "floor_for", "keeps"]


@attrs.frozen
class Horizon:
    """Which keys of a group a sweep may judge, as of one instant: those of older epochs, and the owner's own up to the
    last sequence number that is committed."""

    group: str
    owner: Owner
    seq: int
    under_way: frozenset[str] = frozenset()
    """Own keys that are stored, or being stored, for a head to come."""

    def covers(self, key: str) -> bool:
        """Whether it may be judged. What is not the key of a segment of this group is not ours to judge."""
        try:
            name = parse_segment_key(key)
        except CorruptionError:
            return False
        if name.group != self.group or key in self.under_way:
            return False
        if name.epoch != self.owner.epoch:
            return name.epoch < self.owner.epoch
        return name.incarnation == self.owner.incarnation and name.seq <= self.seq


@attrs.frozen
class Dead:
    """A key that no head from some generation on reaches."""

    generation: int
    """The first generation that was seen not to reach it."""
    since: float
    """`Clock.monotonic` when that was seen."""
    size: int = 0


class Docket:
    """The keys that are known to be dead and are still there."""

    def __init__(self) -> None:
        self.dead: dict[str, Dead] = {}

    def judge(
        self, listed: Mapping[str, int], live: Container[str], horizon: Horizon, generation: int, now: float
    ) -> None:
        """Take note of one look: what the store has (with sizes), and what ``generation`` reaches (or more).

        ``horizon`` is from before both looks. `InvariantError` when something dead is alive again: then nothing at
        all may be deleted any more.
        """
        for key in self.dead:
            if key in live:
                raise InvariantError(f"{key} was dead and is referred to again")
        self.dead = {
            key: self.dead.get(key) or Dead(generation, now, size)
            for key, size in listed.items()
            if key not in live and horizon.covers(key)
        }

    def ripe(self, now: float, grace_s: float) -> dict[str, Dead]:
        """Those that have been dead for long enough."""
        return {key: dead for key, dead in self.dead.items() if now - dead.since >= grace_s}

    def gone(self, keys: Iterable[str]) -> None:
        """These were deleted."""
        for key in keys:
            self.dead.pop(key, None)


def floor_for(ripe: Mapping[str, Dead]) -> int:
    """The floor that must be committed before any of these is deleted; 0 when there is none."""
    return max((dead.generation for dead in ripe.values()), default=0)


def deletable(ripe: Mapping[str, Dead], committed_floor: int, pinned: Collection[str]) -> list[str]:
    """What may be deleted, when ``pinned`` is what is reached by the records that were listed *after* a head with
    this floor had been committed."""
    return [key for key, dead in ripe.items() if dead.generation <= committed_floor and key not in pinned]


def keeps(record: Head, head: Head | None) -> bool:
    """Whether a record holds, by the head that was read *after* it was written. If not, it must be withdrawn."""
    return (
        head is not None
        and head.gc_floor <= record.generation <= head.generation
        and head.epoch >= record.epoch
    )
