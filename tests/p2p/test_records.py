"""Records and the body of the handover: they survive, and nothing else passes for them."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import CapacityError, CorruptionError, RemoteProtocolError
from silo.geometry import Geometry
from silo.p2p.chunksets import SET_WINDOW
from silo.p2p.handover import Mark
from silo.p2p.messages import VolumeOffer
from silo.p2p.records import (
    STATE_SIZE_MAX,
    HandoverBody,
    HandoverRecord,
    OfferRecord,
    VolumeSets,
    decode_handover,
    decode_handover_record,
    decode_offer_record,
    encode_handover,
    encode_record,
    pack_all,
    pack_set,
    unpack_set,
)
from silo.p2p.terms import Terms

OFFER = VolumeOffer(name="disk", size=100 * 4096, chunk_size=4096, block_size=512, used=4096)
TERMS = Terms(epoch=3, incarnation="0123abcd", generations=(7, 8), nonce="n")
BODY = HandoverBody(
    migration=bytes(16),
    group="vm1",
    source_host="a",
    terms=TERMS,
    volumes=(
        VolumeSets(volume=OFFER, missing=pack_set(np.array([1, 2])), unsynced=pack_set(np.array([2, 99]))),
    ),
    state=b"registers",
)


def test_the_handover_survives():
    """What the source says is what the target decodes, and what it reads from its record after a restart."""
    encoded = encode_handover(BODY)
    assert decode_handover(encoded) == BODY
    record = HandoverRecord(mark=Mark.HANDED, body=encoded, migration=bytes(16), source_host="a")
    assert decode_handover_record(encode_record(record)) == record


def test_the_offer_survives():
    """The source finds its own terms and nonces again."""
    record = OfferRecord(
        mark=Mark.OFFERED, migration=bytes(16), group="vm1", target_url="tcp:b:1", target_host="b", terms=TERMS,
        reclaim_nonce="r", volumes=(OFFER,),
    )  # fmt: skip
    assert decode_offer_record(encode_record(record)) == record


@pytest.mark.parametrize("chunk", [100, 1 << 21])
@pytest.mark.parametrize("which", ["missing", "unsynced"])
def test_a_handover_names_only_chunks_that_exist(chunk, which):
    """A set that points outside of its volume makes the whole body invalid."""
    part = msgspec.structs.replace(BODY.volumes[0], **{which: pack_set(np.array([chunk]))})
    with pytest.raises(RemoteProtocolError):
        decode_handover(encode_handover(msgspec.structs.replace(BODY, volumes=(part,))))


def test_windows_must_ascend():
    """A set says every window once."""
    geometry = Geometry(4 * SET_WINDOW * 4096, 4096)
    packed = pack_set(np.array([5, SET_WINDOW + 5]))
    assert [part.tolist() for part in unpack_set(packed, geometry)] == [[5], [SET_WINDOW + 5]]
    for wrong in (packed[::-1], packed[:1] * 2):
        with pytest.raises(RemoteProtocolError):
            list(unpack_set(wrong, geometry))


@pytest.mark.parametrize("count", [1, 100, SET_WINDOW, SET_WINDOW + 1, 3 * SET_WINDOW - 5])
def test_everything_is_a_few_bytes(count):
    """All chunks of a volume, without a list of them."""
    packed = pack_all(count)
    assert sum(len(data) for _, data in packed) == 9 * len(packed)
    parts = list(unpack_set(packed, Geometry(count * 4096, 4096)))
    assert sum(map(len, parts)) == count
    assert np.concatenate(parts)[[0, -1]].tolist() == [0, count - 1]


def test_too_much_state_is_refused_before_it_is_sent():
    """16 MiB is the limit, and the error says what to do."""
    with pytest.raises(CapacityError, match="keep the rest in a volume"):
        encode_handover(msgspec.structs.replace(BODY, state=bytes(STATE_SIZE_MAX + 1)))


@given(st.binary(max_size=300))
def test_garbage_is_refused(data):
    """A body from the wire is the peer's fault, a record of our own is damage."""
    with pytest.raises(RemoteProtocolError):
        decode_handover(data)
    with pytest.raises(CorruptionError):
        decode_handover_record(data)
    with pytest.raises(CorruptionError):
        decode_offer_record(data)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_handover_never_raises_anything_else(place, value):
    """One byte changed anywhere: it decodes to something, or it is refused."""
    encoded = bytearray(encode_handover(BODY))
    encoded[place % len(encoded)] = value
    try:
        body = decode_handover(bytes(encoded))
    except RemoteProtocolError:
        return
    assert isinstance(body, HandoverBody)
