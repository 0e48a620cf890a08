"""What BLOCK_STATUS says of a volume, context by context."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.chunkmap import MIGRATION_DIRTY, SYNC_DIRTY, SYNC_IN_CUT, Residency
from silo.devices.memory import MemoryDevice
from silo.exports import nbd_contexts
from silo.exports.nbd_contexts import CONTEXT_NAMES, status_extents
from silo.volume import Volume
from tests.support.volumes import CHUNK, make_volume


def volume_of(*residencies: Residency) -> Volume:
    """A volume with one chunk in each residency, in order."""
    _, volume = make_volume(MemoryDevice(len(residencies) * CHUNK))
    for chunk, residency in enumerate(residencies):
        volume.chunks.set_residency(chunk, residency)
    return volume


ALL = (
    Residency.PRESENT,
    Residency.ZERO,
    Residency.ZERO_UNPUNCHED,
    Residency.ABSENT_PEER,
    Residency.ABSENT_STORE,
    Residency.PRESENT,
)


async def test_allocation_tells_holes_that_read_as_zeros():
    """Zero chunks are holes and zero; of absent ones nothing is claimed; equal neighbours are joined."""
    extents = status_extents(volume_of(*ALL), "base:allocation", 0, 6 * CHUNK, single=False)
    assert extents == [(CHUNK, 0), (2 * CHUNK, 3), (3 * CHUNK, 0)]


async def test_residency_tells_where_the_content_is():
    """Zeros, local, at the peer, in the store."""
    extents = status_extents(volume_of(*ALL), "silo:residency", 0, 6 * CHUNK, single=False)
    assert extents == [(CHUNK, 1), (2 * CHUNK, 0), (CHUNK, 2), (CHUNK, 3), (CHUNK, 1)]


async def test_dirty_bitmaps_tell_what_each_recorder_saw():
    """For sync also what was taken for a cut whose commit is not known."""
    volume = volume_of(*[Residency.PRESENT] * 4)
    volume.chunks.mark(1, SYNC_DIRTY)
    volume.chunks.mark(2, SYNC_IN_CUT)
    volume.chunks.mark(3, MIGRATION_DIRTY)
    sync = status_extents(volume, "qemu:dirty-bitmap:sync", 0, 4 * CHUNK, single=False)
    migration = status_extents(volume, "qemu:dirty-bitmap:migration", 0, 4 * CHUNK, single=False)
    assert sync == [(CHUNK, 0), (2 * CHUNK, 1), (CHUNK, 0)]
    assert migration == [(3 * CHUNK, 0), (CHUNK, 1)]


async def test_heat_counts_in_powers_of_two():
    """``n`` stands for at least ``2**(n-1)`` requests, reads below writes."""
    volume = volume_of(*[Residency.PRESENT] * 3)
    for _ in range(5):
        volume.read_nowait(CHUNK, 512)
    volume.write_nowait(2 * CHUNK, b"x")
    assert status_extents(volume, "silo:heat", 0, 3 * CHUNK, single=False) == [
        (CHUNK, 0),
        (CHUNK, 3),
        (CHUNK, 1 << 8),
    ]


async def test_extents_keep_to_the_request():
    """They begin where the request does, end where it does, and a single one stops at the first change."""
    volume = volume_of(*ALL)
    assert status_extents(volume, "base:allocation", 100, CHUNK, single=False) == [(CHUNK - 100, 0), (100, 3)]
    assert status_extents(volume, "base:allocation", 100, CHUNK, single=True) == [(CHUNK - 100, 0)]
    assert status_extents(volume, "base:allocation", CHUNK + 5, 10, single=True) == [(10, 3)]


async def test_a_short_last_chunk_ends_with_the_volume():
    """The last extent does not reach beyond the end."""
    _, volume = make_volume(MemoryDevice(CHUNK + 512))
    assert status_extents(volume, "base:allocation", 0, CHUNK + 512, single=False) == [(CHUNK + 512, 0)]


async def test_one_request_has_bounded_cost(monkeypatch: pytest.MonkeyPatch):
    """An answer ends early rather than scanning or sending without limit."""
    volume = volume_of(*[Residency.PRESENT, Residency.ZERO] * 8)
    monkeypatch.setattr(nbd_contexts, "WINDOW_CHUNKS", 5)
    assert (
        sum(n for n, _ in status_extents(volume, "base:allocation", 0, 16 * CHUNK, single=False)) == 5 * CHUNK
    )
    monkeypatch.setattr(nbd_contexts, "EXTENTS_MAX", 3)
    assert status_extents(volume, "base:allocation", 0, 16 * CHUNK, single=False) == [
        (CHUNK, 0),
        (CHUNK, 3),
        (CHUNK, 0),
    ]


@given(st.lists(st.sampled_from(list(Residency)), min_size=1, max_size=12), st.data())
async def test_any_request_is_answered_in_full(residencies: list[Residency], data: st.DataObject):
    """Extents are not empty, differ from their neighbours, and add up to the request."""
    volume = volume_of(*residencies)
    size = volume.geometry.size
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    for context in CONTEXT_NAMES:
        extents = status_extents(volume, context, offset, length, single=False)
        assert sum(span for span, _ in extents) == length
        assert all(span > 0 for span, _ in extents)
        assert all(one[1] != two[1] for one, two in itertools.pairwise(extents))
        assert status_extents(volume, context, offset, length, single=True) == extents[:1]
