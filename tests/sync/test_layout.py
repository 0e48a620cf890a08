"""Keys and preambles."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from silo.errors import CorruptionError, InvalidRequestError
from silo.names import check_group_name, check_volume_name
from silo.sync.layout import (
    EPOCH_MAX,
    PREAMBLE_SIZE,
    SEQ_MAX,
    Magic,
    SegmentName,
    head_key,
    pack_preamble,
    parse_preamble,
    parse_segment_key,
    point_key,
    proof_key,
    segments_prefix,
)
from silo.sync.store_keys import check_key

NAME = SegmentName("vm1", 12, 345, "00112233aabbccdd")

segment_names = st.builds(
    SegmentName,
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    st.integers(1, EPOCH_MAX),
    st.integers(1, SEQ_MAX),
    st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
)


@given(segment_names)
def test_segment_keys_round_trip(name: SegmentName) -> None:
    """A key says what it was made of, and every store accepts it."""
    check_key(name.key)
    assert name.key.startswith(segments_prefix(name.group))
    assert parse_segment_key(name.key) == name


@given(st.lists(segment_names, min_size=2, max_size=5))
def test_the_last_components_sort_by_epoch_and_sequence(names: list[SegmentName]) -> None:
    by_text = sorted(names, key=lambda name: name.key.rsplit("/", 1)[1])
    assert [(n.epoch, n.seq) for n in by_text] == sorted((n.epoch, n.seq) for n in names)


@given(st.text(max_size=80))
def test_other_text_is_not_a_segment_key(text: str) -> None:
    with pytest.raises(CorruptionError):
        parse_segment_key(text)


def test_a_key_with_another_shard_is_refused() -> None:
    group, middle, shard, last = NAME.key.split("/")
    other = f"{int(shard, 16) ^ 1:02x}"
    with pytest.raises(CorruptionError):
        parse_segment_key("/".join((group, middle, other, last)))


def test_fixed_keys() -> None:
    assert head_key("vm1") == "vm1/head"
    assert point_key("vm1", 7) == "vm1/points/000000000007"
    assert proof_key("vm1", "ab" * 16) == "vm1/proofs/" + "ab" * 16


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a b", "é", "x" * 129, "a\n"])
def test_names_that_are_not_names(name: str) -> None:
    for check in (check_group_name, check_volume_name, head_key):
        with pytest.raises(InvalidRequestError):
            check(name)


@pytest.mark.parametrize(("epoch", "seq"), [(0, 1), (1, 0), (EPOCH_MAX + 1, 1), (1, SEQ_MAX + 1)])
def test_numbers_out_of_range(epoch: int, seq: int) -> None:
    with pytest.raises(InvalidRequestError):
        SegmentName("vm1", epoch, seq, "00112233aabbccdd")
    key = f"vm1/segments/00/{epoch:010d}-{seq:012d}-00112233aabbccdd"
    with pytest.raises(CorruptionError):
        parse_segment_key(key)


@pytest.mark.parametrize("token", ["", "../../head", "AB" * 16, "ab" * 15])
def test_a_proof_cannot_name_another_key(token: str) -> None:
    with pytest.raises(InvalidRequestError):
        proof_key("vm1", token)


def test_every_flipped_byte_of_a_preamble_is_noticed() -> None:
    preamble = bytearray(pack_preamble(Magic.SEGMENT))
    parse_preamble(preamble, Magic.SEGMENT)
    for at in range(PREAMBLE_SIZE):
        preamble[at] ^= 0x04
        with pytest.raises(CorruptionError):
            parse_preamble(preamble, Magic.SEGMENT)
        preamble[at] ^= 0x04
    with pytest.raises(CorruptionError):
        parse_preamble(preamble[:-1], Magic.SEGMENT)
