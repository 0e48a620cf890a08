"""Checkpoints: what they keep, and that no damage gets through."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from silo.checkpoint import (
    Kept,
    decode_checkpoint,
    encode_checkpoint,
    kept_of,
    owner_tag,
    states_after_power_loss,
)
from silo.chunkmap import DIRTY_BITS, FROZEN, LOCKED, RESIDENCY_MASK, SYNC_DIRTY, Residency
from silo.errors import CorruptionError, InvariantError
from silo.geometry import CHUNK_SIZE_MIN, Geometry

OWNER = owner_tag("vm1", "disk")
HEADER = struct.Struct("<8sHHIQQIIQQ16s")


def geometry_of(count: int) -> Geometry:
    return Geometry(count * CHUNK_SIZE_MIN, CHUNK_SIZE_MIN)


def sealed(header: bytes, classes: bytes) -> bytes:
    """A file whose digest is right, whatever is in it."""
    return header + classes + blake3(header + classes).digest()


def forged(classes: bytes, count: int = 16, **changes: object) -> bytes:
    """A sealed checkpoint of ``count`` chunks with some fields of the header replaced."""
    fields: dict[str, object] = {
        "magic": b"SILOCKPT",
        "version": 1,
        "encoding": 1,
        "features": 0,
        "sequence": 7,
        "size": count * CHUNK_SIZE_MIN,
        "chunk_size": CHUNK_SIZE_MIN,
        "block_size": 512,
        "count": count,
        "length": len(classes),
        "owner": OWNER,
    }
    return sealed(HEADER.pack(*(fields | changes).values()), classes)


def run(kind: int, length: int) -> bytes:
    return struct.pack("<Q", length << 2 | kind)


states_strategy = st.lists(
    st.tuples(
        st.sampled_from(Residency),
        st.integers(0, 31).map(lambda bits: bits << 3),
        st.sampled_from([1, 1, 3, 50]),
    ),
    min_size=1,
    max_size=80,
).map(lambda runs: bytes(residency | bits for residency, bits, length in runs for _ in range(length)))


@given(states_strategy, st.integers(0, 2**64 - 1))
def test_what_is_kept_comes_back(states: bytes, sequence: int) -> None:
    """Whatever the map, and whichever encoding is shorter."""
    geometry = geometry_of(len(states))
    found = decode_checkpoint(encode_checkpoint(sequence, geometry, OWNER, states), OWNER)
    assert (found.sequence, found.geometry) == (sequence, geometry)
    assert found.kept.tobytes() == kept_of(states).tobytes()


@given(states_strategy)
def test_what_a_power_loss_makes_of_every_chunk(states: bytes) -> None:
    """Absent stays absent, dirty if the store lacks it; what is local is suspect; zeros stay zeros."""
    expected = {
        Residency.ABSENT_STORE: Residency.ABSENT_STORE,
        Residency.ABSENT_PEER: Residency.ABSENT_PEER | SYNC_DIRTY,
        Residency.ZERO: Residency.PRESENT | SYNC_DIRTY,
        Residency.PRESENT: Residency.PRESENT | SYNC_DIRTY,
        Residency.ZERO_UNPUNCHED: Residency.ZERO_UNPUNCHED | SYNC_DIRTY,
    }
    after = states_after_power_loss(kept_of(states)).tobytes()
    assert list(after) == [expected[Residency(state & RESIDENCY_MASK)] for state in states]


def test_dirty_and_transient_bits_are_not_kept() -> None:
    plain = bytes(Residency) * 4
    noisy = bytes(state | DIRTY_BITS | LOCKED | FROZEN for state in plain)
    assert kept_of(plain).tobytes() == kept_of(noisy).tobytes()


def test_the_shorter_encoding_is_taken() -> None:
    """A uniform map of a tebibyte fits in a hundred bytes; the worst one takes two bits per chunk."""
    geometry = Geometry(1 << 40)
    uniform = bytes([Residency.PRESENT]) * geometry.chunk_count
    assert len(encode_checkpoint(1, geometry, OWNER, uniform)) == HEADER.size + 8 + 32
    mixed = bytes([Residency.PRESENT, Residency.ABSENT_STORE]) * (geometry.chunk_count // 2)
    encoded = encode_checkpoint(1, geometry, OWNER, mixed)
    assert len(encoded) == HEADER.size + geometry.chunk_count // 4 + 32
    assert np.array_equal(decode_checkpoint(encoded, OWNER).kept, kept_of(mixed))


def test_a_map_that_makes_no_sense_is_not_kept() -> None:
    for residency in (5, 6, 7):
        with pytest.raises(InvariantError, match="does not exist"):
            encode_checkpoint(1, geometry_of(3), OWNER, bytes([0, residency, 0]))
    with pytest.raises(InvariantError, match="was to be kept"):
        encode_checkpoint(1, geometry_of(3), OWNER, bytes(4))


@pytest.mark.parametrize("states", [bytes([4]) * 40, bytes([0, 4, 1, 3, 2] * 8)], ids=["runs", "packed"])
def test_no_damage_gets_through(states: bytes) -> None:
    """Cut anywhere, flipped anywhere, with anything behind it."""
    whole = encode_checkpoint(3, geometry_of(40), OWNER, states)
    for length in range(len(whole)):
        with pytest.raises(CorruptionError):
            decode_checkpoint(whole[:length], OWNER)
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            with pytest.raises(CorruptionError):
                decode_checkpoint(damaged, OWNER)
    with pytest.raises(CorruptionError, match="another length"):
        decode_checkpoint(whole + b"\0", OWNER)


@given(st.binary(max_size=400))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    for hostile in (data, b"SILOCKPT" + data, forged(data), forged(data, encoding=2)):
        try:
            found = decode_checkpoint(hostile, OWNER)
        except CorruptionError:
            continue
        assert len(found.kept) == found.geometry.chunk_count
        assert max(found.kept) <= max(Kept)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (forged(run(2, 16), version=2), "newer version"),
        (forged(run(2, 16), features=1), "newer version"),
        (forged(run(2, 16), encoding=3), "unknown encoding"),
        (forged(run(2, 16), owner=owner_tag("vm1", "other")), "another volume"),
        (forged(run(2, 16), size=0), "impossible geometry"),
        (forged(run(2, 16), chunk_size=5), "impossible geometry"),
        (forged(run(2, 17), count=16, size=17 * CHUNK_SIZE_MIN), "names 16 chunks of 17"),
        (forged(b""), "impossible run"),
        (forged(run(2, 15)), "cover 15 chunks"),
        (forged(run(2, 16) + run(1, 1)), "cover 17 chunks"),
        (forged(run(2, 0) + run(1, 16)), "impossible run"),
        (forged(run(2, 2**61)), "impossible run"),
        (forged(run(2, 16) * 16), "cover 256 chunks"),
        (forged(run(2, 1) * 17), "cannot be the runs"),
        (forged(run(2, 16)[:-1]), "cannot be the runs"),
        (forged(bytes(3), encoding=2), "cannot be the classes"),
        (forged(bytes(5), encoding=2), "cannot be the classes"),
        (forged(b"\xff", count=3, encoding=2), "beyond the last chunk"),
    ],
)
def test_lies_under_a_right_digest_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(CorruptionError, match=message):
        decode_checkpoint(data, OWNER)


def test_the_forger_can_also_tell_the_truth() -> None:
    """Else the test above would prove nothing."""
    assert bytes(decode_checkpoint(forged(run(2, 15) + run(3, 1)), OWNER).kept) == bytes([2] * 15 + [3])
    assert bytes(decode_checkpoint(forged(b"\x1b", count=4, encoding=2), OWNER).kept) == bytes([3, 2, 1, 0])


def test_owners_differ() -> None:
    assert len({owner_tag("a", "b"), owner_tag("a", "c"), owner_tag("b", "b")}) == 3
