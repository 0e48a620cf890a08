"""The life of a chunk in the eyes of a recorder."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.chunkmap import (
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
    runs_of,
)
from silo.dirtymap import give_back, restore, settle, take_ahead, take_migration, take_sync
from silo.errors import InvariantError
from tests.support.moments import moments


def map_of(*states: int) -> ChunkMap:
    return ChunkMap(bytearray(states), len(states))


DIRTY_PRESENT = Residency.PRESENT | SYNC_DIRTY
DIRTY_ZERO = Residency.ZERO | SYNC_DIRTY


def test_take_sorts_by_residency():
    """Content is frozen, zeros are not; clean chunks and those without local content are left alone."""
    chunks = map_of(
        Residency.PRESENT,
        DIRTY_PRESENT,
        DIRTY_ZERO,
        Residency.ZERO_UNPUNCHED | SYNC_DIRTY,
        Residency.ABSENT_PEER | SYNC_DIRTY,
        Residency.ABSENT_STORE | SYNC_DIRTY | LOCKED,
        DIRTY_PRESENT | MIGRATION_DIRTY,
    )
    present, zero = take_sync(chunks)
    assert present.tolist() == [1, 6]
    assert zero == [(2, 4)]
    assert list(chunks.states) == [
        Residency.PRESENT,
        Residency.PRESENT | SYNC_IN_CUT | FROZEN,
        Residency.ZERO | SYNC_IN_CUT,
        Residency.ZERO_UNPUNCHED | SYNC_IN_CUT,
        Residency.ABSENT_PEER | SYNC_DIRTY,
        Residency.ABSENT_STORE | SYNC_DIRTY | LOCKED,
        Residency.PRESENT | SYNC_IN_CUT | FROZEN | MIGRATION_DIRTY,
    ]


def test_a_failed_write_to_a_chunk_in_the_store_is_forgotten():
    """Nobody holds the chunk, and its newest content is still in the store: nothing is exposed."""
    chunks = map_of(Residency.ABSENT_STORE | SYNC_DIRTY)
    present, zero = take_sync(chunks)
    assert (present.tolist(), zero) == ([], [])
    assert chunks.count_dirty(SYNC_DIRTY | SYNC_IN_CUT) == 0


def test_zero_runs_join_across_windows():
    """A whole zeroed disk is one run, however many windows it has."""
    chunks = ChunkMap(bytearray([DIRTY_ZERO]) * (2 * WINDOW + 9), 2 * WINDOW + 9)
    chunks.states[WINDOW + 3] = Residency.ZERO
    present, zero = take_sync(chunks)
    assert present.tolist() == []
    assert zero == [(0, WINDOW + 3), (WINDOW + 4, 2 * WINDOW + 9)]


def test_two_cuts_at_a_time_are_a_bug():
    """What one cut took must be decided before another one takes."""
    chunks = map_of(DIRTY_PRESENT)
    take_sync(chunks)
    with pytest.raises(InvariantError, match="not decided"):
        take_sync(chunks)


def test_settle_makes_clean_what_was_not_written_again():
    """Only the cut's bit goes; a mark of after the take stays."""
    chunks = map_of(DIRTY_PRESENT, DIRTY_PRESENT, DIRTY_ZERO)
    take_sync(chunks)
    chunks.mark(1, SYNC_DIRTY)
    settle(chunks)
    assert list(chunks.states) == [Residency.PRESENT, DIRTY_PRESENT, Residency.ZERO]
    assert chunks.select_dirty(SYNC_DIRTY).tolist() == [1]


def test_restore_makes_dirty_again():
    """After an abandoned cut the next one takes the same chunks."""
    chunks = map_of(DIRTY_PRESENT, Residency.PRESENT, DIRTY_ZERO)
    before = bytes(chunks.states)
    take_sync(chunks)
    restore(chunks)
    assert bytes(chunks.states) == before
    present, zero = take_sync(chunks)
    assert (present.tolist(), zero) == ([0], [(2, 3)])


def test_migration_takes_and_forgets():
    """What was taken is clean for the migration; the sync recorder sees nothing of it."""
    chunks = map_of(*[Residency.PRESENT] * 4)
    chunks.mark_run(1, 3, MIGRATION_DIRTY | SYNC_DIRTY)
    assert take_migration(chunks).tolist() == [1, 2]
    assert take_migration(chunks).tolist() == []
    assert chunks.select_dirty(SYNC_DIRTY).tolist() == [1, 2]


