"""The list of first reads: its choice and its bytes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import CorruptionError
from silo.sync.codec import digest_of
from silo.sync.hotlist import choose_hot, encode_hot, parse_hot

CHUNKS = st.lists(st.integers(0, 5000), min_size=1, max_size=60, unique=True).map(
    lambda chunks: np.array(sorted(chunks), dtype=np.int64)
)


@given(st.dictionaries(st.sampled_from(["disk", "ram", "data"]), CHUNKS, max_size=3))
def test_a_list_comes_back(chunks: dict[str, np.ndarray]) -> None:
    """Every volume, every chunk, in order."""
    data = encode_hot(chunks)
    found = parse_hot(data, digest=digest_of(data))
    assert {name: indices.tolist() for name, indices in found.items()} == {
        name: indices.tolist() for name, indices in chunks.items()
    }


def test_only_what_was_read_is_chosen() -> None:
    """In the order of the disk; of too many the hottest."""
    heat = np.array([0, 3, 0, 1, 2, 9], dtype=np.float32)
    assert choose_hot({"disk": heat}, {"disk": 10})["disk"].tolist() == [1, 3, 4, 5]
    assert choose_hot({"disk": heat}, {"disk": 2})["disk"].tolist() == [1, 5]
    assert choose_hot({"disk": np.zeros(4, dtype=np.float32)}, {"disk": 2}) == {}


@given(st.data())
def test_damage_is_noticed(data: st.DataObject) -> None:
    """Whatever bytes have the right digest are parsed or refused; others are refused."""
    whole = encode_hot({"disk": np.array([1, 2, 9], dtype=np.int64)})
    at = data.draw(st.integers(0, len(whole) - 1))
    bad = whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :]
    with pytest.raises(CorruptionError):
        parse_hot(bad, digest=digest_of(whole))
    with contextlib.suppress(CorruptionError):
        parse_hot(bad, digest=digest_of(bad))
    with pytest.raises(CorruptionError):
        parse_hot(whole[:at], digest=digest_of(whole[:at]))
