"""Sizes and the arithmetic between them, against the definitions spelt out byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import InvalidRequestError
from silo.geometry import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN, SIZE_MAX, Geometry

CHUNK = CHUNK_SIZE_MIN

powers = st.integers(12, 22).map(lambda shift: 1 << shift)
blocks = st.integers(9, 12).map(lambda shift: 1 << shift)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any legal geometry, small and huge ones, with a short last chunk or without."""
    block = draw(blocks)
    size = draw(st.integers(1, 64) | st.integers(1, SIZE_MAX // block)) * block
    return Geometry(size, chunk_size=draw(powers), block_size=block)


@st.composite
def small_extents(draw: st.DrawFn) -> tuple[Geometry, int, int]:
    """A geometry of a few chunks and a non-empty extent in it, so that bytes can be looked at one by one."""
    size = draw(st.integers(1, 40)) * 512
    offset = draw(st.integers(0, size - 1))
    return Geometry(size, chunk_size=CHUNK), offset, draw(st.integers(1, size - offset))


@given(geometries())
def test_chunks_partition_the_volume(geometry):
    """The chunks' extents follow one another from 0 to the size; all but the last are full."""
    last = geometry.chunk_count - 1
    assert geometry.extent_of(0)[0] == 0
    assert sum(geometry.extent_of(last)) == geometry.size
    for chunk in {0, last // 2, max(0, last - 1)} - {last}:
        offset, length = geometry.extent_of(chunk)
        assert length == geometry.chunk_size
        assert geometry.extent_of(chunk + 1)[0] == offset + length
    assert 0 < geometry.extent_of(last)[1] <= geometry.chunk_size


@given(geometries(), st.data())
def test_shift_finds_the_chunk_of_a_byte(geometry, data):
    """The chunk that the shift gives for a byte is the one whose extent holds it."""
    byte = data.draw(st.integers(0, geometry.size - 1))
    offset, length = geometry.extent_of(byte >> geometry.chunk_shift)
    assert offset <= byte < offset + length


@given(small_extents())
def test_touched_chunks_share_a_byte(case):
    """Touched chunks are those of the extent's bytes, no more and no fewer."""
    geometry, offset, length = case
    first, limit = geometry.touched(offset, length)
    assert set(range(first, limit)) == {byte // CHUNK for byte in range(offset, offset + length)}


@given(small_extents())
def test_covered_chunks_lie_inside(case):
    """Covered chunks are those all of whose existing bytes lie in the extent."""
    geometry, offset, length = case
    first, limit = geometry.covered(offset, length)
    inside = {
        chunk
        for chunk in range(geometry.chunk_count)
        if offset <= geometry.extent_of(chunk)[0] and sum(geometry.extent_of(chunk)) <= offset + length
    }
    assert set(range(first, limit)) == inside


@given(geometries(), st.data())
def test_covered_chunks_are_touched(geometry, data):
    """Every covered chunk is touched; at most the two at the ends are touched and not covered."""
    offset = data.draw(st.integers(0, geometry.size - 1))
    length = data.draw(st.integers(1, geometry.size - offset))
    touched_first, touched_limit = geometry.touched(offset, length)
    first, limit = geometry.covered(offset, length)
    if first < limit:
        assert touched_first <= first <= touched_first + 1
        assert touched_limit - 1 <= limit <= touched_limit
    else:
        assert touched_limit - touched_first <= 2


@given(geometries(), st.integers(-SIZE_MAX, 2 * SIZE_MAX), st.integers(-SIZE_MAX, 2 * SIZE_MAX))
def test_check_extent_accepts_exactly_what_lies_inside(geometry, offset, length):
    """An extent passes when it starts at 0 or later, is not negative, and ends by the size."""
    if offset >= 0 and length >= 0 and offset + length <= geometry.size:
        geometry.check_extent(offset, length)
    else:
        with pytest.raises(InvalidRequestError):
            geometry.check_extent(offset, length)


def test_check_extent_at_the_edges():
    """The whole volume and the empty extent at its end are inside; one byte more is not."""
    geometry = Geometry(4 * CHUNK)
    geometry.check_extent(0, geometry.size)
    geometry.check_extent(geometry.size, 0)
    for extent in ((geometry.size, 1), (1, geometry.size), (-1, 1), (0, -1)):
        with pytest.raises(InvalidRequestError, match="outside"):
            geometry.check_extent(*extent)


def test_short_last_chunk_can_be_covered():
    """An extent up to the end covers the last chunk though it is short; one byte less does not."""
    geometry = Geometry(CHUNK + 512, chunk_size=CHUNK)
    assert geometry.covered(CHUNK, 512) == (1, 2)
    assert geometry.covered(CHUNK, 511) == (1, 1)


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ({"size": 0}, "size 0"),
        ({"size": -512}, "size -512"),
        ({"size": 513}, "multiple of 512"),
        ({"size": 512, "block_size": 4096}, "multiple of 4096"),
        ({"size": SIZE_MAX + 512}, "1 PiB"),
        ({"size": CHUNK, "chunk_size": 0}, "chunk size 0"),
        ({"size": CHUNK, "chunk_size": -CHUNK}, "chunk size"),
        ({"size": CHUNK, "chunk_size": CHUNK_SIZE_MIN // 2}, "chunk size 2048"),
        ({"size": CHUNK, "chunk_size": CHUNK_SIZE_MAX * 2}, "chunk size"),
        ({"size": CHUNK, "chunk_size": CHUNK + 512}, "power of two"),
        ({"size": CHUNK, "block_size": 256}, "block size 256"),
        ({"size": CHUNK, "block_size": 8192}, "block size 8192"),
        ({"size": CHUNK, "block_size": 1000}, "power of two"),
    ],
)
def test_unusable_numbers_are_refused(numbers, complaint):
    """Each number out of its range is refused with a sentence that names it."""
    with pytest.raises(InvalidRequestError, match=complaint):
        Geometry(**numbers)


@pytest.mark.parametrize("size", [512, CHUNK, SIZE_MAX])
def test_the_extreme_sizes_are_usable(size):
    """The smallest and the largest volume are legal."""
    assert Geometry(size, chunk_size=CHUNK).chunk_count == max(1, size // CHUNK)
