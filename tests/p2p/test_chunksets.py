"""Sets of chunks: every set survives, hostile ones are refused, and none is large."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import RemoteProtocolError
from silo.p2p.chunksets import SET_WINDOW, decode_window, encode_run, encode_set

COUNT = 3 * SET_WINDOW + 77


def travel(chunks: np.ndarray, count: int = COUNT) -> np.ndarray:
    """Encode, and decode again."""
    parts = [decode_window(window, data, count) for window, data in encode_set(chunks)]
    return np.concatenate(parts) if parts else chunks[:0]


@given(
    st.lists(
        st.tuples(st.integers(0, COUNT - 1), st.integers(1, 300), st.sampled_from([1, 2, 3])), max_size=20
    )
)
def test_every_set_survives(runs):
    """Runs, combs and lone chunks, across windows and up to the very last chunk."""
    members = {c for first, length, step in runs for c in range(first, min(first + length, COUNT), step)}
    chunks = np.array(sorted(members), dtype=np.int64)
    assert travel(chunks).tolist() == chunks.tolist()


@pytest.mark.parametrize("step", [1, 2, 7, 64, 1000])
def test_no_window_is_larger_than_its_bitmap(step):
    """Whatever the pattern, a window of 2^20 chunks is at most 128 KiB and a byte."""
    chunks = np.arange(0, COUNT, step, dtype=np.int64)
    sizes = [len(data) for _, data in encode_set(chunks)]
    assert len(sizes) == len(set((chunks // SET_WINDOW).tolist()))
    assert max(sizes) <= SET_WINDOW // 8 + 1
    assert travel(chunks).tolist() == chunks.tolist()


def test_a_whole_disk_is_a_few_bytes():
    """One run per window."""
    assert [len(data) for _, data in encode_set(np.arange(COUNT, dtype=np.int64))] == [9] * 4


def test_one_run_needs_no_list():
    """A window with one run can be made without its members."""
    for first, count in ((500, 1), (5, 100), (0, SET_WINDOW)):
        ((window, data),) = encode_set(np.arange(first, first + count))
        assert (window, data) == (0, encode_run(first, count))


def runs(*pairs: tuple[int, int]) -> bytes:
    return b"\x01" + b"".join(struct.pack("<II", *pair) for pair in pairs)


@pytest.mark.parametrize(
    ("window", "data"),
    [
        (4, runs((0, 1))),
        (1 << 40, runs((0, 1))),
        (0, b""),
        (0, b"\x01"),
        (0, b"\x02"),
        (0, b"\x03\x01"),
        (0, runs((0, 1))[:-1]),
        (0, runs((0, 0))),
        (0, runs((5, 1), (4, 1))),
        (0, runs((5, 2), (7, 1))),
        (0, runs((5, 9), (7, 1))),
        (0, runs((0, SET_WINDOW + 1))),
        (0, runs((0xFFFFFFFF, 0xFFFFFFFF))),
        (3, runs((70, 8))),
        (3, b"\x02" + bytes(9) + b"\x20"),
        (3, b"\x02" + bytes(10) + b"\x01"),
        (0, b"\x02\x00"),
        (0, b"\x02" + b"\x01" * (SET_WINDOW // 8 + 1)),
    ],
)
def test_sets_outside_of_their_volume_are_refused(window, data):
    """Windows, runs and bits must lie inside the volume, ascend and name something."""
    with pytest.raises(RemoteProtocolError):
        decode_window(window, data, COUNT)


@given(st.integers(0, 5), st.binary(max_size=100))
def test_garbage_is_a_set_or_a_protocol_error(window, data):
    """Arbitrary bytes name chunks of the volume, ascending, or raise RemoteProtocolError."""
    try:
        chunks = decode_window(window, data, COUNT)
    except RemoteProtocolError:
        return
    assert len(chunks) > 0
    assert chunks[0] >= 0
    assert chunks[-1] < COUNT
    assert (np.diff(chunks) > 0).all()
