"""The request parser: whole, byte by byte, cut anywhere, with nonsense behind, within its memory."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import LocalProtocolError, RemoteProtocolError
from silo.exports.nbd_session import REQUEST_COST, HeaderStyle, RequestParser
from silo.exports.nbd_wire import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
)

Taken = tuple[int, int, int, int, int, bytes | None]
EVERYTHING = 1 << 40
KIB = 1024


def compact(
    command: int, cookie: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
):
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length or len(payload)) + payload


def extended(
    command: int, cookie: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
):
    flags |= CommandFlag.PAYLOAD_LEN if payload else 0
    head = EXTENDED_REQUEST.pack(
        EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length or len(payload)
    )
    return head + payload


def take(parser: RequestParser, budget: int = EVERYTHING) -> list[Taken]:
    """All requests that are complete, as values that stay."""
    taken: list[Taken] = []
    while batch := parser.next_batch(budget):
        taken += [(*request[:5], None if request[5] is None else bytes(request[5])) for request in batch]
    return taken


def feed(parser: RequestParser, data: bytes, step: int = 1 << 30) -> list[Taken]:
    """Receive ``data`` in pieces of at most ``step`` bytes and take what is complete after each."""
    taken: list[Taken] = []
    position = 0
    while position < len(data) and not parser.ended:
        buffer = parser.get_buffer()
        piece = data[position : position + min(step, len(buffer))]
        buffer[: len(piece)] = piece
        parser.received(len(piece))
        position += len(piece)
        taken += take(parser)
    return taken


COMPACT = (
    compact(Command.READ, 1, 4096, 512)
    + compact(Command.WRITE, 2, 8192, payload=b"0123456789")
    + compact(Command.FLUSH, 3)
    + compact(Command.WRITE, 4, 0, payload=b"x" * 300, flags=CommandFlag.FUA)
    + compact(99, 5, 7, 8, flags=0xFFFF)
    + compact(Command.READ, 6, 0, 1, flags=CommandFlag.DF)
)
COMPACT_REQUESTS: list[Taken] = [
    (0, 0, 1, 4096, 512, None),
    (1, 0, 2, 8192, 10, b"0123456789"),
    (3, 0, 3, 0, 0, None),
    (1, 1, 4, 0, 300, b"x" * 300),
    (99, 0xFFFF, 5, 7, 8, None),
    (0, 4, 6, 0, 1, None),
]
EXTENDED = (
    extended(Command.READ, 1, 1 << 50, 1 << 33)
    + extended(Command.WRITE, 2, 8192, payload=b"0123456789")
    + extended(Command.WRITE, 3, 8192, 10)
    + extended(Command.BLOCK_STATUS, 4, 0, payload=b"12345678")
    + extended(Command.READ, 5, 0, payload=b"not asked for")
    + extended(Command.TRIM, 6, 0, 1 << 41)
)
EXTENDED_REQUESTS: list[Taken] = [
    (0, 0, 1, 1 << 50, 1 << 33, None),
    (1, 0, 2, 8192, 10, b"0123456789"),
    (1, 0, 3, 8192, 10, None),
    (7, CommandFlag.PAYLOAD_LEN, 4, 0, 8, b"12345678"),
    (0, CommandFlag.PAYLOAD_LEN, 5, 0, 13, b"not asked for"),
    (4, 0, 6, 0, 1 << 41, None),
]
STREAMS = [
    pytest.param(HeaderStyle.SIMPLE, COMPACT, COMPACT_REQUESTS, id="compact"),
    pytest.param(HeaderStyle.EXTENDED, EXTENDED, EXTENDED_REQUESTS, id="extended"),
]


@pytest.mark.parametrize(("style", "data", "expected"), STREAMS)
@pytest.mark.parametrize("step", [1 << 30, 1, 3, 29])
@pytest.mark.parametrize("buffer_size", [1 << 16, 64])
def test_requests_come_out_as_they_went_in(
    style: HeaderStyle, data: bytes, expected: list[Taken], step: int, buffer_size: int
):
    """However the stream is cut and however small the buffer is, the requests are the same."""
    assert feed(RequestParser(style, buffer_size=buffer_size), data, step) == expected


@pytest.mark.parametrize(("style", "data", "expected"), STREAMS)
def test_nothing_comes_out_before_it_is_complete(style: HeaderStyle, data: bytes, expected: list[Taken]):
    """A stream that ends anywhere has yielded exactly the requests that had arrived whole."""
    pack = EXTENDED_REQUEST if style is HeaderStyle.EXTENDED else REQUEST
    ends, position = [], 0
    for request in expected:
        position += pack.size + len(request[5] or b"")
        ends.append(position)
    for cut in range(len(data)):
        whole = sum(end <= cut for end in ends)
        assert feed(RequestParser(style), data[:cut]) == expected[:whole]


@pytest.mark.parametrize(("style", "data", "expected"), STREAMS)
def test_nonsense_behind_good_requests_ends_the_stream_after_them(
    style: HeaderStyle, data: bytes, expected: list[Taken]
):
    """What came before the nonsense is served; then, and ever after, the stream is lost."""
    parser = RequestParser(style)
    buffer = parser.get_buffer()
    nonsense = data + b"\xee" * 40
    buffer[: len(nonsense)] = nonsense
    parser.received(len(nonsense))
    assert [request[2] for request in parser.next_batch(EVERYTHING)] == [request[2] for request in expected]
    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            parser.next_batch(EVERYTHING)


def test_the_other_style_of_header_is_nonsense():
    """Once headers were agreed upon the other kind is a breach."""
    with pytest.raises(RemoteProtocolError):
        feed(RequestParser(HeaderStyle.SIMPLE), extended(Command.READ, 1, 0, 512))
    with pytest.raises(RemoteProtocolError):
        feed(RequestParser(HeaderStyle.EXTENDED), compact(Command.READ, 1, 0, 512) + bytes(4))


def test_nothing_is_looked_at_after_goodbye():
    """``DISC`` ends the stream; what a client sends behind it, against the protocol, is ignored."""
    parser = RequestParser(HeaderStyle.SIMPLE)
    data = compact(Command.READ, 1, 0, 512) + compact(Command.DISC, 2) + b"garbage" * 10
    assert [request[2] for request in feed(parser, data)] == [1]
    assert parser.ended


def test_a_budget_bounds_the_bytes_of_a_batch():
    """A batch stops with the request that spends the budget; the next one goes on from there."""
    parser = RequestParser(HeaderStyle.SIMPLE)
    data = b"".join(compact(Command.READ, cookie, 0, 1000) for cookie in range(5))
    buffer = parser.get_buffer()
    buffer[: len(data)] = data
    parser.received(len(data))
    cost = 1000 + REQUEST_COST
    batches = [[request[2] for request in parser.next_batch(budget)] for budget in (cost + 1, 0, 1, -5, 9999)]
    assert batches == [[0, 1], [], [2], [], [3, 4]]


def test_requests_without_data_spend_the_budget_too():
    """Nobody can make a batch endless with requests that cost nothing."""
    parser = RequestParser(HeaderStyle.SIMPLE)
    parser.prepend(compact(Command.FLUSH, 1) * 100)
    assert len(parser.next_batch(10 * REQUEST_COST)) == 10


def test_a_payload_that_is_too_long_is_skipped_and_its_request_refused_later():
    """A write beyond the server's limit is consumed to its last byte; the next request is understood."""
    big = compact(Command.WRITE, 1, 0, payload=b"y" * 3000)
    data = big + compact(Command.READ, 2, 0, 512) + big + compact(Command.WRITE, 3, 0, payload=b"z" * 1024)
    for step in (1 << 30, 1, 700):
        parser = RequestParser(HeaderStyle.SIMPLE, payload_max=1024, buffer_size=2048)
        taken = feed(parser, data, step)
        assert [(request[2], request[4], request[5]) for request in taken] == [
            (1, 3000, None),
            (2, 512, None),
            (1, 3000, None),
            (3, 1024, b"z" * 1024),
        ]


