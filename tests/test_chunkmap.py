"""One byte per chunk, its summary, and what both cost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.chunkmap import (
    DIRTY_BITS,
    FROZEN,
    LOCKED,
    MIGRATION_DIRTY,
    RESIDENCY_MASK,
    SYNC_DIRTY,
    SYNC_IN_CUT,
    WINDOW,
    ChunkMap,
    Residency,
    after_restart,
    indices_of,
    join_indices,
    runs_of,
)
from silo.errors import InvalidRequestError
from tests.support.moments import moments

RESIDENCIES = list(Residency)
SOME = 3 * WINDOW + 5
"""A map with several windows, the last one short."""


def test_the_bits_share_a_byte_without_overlap():
    """Residency, lock, freeze and the dirty bits fill the byte exactly."""
    assert RESIDENCY_MASK + LOCKED + FROZEN + SYNC_DIRTY + SYNC_IN_CUT + MIGRATION_DIRTY == 0xFF
    assert DIRTY_BITS == SYNC_DIRTY | SYNC_IN_CUT | MIGRATION_DIRTY
    assert max(Residency) <= RESIDENCY_MASK


def test_known_locally_begins_at_zero():
    """Comparing with ZERO tells the absent from the known residencies."""
    assert [r.name for r in RESIDENCIES if r < Residency.ZERO] == ["ABSENT_STORE", "ABSENT_PEER"]


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_filled_map_is_clean(residency):
    """Every chunk has the residency asked for, and no other bit."""
    chunks = ChunkMap.filled(10, residency)
    assert set(chunks.states) == {residency}
    assert chunks.residency(9) is residency
    assert not any(chunks.summary)


def test_the_buffer_is_used_in_place():
    """Whoever gave the memory sees every change: it may be a shared mapping."""
    buffer = bytearray(8)
    chunks = ChunkMap(memoryview(buffer), 8)
    chunks.mark(3, SYNC_DIRTY)
    chunks.set_residency_run(6, 8, Residency.PRESENT)
    assert buffer == bytes([0, 0, 0, SYNC_DIRTY, 0, 0, 4, 4])


@pytest.mark.parametrize("length", [7, 9])
def test_a_buffer_of_another_size_is_refused(length):
    """One byte per chunk, no more and no less."""
    with pytest.raises(InvalidRequestError, match="8 chunks need 8 bytes"):
        ChunkMap(bytearray(length), 8)


def test_a_new_map_summarises_what_it_finds():
    """Dirty bits that a dead process left are found through the summary."""
    buffer = bytearray(SOME)
    buffer[WINDOW + 7] = SYNC_DIRTY | Residency.PRESENT
    buffer[SOME - 1] = MIGRATION_DIRTY
    chunks = ChunkMap(buffer, SOME)
    assert list(chunks.summary) == [0, SYNC_DIRTY, 0, MIGRATION_DIRTY]
    assert chunks.select_dirty(SYNC_DIRTY).tolist() == [WINDOW + 7]


def test_residency_leaves_the_other_bits_alone():
    """Single chunks and runs change bits 0 to 2 and nothing else."""
    chunks = ChunkMap(bytearray([0xF8 | Residency.PRESENT] * 6), 6)
    chunks.set_residency(0, Residency.ABSENT_PEER)
    chunks.set_residency_run(2, 4, Residency.ZERO)
    assert [chunks.residency(chunk) for chunk in range(6)] == [1, 4, 2, 2, 4, 4]
    assert all(state & 0xF8 == 0xF8 for state in chunks.states)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["mark", "run", "many", "clear"]),
            st.integers(0, SOME - 1),
            st.integers(0, SOME - 1),
            st.sampled_from([SYNC_DIRTY, SYNC_IN_CUT, MIGRATION_DIRTY, SYNC_DIRTY | MIGRATION_DIRTY]),
        ),
        max_size=20,
    )
)
def test_marks_are_found_again(steps):
    """However chunks are marked and cleared, select and count agree with a set per bit."""
    chunks = ChunkMap.filled(SOME, Residency.PRESENT)
    model = np.zeros(SOME, dtype=np.uint8)
    for verb, one, other, bits in steps:
        first, limit = min(one, other), max(one, other) + 1
        many = np.unique(np.array([one, other, (one + other) // 2]))
        if verb == "mark":
            chunks.mark(one, bits)
            model[one] |= bits
        elif verb == "run":
            chunks.mark_run(first, limit, bits)
            model[first:limit] |= bits
        elif verb == "many":
            chunks.mark_many(many, bits)
            model[many] |= bits
        else:
            chunks.clear_many(many, bits)
            model[many] &= 0xFF & ~bits
        for wanted in (SYNC_DIRTY, SYNC_IN_CUT, MIGRATION_DIRTY, DIRTY_BITS):
            assert np.array_equal(chunks.select_dirty(wanted), np.flatnonzero(model & wanted))
            assert chunks.count_dirty(wanted) == np.count_nonzero(model & wanted)


def test_looking_for_dirty_chunks_costs_what_is_dirty():
    """Two dirty chunks among sixteen million: two windows are looked at, and none after they were cleared."""
    chunks = ChunkMap.filled(1 << 24, Residency.PRESENT)
    chunks.mark(5, SYNC_DIRTY)
    chunks.mark(1 << 23, SYNC_DIRTY | MIGRATION_DIRTY)
    assert [first for first, _ in chunks.dirty_windows(SYNC_DIRTY)] == [0, 1 << 23]
    chunks.clear_many(chunks.select_dirty(SYNC_DIRTY), SYNC_DIRTY)
    assert list(chunks.dirty_windows(SYNC_DIRTY)) == []
    assert sum(bool(bits) for bits in chunks.summary) == 1, "the other recorder's bit stays"


def test_select_by_mask_within_a_run():
    """Any bits can be compared, in the whole map or in a part of it."""
    chunks = ChunkMap(bytearray([4, 4 | LOCKED, 2, 4 | LOCKED, 0]), 5)
    assert chunks.select(LOCKED, LOCKED).tolist() == [1, 3]
    assert chunks.select(LOCKED, LOCKED, 2, 5).tolist() == [3]
    assert chunks.select(RESIDENCY_MASK, Residency.ZERO).tolist() == [2]
    assert chunks.select(RESIDENCY_MASK, Residency.ZERO, 3).tolist() == []


def test_windows_with_a_state():
    """Where in a large map something occurs."""
    chunks = ChunkMap.filled(SOME, Residency.PRESENT)
    chunks.set_residency(WINDOW, Residency.ZERO_UNPUNCHED)
    chunks.set_residency(SOME - 1, Residency.ZERO_UNPUNCHED)
    assert chunks.windows_with(RESIDENCY_MASK, Residency.ZERO_UNPUNCHED) == [1, 3]


@given(st.binary(min_size=1, max_size=50))
def test_residencies_are_counted_and_run_together(raw):
    """Counts and runs agree with looking at every chunk."""
    states = bytearray(byte % 5 | byte & 0xF8 for byte in raw)
    chunks = ChunkMap(states, len(states))
    each = [chunks.residency(chunk) for chunk in range(len(states))]
    assert chunks.count_residency() == {residency: each.count(residency) for residency in Residency}
    runs = chunks.residency_runs(0, len(states))
    assert [r for first, limit, r in runs for _ in range(first, limit)] == each
    assert all(before[2] != after[2] for before, after in pairwise(runs))


def test_runs_of_a_part_keep_their_indices():
    """Runs are clipped to what was asked; nothing asked is no run."""
    chunks = ChunkMap(bytearray([4, 4, 2, 2, 4]), 5)
    assert chunks.residency_runs(1, 4) == [(1, 2, Residency.PRESENT), (2, 4, Residency.ZERO)]
    assert chunks.residency_runs(3, 3) == []


@given(st.sets(st.integers(0, 60)))
def test_runs_and_indices_are_inverse(members):
    """Runs are maximal and ascending, and lead back to the indices."""
    indices = np.array(sorted(members), dtype=np.int64)
    runs = runs_of(indices)
    assert indices_of(runs).tolist() == sorted(members)
    assert all(before[1] < after[0] for before, after in pairwise(runs))


def test_no_indices_are_still_indices():
    """The type of an empty result is right, too."""
    assert indices_of([]).dtype == join_indices([]).dtype == np.int64
    assert ChunkMap.filled(3, Residency.ZERO).select_dirty(SYNC_DIRTY).dtype == np.int64


def test_dirty_chunks_of_one_kind():
    """The summary leads to the windows, the mask chooses in them."""
    chunks = ChunkMap.filled(SOME, Residency.PRESENT)
    chunks.mark_many(np.array([1, 2, WINDOW, SOME - 1]), SYNC_DIRTY)
    chunks.set_residency(2, Residency.ZERO)
    assert chunks.select_dirty(SYNC_DIRTY, RESIDENCY_MASK, Residency.PRESENT).tolist() == [
        1,
        WINDOW,
        SOME - 1,
    ]
    assert chunks.select_dirty(SYNC_DIRTY, RESIDENCY_MASK, Residency.ZERO).tolist() == [2]


@pytest.mark.parametrize(
    ("left", "after"),
    [
        (Residency.PRESENT | LOCKED | FROZEN, Residency.PRESENT),
        (Residency.PRESENT | SYNC_IN_CUT, Residency.PRESENT | SYNC_DIRTY),
        (Residency.PRESENT | SYNC_IN_CUT | SYNC_DIRTY | FROZEN, Residency.PRESENT | SYNC_DIRTY),
        (Residency.PRESENT | MIGRATION_DIRTY, Residency.PRESENT | MIGRATION_DIRTY),
        (Residency.ABSENT_PEER | LOCKED | SYNC_DIRTY, Residency.ABSENT_PEER | SYNC_DIRTY),
        (Residency.ZERO, Residency.ZERO),
        (Residency.ZERO | LOCKED, Residency.ZERO_UNPUNCHED),
        (Residency.ZERO | SYNC_DIRTY, Residency.ZERO_UNPUNCHED | SYNC_DIRTY),
        (Residency.ZERO | SYNC_IN_CUT | LOCKED, Residency.ZERO_UNPUNCHED | SYNC_DIRTY),
        (Residency.ZERO_UNPUNCHED | LOCKED, Residency.ZERO_UNPUNCHED),
    ],
)
def test_what_a_dead_process_left(left, after):
    """Nothing is in transition or frozen, in-cut is dirty, and a ZERO chunk that was being written is not trusted."""
    states = np.array([left], dtype=np.uint8)
    after_restart(states)
    assert states[0] == after


@given(st.binary(min_size=1, max_size=64))
def test_restarting_twice_is_restarting_once(raw):
    """A process that dies right after its start changes nothing for the next one."""
    states = np.frombuffer(bytearray(byte % 5 | byte & 0xF8 for byte in raw), dtype=np.uint8)
    after_restart(states)
    once = states.copy()
    after_restart(states)
    assert np.array_equal(states, once)


def test_a_residency_changes_in_one_store():
    """Killed at any moment, each chunk of a run is what it was or what it shall be."""
    old = bytes([Residency.PRESENT | SYNC_DIRTY, Residency.ZERO_UNPUNCHED, Residency.PRESENT])
    new = bytes([Residency.PRESENT | SYNC_DIRTY, Residency.PRESENT, Residency.PRESENT])
    buffer = bytearray(old)
    chunks = ChunkMap(buffer, 3)
    seen = moments(buffer, lambda: chunks.set_residency_run(0, 3, Residency.PRESENT))
    assert (seen[0], seen[-1]) == (old, new)
    assert set(seen) == {old, new}


def test_dying_again_while_the_map_is_made_meaningful_loses_nothing():
    """Wherever the second process is killed, the third one finds what the second would have found."""
    left = bytes(residency | bits for residency in Residency for bits in range(0, 256, 8))
    whole = bytearray(left)
    seen = moments(whole, lambda: after_restart(np.frombuffer(whole, dtype=np.uint8)))
    assert len(set(seen)) > 3
    for moment in set(seen):
        states = np.frombuffer(bytearray(moment), dtype=np.uint8)
        after_restart(states)
        assert bytes(states) == bytes(whole)
