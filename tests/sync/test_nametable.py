"""The table of names: round trips, and nothing but CorruptionError for other bytes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from silo.errors import CorruptionError, InvariantError
from silo.sync.nametable import NAME_SIZE_MAX, pack_names, parse_names

names = st.lists(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40), max_size=9
)


@given(names, st.binary(max_size=20), st.binary(max_size=20))
def test_round_trip_inside_other_bytes(texts: list[str], before: bytes, after: bytes) -> None:
    """The table is found where it starts, and what follows it is left alone."""
    table = pack_names(texts)
    assert len(table) % 8 == 0
    assert parse_names(before + table + after, len(before)) == (tuple(texts), len(before) + len(table))


@given(names)
def test_every_cut_is_noticed(texts: list[str]) -> None:
    table = pack_names(texts)
    for end in range(len(table)):
        with pytest.raises(CorruptionError):
            parse_names(table[:end])


@given(st.binary(max_size=100), st.integers(0, 120))
def test_hostile_bytes_are_parsed_or_refused(data: bytes, start: int) -> None:
    try:
        found, end = parse_names(data, start)
    except CorruptionError:
        return
    assert end <= len(data)
    assert all(found)


def test_names_that_could_not_be_read_are_not_written() -> None:
    for name in ("", "x" * (NAME_SIZE_MAX + 1)):
        with pytest.raises(InvariantError):
            pack_names([name])
