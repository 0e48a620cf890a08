"""Control messages: what goes in comes out, and nonsense is refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import LocalProtocolError, RemoteProtocolError
from silo.p2p.messages import (
    Accept,
    Ack,
    AtWork,
    Declined,
    Drained,
    Evacuated,
    Handover,
    Heat,
    Hello,
    Invalidate,
    Lane,
    Message,
    Need,
    NeedEnd,
    Offer,
    Reason,
    Refused,
    Released,
    Round,
    Stage,
    Taken,
    Unavailable,
    VolumeOffer,
    Want,
    Welcome,
    Withdraw,
    Zeros,
    decode,
    encode,
    frame_type,
    message_set,
    set_messages,
)
from silo.p2p.wire import HEADER_SIZE, Frame, FrameBuffer, FrameType

VOLUME = VolumeOffer(name="disk", size=1 << 40, chunk_size=65536, block_size=512, used=5)
EVERY: list[Message] = [
    Hello(
        oldest=1, newest=3, host="a", group="vm1", migration=bytes(16), link=7, lane=Lane.DEMAND, stage=Stage.HANDED
    ),
    Welcome(version=1, host="b", stage=Stage.COPYING, window=1 << 20),
    Refused(reason=Reason.GONE, host="b", message="no"),
    Offer(volumes=[VOLUME], generation=None),
    Accept(),
    Heat(volume=0, first=65536, reads=b"\x01\x02", writes=b"\x00\xff"),
    Invalidate(round=9, volume=1, window=2, chunks=b"\x02\x01"),
    Zeros(round=9, volume=1, window=2, chunks=b"\x02\x01"),
    Ack(pushes=1 << 40),
    AtWork(claimed=True),
    Round(round=3),
    Handover(length=5, digest=bytes(32)),
    Taken(epoch=3, workload_s=0.5),
    Declined(message="disk full"),
    Withdraw(message=""),
    Need(volume=1, window=2, chunks=b"\x02\x01"),
    NeedEnd(),
    Drained(),
    Evacuated(bytes_store=12),
    Released(),
    Want(volume=3, chunk=1 << 50),
    Unavailable(volume=3, chunk=4, message="cannot read"),
]  # fmt: skip


def received(data: bytes) -> Frame:
    buffer = FrameBuffer()
    buffer.space()[: len(data)] = data
    buffer.received(len(data))
    (frame,) = buffer.frames()
    return frame


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_every_message_travels(message):
    """What is encoded is one frame, and decodes to the same."""
    frame = received(encode(message))
    assert frame.type is frame_type(message)
    assert decode(frame) == message


def test_every_control_frame_has_a_message():
    """Only chunks, parts and signs of life carry something else."""
    assert set(FrameType) - {frame_type(message) for message in EVERY} == {
        FrameType.CHUNK, FrameType.PART, FrameType.PING,
    }  # fmt: skip


def test_a_newer_host_may_say_more():
    """Fields that we do not know are ignored."""
    body = msgspec.msgpack.encode({"pushes": 5, "mood": "good"})
    assert decode(Frame(FrameType.ACK, memoryview(body))) == Ack(pushes=5)


@pytest.mark.parametrize(
    ("type_", "fields"),
    [
        (FrameType.ACK, {}),
        (FrameType.ACK, {"pushes": -1}),
        (FrameType.ACK, {"pushes": 1 << 63}),
        (FrameType.ACK, {"pushes": "5"}),
        (FrameType.ACK, [5]),
        (FrameType.OFFER, {"volumes": [], "generation": 0}),
        (FrameType.OFFER, {"volumes": [{}], "generation": 0}),
        (FrameType.HANDOVER, {"length": 5, "digest": bytes(31)}),
        (FrameType.NEED, {"volume": 1 << 16, "window": 0, "chunks": b"\x02\x01"}),
        (FrameType.NEED, {"volume": 0, "window": 0, "chunks": b"\x02"}),
        (FrameType.NEED, {"volume": 0, "window": 0, "chunks": bytes((1 << 17) + 2)}),
        (FrameType.TAKEN, {"epoch": 1, "workload_s": -1.0}),
        (FrameType.REFUSED, {"reason": "mood", "host": "b", "message": ""}),
        (FrameType.DECLINED, {"message": "x" * 2001}),
        (FrameType.WELCOME, {"version": 1, "host": "", "stage": "new", "window": 1}),
    ],
)
def test_nonsense_is_refused(type_, fields):
    """Missing, negative, too large, of the wrong type or the wrong length."""
    with pytest.raises(RemoteProtocolError):
        decode(Frame(type_, memoryview(msgspec.msgpack.encode(fields))))


@given(st.sampled_from(list(FrameType)), st.binary(max_size=100))
def test_garbage_is_a_message_or_a_protocol_error(type_, body):
    """Arbitrary bytes never raise anything else."""
    try:
        message = decode(Frame(type_, memoryview(body)))
    except RemoteProtocolError:
        return
    assert frame_type(message) is type_


def test_a_message_that_is_too_large_is_our_bug():
    """What cannot be received is not sent."""
    volume = msgspec.structs.replace(VOLUME, name="x" * (1 << 21))
    with pytest.raises(LocalProtocolError):
        encode(Offer(volumes=[volume], generation=0))


@pytest.mark.parametrize("size", [0, 513, 1 << 51])
def test_a_geometry_of_no_use_is_the_peers_fault(size):
    """An offered volume must be one that can exist."""
    offer = VolumeOffer(name="disk", size=size, chunk_size=65536, block_size=512, used=0)
    with pytest.raises(RemoteProtocolError, match="geometry"):
        offer.geometry()


def test_sets_travel_in_messages():
    """A set of chunks becomes one message per window and comes back whole; it must fit the volume."""
    chunks = np.array([0, 5, 6, 7, (1 << 20) + 3])
    messages = set_messages(Invalidate, 4, 2, chunks)
    assert [(message.round, message.volume) for message in messages] == [(4, 2)] * 2
    assert np.concatenate([message_set(message, 1 << 21) for message in messages]).tolist() == chunks.tolist()
    with pytest.raises(RemoteProtocolError):
        message_set(messages[1], 1 << 20)
    assert len(encode(messages[0])) > HEADER_SIZE
