"""Zeros, handed out and recognised."""

from __future__ import annotations

import pytest

from silo.zeros import is_zero, zeros


@pytest.mark.parametrize("length", [0, 1, 512, 1 << 20, (1 << 20) + 1])
def test_zeros_are_that_many_and_cannot_be_changed(length):
    """The memory is shared, so it must be read-only."""
    found = zeros(length)
    assert len(found) == length
    assert bytes(found) == bytes(length)
    assert found.readonly


@pytest.mark.parametrize("kind", [bytes, bytearray, lambda data: memoryview(bytearray(data))])
@pytest.mark.parametrize("length", [0, 1, 64, 65, 4096, 65536])
def test_zero_is_recognised_in_every_buffer(kind, length):
    """All zeros is zero; one other byte anywhere is not."""
    assert is_zero(kind(bytes(length)))
    for place in {0, 63, 64, length // 2, length - 1} & set(range(length)):
        data = bytearray(length)
        data[place] = 1
        assert not is_zero(kind(data))