def test_a_payload_beyond_all_limits_ends_the_stream():
    """More than 32 MiB is not waited for, whatever this server accepts; requests before it are served."""
    parser = RequestParser(HeaderStyle.SIMPLE, payload_max=1024)
    buffer = parser.get_buffer()
    data = compact(Command.READ, 1, 0, 512) + compact(Command.WRITE, 2, 0, (32 << 20) + 1)
    buffer[: len(data)] = data
    parser.received(len(data))
    assert [request[2] for request in parser.next_batch(EVERYTHING)] == [1]
    with pytest.raises(RemoteProtocolError):
        parser.next_batch(EVERYTHING)
    with pytest.raises(RemoteProtocolError):
        feed(RequestParser(HeaderStyle.EXTENDED), extended(Command.WRITE, 1, 0, 1 << 60, flags=32))


def test_a_large_write_is_received_in_place():
    """Once its header is known, the room offered ends behind a large write, so the next one starts at the front."""
    parser = RequestParser(HeaderStyle.SIMPLE)
    head = compact(Command.WRITE, 1, 0, 256 * KIB)
    buffer = parser.get_buffer()
    buffer[: len(head)] = head
    parser.received(len(head))
    assert parser.next_batch(EVERYTHING) == []
    room = parser.get_buffer()
    assert len(room) == 256 * KIB + len(head)
    room[: 256 * KIB] = b"w" * (256 * KIB)
    parser.received(256 * KIB)
    (request,) = parser.next_batch(EVERYTHING)
    assert request[5] is not None
    assert request[5].obj is buffer.obj
    assert parser.held == 0


