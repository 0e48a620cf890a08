"""What the syncer decides: order, batches, window, rate, pace, checkpoints."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from silo.sync.planner import (
    LEVELS,
    DrainRate,
    Pace,
    TokenBucket,
    UploadWindow,
    batches,
    checkpoint_due,
    coldest_first,
    guest_limit,
    hottest_left,
    is_worth_a_pass,
    levels_of,
)

heats = st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=200)


@given(heats, st.data())
def test_every_chunk_comes_once_and_cold_ones_come_first(values: list[float], data: st.DataObject) -> None:
    """Within a factor of two the order of the indices is kept."""
    heat = np.array(values, dtype=np.float32)
    dirty = data.draw(st.lists(st.sampled_from(range(len(values))), unique=True)) if values else []
    chunks = np.array(sorted(dirty), dtype=np.int64)
    ordered = [chunk for part in coldest_first(chunks, heat) for chunk in part.tolist()]
    assert sorted(ordered) == chunks.tolist()
    for first, second in pairwise(ordered):
        assert heat[first] < 2 or heat[second] > heat[first] / 2
        if heat[first] == heat[second]:
            assert first < second


def test_heat_that_changes_meanwhile_loses_no_chunk() -> None:
    """The guest goes on writing while its chunks are being taken."""
    heat = np.array([8, 4, 2, 1, 0, 0, 1, 2, 4, 8], dtype=np.float32)
    ordered: list[int] = []
    for part in coldest_first(np.arange(10), heat):
        ordered += part.tolist()
        heat[:] = 16 - heat
    assert ordered == [4, 5, 3, 6, 2, 7, 1, 8, 0, 9]


def test_a_uniform_disk_is_stored_in_its_own_order() -> None:
    chunks = np.arange(200_000, dtype=np.int64)
    parts = list(coldest_first(chunks, np.zeros(200_000, dtype=np.float32)))
    assert all(len(part) <= 65536 for part in parts)
    assert np.array_equal(np.concatenate(parts), chunks)


@given(st.lists(st.integers(0, 40), max_size=10), st.integers(1, 20))
def test_batches_keep_the_order_and_are_full(lengths: list[int], size: int) -> None:
    arrays = [np.arange(sum(lengths[:n]), sum(lengths[: n + 1]), dtype=np.int64) for n in range(len(lengths))]
    found = list(batches(iter(arrays), size))
    assert [chunk for batch in found for chunk in batch] == list(range(sum(lengths)))
    assert all(len(batch) == size for batch in found[:-1])
    assert all(found)


def test_the_window_grows_slowly_and_shrinks_fast() -> None:
    window = UploadWindow(least=10, most=50)
    assert window.limit == 20
    for _ in range(2):
        window.succeeded(10)
    assert window.limit == 30
    for _ in range(100):
        window.succeeded(10)
    assert window.limit == 50
    window.failed()
    assert window.limit == 25
    for _ in range(10):
        window.failed()
    assert window.limit == 10


def test_the_window_admits_what_fits_and_always_one() -> None:
    window = UploadWindow(least=10, most=50)
    assert window.fits(1000)
    window.enter(15)
    assert window.fits(5)
    assert not window.fits(6)
    window.leave(15)
    assert window.fits(1000)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 5000)), min_size=1, max_size=50))
def test_the_rate_is_kept_over_any_time(transfers: list[tuple[float, int]]) -> None:
    """From the first byte on, no more was sent than the rate allows for the time plus one burst, and one transfer."""
    bucket = TokenBucket(1000.0)
    now, sent = 100.0, 0
    for pause, size in transfers:
        now += pause
        start = now + bucket.delay(now, size)
        assert sent <= 1000.0 * (start - 100.0 + TokenBucket.BURST_S) + 1e-6
        sent += size
        now = start


def test_without_a_rate_nothing_waits() -> None:
    assert TokenBucket(None).delay(5.0, 1 << 40) == 0.0


def test_the_pace_leaves_time_for_the_commit() -> None:
    """The slower the store, the earlier the next cut; never without a pause at all."""
    pace = Pace(10.0)
    assert pace.next_cut(100.0) == 110.0
    pace.took(2.0)
    assert pace.next_cut(100.0) == 107.5
    pace.took(100.0)
    assert pace.next_cut(100.0) == 101.0
    for _ in range(100):
        pace.took(0.0)
    assert pace.next_cut(100.0) == pytest.approx(110.0, abs=0.01)


@pytest.mark.parametrize(
    ("segments", "page_bytes", "stored_bytes", "due"),
    [
        (0, 0, 0, False),
        (63, 1, 1_000_000, False),
        (64, 1_000, 50_000, True),
        (64, 1_001, 50_000, False),
        (255, 1_000_000, 1, False),
        (256, 1_000_000, 1, True),
    ],
)
def test_a_checkpoint_is_cheap_or_overdue(
    segments: int, page_bytes: int, stored_bytes: int, due: bool
) -> None:
    assert (
        checkpoint_due(segments=segments, soft_limit=64, page_bytes=page_bytes, stored_bytes=stored_bytes)
        is due
    )


@given(st.lists(st.integers(0, 1000), min_size=LEVELS, max_size=LEVELS), st.integers(0, 10_000))
def test_what_is_left_for_the_cut_is_the_hottest_that_fits(sizes: list[int], keep: int) -> None:
    """One level further down would be too much, unless everything is left."""
    warmest = hottest_left(np.array(sizes, dtype=np.int64), keep)
    assert sum(sizes[warmest + 1 :]) <= keep
    assert warmest == 0 or sum(sizes[warmest:]) > keep


def test_levels_are_powers_of_two() -> None:
    heat = np.array([0, 0.5, 0.99, 1, 1.9, 2, 3.9, 4, 3e38], dtype=np.float32)
    assert levels_of(heat).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, LEVELS - 1]


def test_a_pass_ahead_of_the_cut_must_help() -> None:
    """Only when the cut would be too large, and only as long as each pass leaves clearly less than the one before."""
    assert not is_worth_a_pass(100, float("inf"), 100)
    assert is_worth_a_pass(101, float("inf"), 100)
    assert is_worth_a_pass(700, 1000, 100)
    assert not is_worth_a_pass(701, 1000, 100)


def test_the_first_sync_does_not_set_the_pace_for_long() -> None:
    """What took longer than the target once says nothing about the next cuts."""
    pace = Pace(10.0)
    pace.took(10_000.0)
    cuts = 0
    while pace.next_cut(0.0) < 5.0:
        pace.took(0.1)
        cuts += 1
    assert cuts < 6


MIB = 1 << 20


def test_a_store_that_becomes_slow_gets_less_at_once() -> None:
    """Several times the best pace halves the window; the pace of a link that is only shared does not."""
    window = UploadWindow(32 * MIB, 256 * MIB)
    for _ in range(30):
        window.succeeded(32 * MIB, 1.0)
    assert window.limit == 256 * MIB
    for _ in range(30):
        window.succeeded(32 * MIB, 3.0)
    assert window.limit == 256 * MIB
    for _ in range(8):
        window.succeeded(32 * MIB, 20.0)
    assert window.limit == 128 * MIB
    for _ in range(30):
        window.succeeded(32 * MIB, 20.0)
    assert window.limit == 32 * MIB
    for _ in range(200):
        window.succeeded(32 * MIB, 20.0)
    assert window.limit == 256 * MIB, "by now that is what the link is"


def test_small_uploads_say_nothing_about_the_pace() -> None:
    """An index of a few bytes takes a round trip."""
    window = UploadWindow(32 * MIB, 64 * MIB)
    window.succeeded(32 * MIB, 1.0)
    for _ in range(1000):
        window.succeeded(1000, 1.0)
    assert window.limit == 64 * MIB


def test_the_drain_rate_is_learned_from_large_cuts() -> None:
    """Small ones measure round trips; a slow one lowers it gradually."""
    drain = DrainRate()
    drain.took(100_000, 1.0)
    assert drain.rate_bps is None
    drain.took(100 * MIB, 2.0)
    assert drain.rate_bps == 50 * MIB
    drain.took(100 * MIB, 200.0)
    assert drain.rate_bps == 40 * MIB
    drain.took(100 * MIB, 1.0)
    assert drain.rate_bps == 100 * MIB


@given(st.integers(0, 10**12), st.floats(1.0, 1e10), st.floats(0.1, 600.0))
def test_a_guest_is_slowed_only_when_half_the_room_is_used(
    exposed: int, rate_bps: float, rpo_s: float
) -> None:
    """Never above what the store takes then, and never below a tenth of it; the more is exposed, the slower."""
    limit = guest_limit(exposed=exposed, rate_bps=rate_bps, rpo_s=rpo_s)
    assert (limit is None) == (exposed <= rate_bps * rpo_s / 2)
    if limit is not None:
        assert 0.1 * rate_bps <= limit <= rate_bps
        more = guest_limit(exposed=exposed + 1000, rate_bps=rate_bps, rpo_s=rpo_s)
        assert more is not None
        assert more <= limit
    assert guest_limit(exposed=exposed, rate_bps=None, rpo_s=rpo_s) is None
