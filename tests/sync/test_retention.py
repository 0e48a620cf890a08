"""The retention policy: which points are made, which go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import InvalidRequestError
from silo.sync.retention import DAY_S, HOUR_S, PointInfo, RetentionPolicy, is_point_due, points_to_drop

QUARTERLY = RetentionPolicy(every_s=900, last=4, hourly=3, daily=2)


def series(count: int, step_s: float = 900.0) -> list[PointInfo]:
    """Points every so often, from the start of a day on."""
    return [PointInfo(number + 1, 10 * DAY_S + number * step_s) for number in range(count)]


def test_the_last_the_hourly_and_the_daily_are_kept() -> None:
    """Two days of points each quarter of an hour."""
    points = series(2 * 96)
    kept = {point.generation for point in points} - set(points_to_drop(points, QUARTERLY))
    last = {189, 190, 191, 192}
    hourly = {192, 188, 184}
    daily = {192, 96}
    assert kept == last | hourly | daily


def test_a_label_keeps_a_point() -> None:
    """Whatever the policy says, and it does not count as one of the automatic ones."""
    points = [*series(100), PointInfo(1000, 11 * DAY_S, "golden")]
    dropped = points_to_drop(points, RetentionPolicy(every_s=900, last=1, hourly=0, daily=0))
    assert dropped == list(range(1, 100))


def test_when_a_point_is_due() -> None:
    """When the newest generation is not one, and the newest automatic one is old enough."""
    points = series(1)
    start = points[0].cut_time
    assert not is_point_due(points, QUARTERLY, 2, start + 899)
    assert is_point_due(points, QUARTERLY, 2, start + 900)
    assert not is_point_due(points, QUARTERLY, 1, start + 900)
    assert not is_point_due([], QUARTERLY, 0, start)
    assert is_point_due([PointInfo(5, start, "golden")], QUARTERLY, 6, start + 1)
    assert not is_point_due(points, RetentionPolicy(), 2, start + DAY_S)


@given(
    st.lists(st.floats(0, 40 * DAY_S), max_size=60),
    st.integers(0, 5),
    st.integers(0, 30),
    st.integers(0, 10),
)
def test_what_is_kept_is_enough(times: list[float], last: int, hourly: int, daily: int) -> None:
    """As many as each rule asks for, as far as there are any; dropping again drops nothing."""
    policy = RetentionPolicy(every_s=1, last=last + 1, hourly=hourly, daily=daily)
    points = [PointInfo(number + 1, time) for number, time in enumerate(sorted(times))]
    dropped = set(points_to_drop(points, policy))
    kept = [point for point in points if point.generation not in dropped]
    assert len(kept) >= min(len(points), last + 1)
    for size, count in ((HOUR_S, hourly), (DAY_S, daily)):
        there = {point.cut_time // size for point in points}
        assert len({point.cut_time // size for point in kept}) >= min(len(there), count)
    assert points_to_drop(kept, policy) == []


def test_a_policy_that_keeps_nothing_is_refused() -> None:
    """It would make points for nothing."""
    with pytest.raises(InvalidRequestError):
        RetentionPolicy(every_s=10, last=0, hourly=0, daily=0)
    with pytest.raises(InvalidRequestError):
        RetentionPolicy(last=-1)
