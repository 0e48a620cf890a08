"""Which automatic restore points are made, and which are kept: a policy and two functions. Pure.

A point is kept as long as one of the rules wants it: the ``last`` so many, the newest one of each of the last
``hourly`` hours that have any, and of each of the last ``daily`` days (UTC). Points with a label were made by somebody
for a reason; they are kept until somebody deletes them.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from silo.errors import InvalidRequestError

__all__ = ["PointInfo", "RetentionPolicy", "is_point_due", "points_to_drop"]

HOUR_S = 3600
DAY_S = 24 * HOUR_S


@attrs.frozen(kw_only=True)
class RetentionPolicy:
    """``every_s`` is the time between two automatic points; 0 makes none, and then none is deleted either."""

    every_s: float = 0.0
    last: int = 0
    hourly: int = 24
    daily: int = 7

    def __attrs_post_init__(self) -> None:
        if self.every_s < 0 or min(self.last, self.hourly, self.daily) < 0:
            raise InvalidRequestError("numbers of the retention policy must not be negative")
        if self.every_s and not (self.last or self.hourly or self.daily):
            raise InvalidRequestError(
                "a policy that makes points must keep some", hint="set last, hourly or daily"
            )


@attrs.frozen
class PointInfo:
    """What the policy must know of a point."""

    generation: int
    cut_time: float
    """POSIX seconds of the instant that it shows."""
    label: str = ""


def is_point_due(
    points: Iterable[PointInfo], policy: RetentionPolicy, generation: int, cut_time: float
) -> bool:
    """Whether the newest generation, as of ``cut_time``, should become a point."""
    if not policy.every_s or not generation:
        return False
    made = [point for point in points if not point.label]
    if any(point.generation == generation for point in points):
        return False
    return all(cut_time - point.cut_time >= policy.every_s for point in made)


def points_to_drop(points: Iterable[PointInfo], policy: RetentionPolicy) -> list[int]:
    """The generations whose points no rule wants any more."""
    if not policy.every_s:
        return []
    made = sorted(
        (point for point in points if not point.label), key=lambda point: point.generation, reverse=True
    )
    wanted = {point.generation for point in made[: policy.last]}
    for size, count in ((HOUR_S, policy.hourly), (DAY_S, policy.daily)):
        newest: dict[int, int] = {}
        for point in made:
            newest.setdefault(int(point.cut_time // size), point.generation)
        wanted |= set(list(newest.values())[:count])
    return sorted(point.generation for point in made if point.generation not in wanted)