def test_a_write_larger_than_the_buffer_gets_its_own():
    """Memory for it is held from its header on and reported; detaching it copies nothing."""
    parser = RequestParser(HeaderStyle.SIMPLE, buffer_size=4096)
    payload = bytes(range(256)) * 100
    data = compact(Command.WRITE, 1, 0, payload=payload)
    buffer = parser.get_buffer()
    buffer[:] = data[:4096]
    parser.received(4096)
    assert parser.next_batch(EVERYTHING) == []
    assert parser.held == len(payload)
    room = parser.get_buffer()
    assert len(room) == len(data) - 4096
    room[:] = data[4096:]
    parser.received(len(room))
    assert parser.next_batch(0) == []
    (request,) = parser.next_batch(1)
    assert parser.held == 0
    kept = request[5]
    assert kept is not None
    assert parser.detach(kept).obj is kept.obj
    feed(parser, compact(Command.WRITE, 2, 0, payload=b"n" * len(payload)))
    assert kept == payload


def test_detaching_from_the_receive_buffer_copies():
    """A payload that came through the receive buffer stays readable after its memory is used again."""
    parser = RequestParser(HeaderStyle.SIMPLE)
    buffer = parser.get_buffer()
    data = compact(Command.WRITE, 1, 0, payload=b"first")
    buffer[: len(data)] = data
    parser.received(len(data))
    (request,) = parser.next_batch(EVERYTHING)
    assert request[5] is not None
    kept = parser.detach(request[5])
    feed(parser, compact(Command.WRITE, 2, 0, payload=b"other"))
    assert kept == b"first"


def test_a_driver_that_takes_nothing_is_told():
    """Receiving into a buffer full of complete requests is a mistake of the driver."""
    parser = RequestParser(HeaderStyle.SIMPLE, buffer_size=56)
    buffer = parser.get_buffer()
    buffer[:] = compact(Command.FLUSH, 1) + compact(Command.FLUSH, 2)
    parser.received(56)
    with pytest.raises(LocalProtocolError):
        parser.get_buffer()


def test_bytes_that_the_handshake_received_too_much_come_first():
    """What arrived behind the handshake is the beginning of the stream."""
    parser = RequestParser(HeaderStyle.SIMPLE)
    data = compact(Command.READ, 1, 0, 512) + compact(Command.READ, 2, 0, 512)
    parser.prepend(data[:40])
    assert [request[2] for request in take(parser)] == [1]
    assert [request[2] for request in feed(parser, data[40:])] == [2]


@given(
    st.sampled_from([HeaderStyle.SIMPLE, HeaderStyle.EXTENDED]),
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.tuples(st.integers(0, 9), st.integers(0, 1 << 16), st.integers(0, 5000), st.integers(0, 63)),
        ),
        max_size=12,
    ),
    st.lists(st.integers(1, 700), min_size=1, max_size=9),
)
def test_any_stream_ends_in_requests_or_in_a_clean_error(
    style: HeaderStyle, parts: Iterable[bytes | tuple[int, int, int, int]], steps: list[int]
):
    """Whatever comes, memory stays bounded, complete requests come out, or the stream is declared lost."""
    encode = compact if style is HeaderStyle.SIMPLE else extended
    stream = b""
    for part in parts:
        if isinstance(part, bytes):
            stream += part
        else:
            command, offset, length, flags = part
            payload = bytes(min(length, 900)) if command == Command.WRITE else b""
            stream += encode(command, 1, offset, length, payload, flags)
    parser = RequestParser(style, payload_max=2048, buffer_size=512)
    position = turn = 0
    try:
        while position < len(stream) and not parser.ended:
            room = parser.get_buffer()
            assert 0 < len(room) <= 2048
            count = min(steps[turn % len(steps)], len(room), len(stream) - position)
            room[:count] = stream[position : position + count]
            parser.received(count)
            assert all(len(request[5] or b"") in (0, request[4]) for request in take(parser))
            assert parser.held <= 2048
            position += count
            turn += 1
    except RemoteProtocolError as error:
        assert str(error)  # noqa: PT017
