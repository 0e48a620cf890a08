"""Which segments to give up so that the store does not fill with what is no longer needed. Pure.

A segment is deleted when nothing of it is needed. Under random overwriting that takes for ever: a few chunks of each
stay. So the live chunks of the emptiest segments are stored again, with the next cut, and the segment dies. That
costs traffic, so it is done only as far as space demands: while the segments occupy more than ``SPACE_TARGET`` times
what is live in them, those with the smallest live part go first. Together with what dies between two passes that keeps
the store below 1.5 times what is live. For uniform overwriting, the worst case, about 0.8 bytes are then rewritten for
each byte that the guest writes; every other pattern costs less.

Segments that a record keeps are left alone: rewriting their chunks would free nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

__all__ = ["SPACE_TARGET", "Filling", "choose_segments"]

SPACE_TARGET = 1.3

LIVE_PART_MAX = 0.9
"""A segment that is fuller is never worth its traffic."""

GAIN_MIN = 1024
"""Names and footer of a segment; rewriting one that has no more to give would go on for ever."""


@attrs.frozen
class Filling:
    """One segment: bytes of the object, and of what in it the newest generation still refers to."""

    size: int
    live: int


def choose_segments(
    fillings: Mapping[str, Filling], *, budget: int, target: float = SPACE_TARGET
) -> list[str]:
    """The keys of the segments whose live chunks should be stored again, at most ``budget`` bytes of them.

    Segments of which nothing is live count as freed already.
    """
    worn = {key: filling for key, filling in fillings.items() if 0 < filling.live < filling.size - GAIN_MIN}
    size = sum(filling.size for filling in fillings.values() if filling.live)
    live = sum(filling.live for filling in fillings.values())
    chosen: list[str] = []
    for key, filling in sorted(worn.items(), key=lambda item: item[1].live / item[1].size):
        if size <= target * live or filling.live > LIVE_PART_MAX * filling.size or filling.live > budget:
            break
        chosen.append(key)
        budget -= filling.live
        size -= filling.size - filling.live
    return chosen
