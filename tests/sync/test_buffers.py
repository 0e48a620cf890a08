"""Memory that is used again: never while somebody may still read it."""

from __future__ import annotations

import random

import pytest

from silo.sync.buffers import IDLE_MAX, BufferPool, joined
from tests.support.seeds import seeds

SIZE = 16 * 4096


def test_a_buffer_comes_back_with_its_last_user() -> None:
    pool = BufferPool(SIZE)
    lease = pool.take(10)
    lease.view[:5] = b"bytes"
    lease.hold()
    lease.drop()
    other = pool.take(10)
    assert bytes(other.view[:5]) == bytes(5), "the first one is still in use"
    lease.drop()
    assert bytes(pool.take(10).view[:5]) == b"bytes"


def test_a_buffer_that_is_too_small_is_not_given() -> None:
    pool = BufferPool(SIZE)
    large = pool.take(SIZE + 1)
    assert len(large.view) == SIZE + 1
    large.drop()
    assert len(pool.take(SIZE).view) == SIZE


def test_little_is_kept_between_two_cuts() -> None:
    pool = BufferPool(SIZE)
    leases = [pool.take(1) for _ in range(IDLE_MAX + 3)]
    for number, lease in enumerate(leases):
        lease.view[0] = number + 1
        lease.drop()
    pool.trim()
    used_before = [pool.take(1).view[0] != 0 for _ in leases]
    assert used_before.count(True) == IDLE_MAX


@pytest.mark.parametrize("seed", seeds(20))
def test_neighbours_are_joined_and_nothing_else(seed: int) -> None:
    """Whatever the pieces: the same bytes, and no two buffers left that could be one."""
    chance = random.Random(seed)
    pool = BufferPool(SIZE)
    memories = [pool.take(SIZE).view for _ in range(2)]
    pieces: list[bytes | memoryview] = []
    seams = 0
    for _ in range(chance.randrange(1, 12)):
        view = chance.choice(memories)
        low, middle, high = sorted(chance.sample(range(SIZE), 3))
        pieces += [view[low:middle], view[middle:high], b"between"]
        seams += 1
    for memory in memories:
        memory[:] = chance.randbytes(SIZE)
    made = joined(pieces)
    assert b"".join(made) == b"".join(pieces)
    assert len(made) == len(pieces) - seams