@given(
    st.lists(
        st.tuples(st.sampled_from("wztcam"), st.integers(0, 2 * WINDOW)),
        max_size=40,
    )
)
def test_no_write_is_ever_clean_before_its_commit(steps):
    """Against the definition: a chunk is clean only when a commit took it after its last write."""
    count = 2 * WINDOW + 1
    chunks = ChunkMap.filled(count, Residency.PRESENT)
    dirty: set[int] = set()
    taken: set[int] | None = None
    migrating: set[int] = set()
    for verb, chunk in steps:
        if verb in "wz":
            chunks.set_residency(chunk, Residency.PRESENT if verb == "w" else Residency.ZERO)
            chunks.mark(chunk, SYNC_DIRTY | MIGRATION_DIRTY)
            dirty.add(chunk)
            migrating.add(chunk)
        elif verb == "t" and taken is None:
            present, zero = take_sync(chunks)
            taken, dirty = dirty, set()
            assert taken == set(present.tolist()) | {c for run in zero for c in range(*run)}
        elif verb == "c" and taken is not None:
            settle(chunks)
            taken = None
        elif verb == "a" and taken is not None:
            restore(chunks)
            dirty, taken = dirty | taken, None
        elif verb == "m":
            assert set(take_migration(chunks).tolist()) == migrating
            migrating = set()
        assert set(chunks.select_dirty(SYNC_DIRTY).tolist()) == dirty
        assert set(chunks.select_dirty(SYNC_IN_CUT).tolist()) == (taken or set())
    assert not np.any(chunks.view & RESIDENCY_MASK < Residency.ZERO)


def test_killed_at_any_moment_no_dirty_chunk_is_clean():
    """Taking a cut and giving it up: whatever is in the map in between, the next process finds the same dirty ones."""
    buffer = bytearray([Residency.PRESENT, DIRTY_PRESENT, DIRTY_ZERO, DIRTY_PRESENT | MIGRATION_DIRTY])
    chunks = ChunkMap(buffer, 4)
    seen = moments(buffer, lambda: take_sync(chunks)) + moments(buffer, lambda: restore(chunks))
    assert len(set(seen)) > 1
    # A store of many bytes may be cut off after any of them.
    torn = [bytes(b[i] for i, b in enumerate(pair)) for pair in itertools.product(set(seen), repeat=4)]
    for moment in [*seen, *torn]:
        states = np.frombuffer(bytearray(moment), dtype=np.uint8)
        after_restart(states)
        assert np.flatnonzero(states & SYNC_DIRTY).tolist() == [1, 2, 3]


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.data())
def test_what_is_given_back_is_dirty_and_nothing_else_changes(states, data):
    """Whatever was taken, ahead or for a cut, by index or in runs."""
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(states) - 1)))), dtype=np.int64)
    by_index, by_run = map_of(*states), map_of(*states)
    give_back(by_index, chosen)
    give_back(by_run, np.empty(0, dtype=np.int64), runs_of(chosen))
    for chunk, before in enumerate(states):
        taken = before & SYNC_IN_CUT and chunk in chosen
        expected = (before | SYNC_DIRTY) & ~SYNC_IN_CUT if taken else before
        assert by_index.states[chunk] & ~FROZEN == expected & ~FROZEN
        assert by_run.states[chunk] & ~FROZEN == expected & ~FROZEN
        assert not taken or by_index.summary[0] & by_run.summary[0] & SYNC_DIRTY


def test_only_dirty_content_that_nobody_holds_is_taken_ahead():
    """The rest waits for the cut."""
    wanted = [DIRTY_PRESENT, DIRTY_PRESENT | MIGRATION_DIRTY, DIRTY_PRESENT | SYNC_IN_CUT]
    others = [Residency.PRESENT, DIRTY_ZERO, DIRTY_PRESENT | LOCKED, Residency.ABSENT_PEER | SYNC_DIRTY]
    chunks = map_of(*wanted, *others)
    assert [take_ahead(chunks, chunk) for chunk in range(7)] == [True] * 3 + [False] * 4
    assert list(chunks.states[3:]) == others
    data, zero = take_sync(chunks)
    assert (data.tolist(), zero) == ([5], [(4, 5)])
    assert chunks.count_dirty(SYNC_IN_CUT) == 5
