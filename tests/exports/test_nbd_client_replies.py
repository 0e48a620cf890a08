"""What the client makes of a server's replies: cut anywhere, in any order, and of nonsense."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from silo.errors import CapacityError, InvalidRequestError, RemoteProtocolError, SiloError, UnavailableError
from silo.exports.nbd_chunks import (
    OFFSET,
    encode_error,
    encode_error_offset,
    encode_offset_hole,
    encode_status,
    encode_status_extended,
)
from silo.exports.nbd_client_replies import STAGING_SIZE, ReplyReader
from silo.exports.nbd_client_request import NbdRequest
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import (
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
    NbdError,
)

CHUNKED = (HeaderStyle.STRUCTURED, HeaderStyle.EXTENDED)
CONTENT = bytes(range(256)) * 32
"""8 KiB in which every place differs from its neighbours."""


class Reading:
    """A reader with requests that wait, fed in pieces."""

    def __init__(self, style: HeaderStyle) -> None:
        self.style = style
        self.pending: dict[int, NbdRequest] = {}
        self.reader = ReplyReader(style, self.pending)

    def expect(self, cookie: int, command: Command, offset: int, length: int) -> NbdRequest:
        request = NbdRequest(cookie, command, offset, length)
        if command is Command.READ:
            request.into = memoryview(bytearray(b"?" * length))
        self.pending[cookie] = request
        return request

    def feed(self, data: bytes, piece: int = 1 << 30) -> list[NbdRequest]:
        """Receive the way that a socket does: at most ``piece`` bytes at a time, scattered over the buffers."""
        finished = []
        while data:
            count = 0
            for buffer in self.reader.buffers():
                taken = min(len(buffer), piece - count, len(data) - count)
                buffer[:taken] = data[count : count + taken]
                count += taken
            data = data[count:]
            finished += self.reader.received(count)
        return finished

    def chunk(self, request: NbdRequest, kind: int, payload: bytes = b"", *, done: bool = True) -> bytes:
        if self.style is HeaderStyle.EXTENDED:
            head = EXTENDED_REPLY.pack(
                EXTENDED_REPLY_MAGIC, done, kind, request.cookie, request.offset, len(payload)
            )
        else:
            head = STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, done, kind, request.cookie, len(payload))
        return head + payload

    def data(self, request: NbdRequest, start: int, content: bytes, *, done: bool = True) -> bytes:
        return self.chunk(request, ChunkType.OFFSET_DATA, OFFSET.pack(start) + content, done=done)

    def hole(self, request: NbdRequest, start: int, length: int, *, done: bool = True) -> bytes:
        return self.chunk(request, ChunkType.OFFSET_HOLE, encode_offset_hole(start, length), done=done)

    def status(
        self, request: NbdRequest, context: int, extents: list[tuple[int, int]], *, done: bool
    ) -> bytes:
        if self.style is HeaderStyle.EXTENDED:
            kind, encode = ChunkType.BLOCK_STATUS_EXT, encode_status_extended
        else:
            kind, encode = ChunkType.BLOCK_STATUS, encode_status
        return self.chunk(request, kind, encode(context, extents), done=done)


def simple(request: NbdRequest, code: int = 0) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, code, request.cookie)


def pieces(total: int) -> Iterator[int]:
    """Sizes to cut a stream into: single bytes, sizes that never align with anything, and all of it."""
    yield from (1, 7, 16, 21, 1000, total)


def content_of(into: memoryview) -> bytes:
    return bytes(into)


def test_simple_replies_in_any_order_and_cut_anywhere() -> None:
    """Reads, writes and a failure, interleaved, come out whole whatever the pieces are."""
    for piece in pieces(4096):
        case = Reading(HeaderStyle.SIMPLE)
        first = case.expect(1, Command.READ, 0, 100)
        second = case.expect(2, Command.WRITE, 0, 4096)
        third = case.expect(3, Command.READ, 512, 4096)
        fourth = case.expect(4, Command.READ, 0, 512)
        into = first.into, third.into, fourth.into
        stream = simple(third) + CONTENT[:4096] + simple(fourth, NbdError.EIO) + simple(second)
        stream += simple(first) + CONTENT[100:200]
        assert [third, fourth, second, first] == case.feed(stream, piece)
        assert (CONTENT[100:200], CONTENT[:4096], b"?" * 512) == tuple(map(content_of, into))
        assert [None, UnavailableError] == [third.error, type(fourth.error)]
        assert not case.pending


@pytest.mark.parametrize("style", CHUNKED)
def test_content_in_several_chunks(style: HeaderStyle) -> None:
    """Chunks of data and holes arrive in any order, between those of other requests."""
    for piece in pieces(9000):
        case = Reading(style)
        one = case.expect(1, Command.READ, 4096, 4096)
        two = case.expect(2, Command.READ, 0, 512)
        into = one.into
        stream = (
            case.data(one, 6144, CONTENT[2048:4096], done=False)
            + case.data(two, 0, CONTENT[:512])
            + case.hole(one, 5120, 1024, done=False)
            + case.data(one, 4096, CONTENT[:1024], done=False)
            + case.chunk(one, ChunkType.NONE)
        )
        assert [two, one] == case.feed(stream, piece)
        assert CONTENT[:1024] + bytes(1024) + CONTENT[2048:4096] == content_of(into)
        assert one.error is None


@pytest.mark.parametrize("style", [HeaderStyle.SIMPLE, *CHUNKED])
def test_a_payload_larger_than_the_staging_buffer(style: HeaderStyle) -> None:
    """Most of it is received in place: the reader offers the request's own memory."""
    length = 5 * STAGING_SIZE + 3
    content = (CONTENT * (length // len(CONTENT) + 1))[:length]
    for piece in (STAGING_SIZE // 3, 2 * STAGING_SIZE, 1 << 30):
        case = Reading(style)
        request = case.expect(9, Command.READ, 0, length)
        into = request.into
        stream = simple(request) + content if style is HeaderStyle.SIMPLE else case.data(request, 0, content)
        follower = case.expect(10, Command.WRITE, 0, 1)
        stream += simple(follower) if style is HeaderStyle.SIMPLE else case.chunk(follower, ChunkType.NONE)
        assert case.feed(stream[:STAGING_SIZE], piece) == []
        assert len(case.reader.buffers()) == 2, "the rest of the payload is to be received in place"
        assert [request, follower] == case.feed(stream[STAGING_SIZE:], piece)
        assert content == content_of(into)


@pytest.mark.parametrize("style", CHUNKED)
def test_errors_carry_the_servers_words(style: HeaderStyle) -> None:
    case = Reading(style)
    read = case.expect(1, Command.READ, 0, 8)
    write = case.expect(2, Command.WRITE, 0, 8)
    unknown = case.expect(3, Command.TRIM, 0, 8)
    stream = (
        case.data(read, 0, bytes(4), done=False)
        + case.chunk(read, ChunkType.ERROR_OFFSET, encode_error_offset(NbdError.EIO, 4, "bad sector"))
        + case.chunk(write, ChunkType.ERROR, encode_error(NbdError.ENOSPC, "full"), done=False)
        + case.chunk(write, ChunkType.NONE)
        + case.chunk(unknown, 1 << 15 | 77, encode_error(NbdError.EINVAL, "of a new kind") + b"more")
    )
    for piece in pieces(len(stream)):
        case = Reading(style)
        requests = [
            case.expect(1, Command.READ, 0, 8),
            case.expect(2, Command.WRITE, 0, 8),
            case.expect(3, Command.TRIM, 0, 8),
        ]
        assert requests == case.feed(stream, piece)
        errors = [request.error for request in requests]
        assert [UnavailableError, CapacityError, InvalidRequestError] == list(map(type, errors))
        assert [str(error).partition(": ")[2].partition(" (")[0] for error in errors] == [
            "bad sector",
            "full",
            "of a new kind",
        ]


def test_structured_peers_may_answer_simply_where_no_content_is_due() -> None:
    case = Reading(HeaderStyle.STRUCTURED)
    write = case.expect(1, Command.WRITE, 0, 8)
    read = case.expect(2, Command.READ, 0, 8)
    assert [write, read] == case.feed(simple(write) + simple(read, NbdError.EIO))
    assert (None, UnavailableError) == (write.error, type(read.error))


@pytest.mark.parametrize("style", CHUNKED)
def test_block_status(style: HeaderStyle) -> None:
    """One chunk per context, the last extent may go beyond what was asked for."""
    case = Reading(style)
    request = case.expect(1, Command.BLOCK_STATUS, 0, 1000)
    request.contexts = {3: "base:allocation", 4: "x:y"}
    stream = case.status(request, 4, [(5000, 1)], done=False)
    stream += case.status(request, 3, [(512, 0), (4096, 3)], done=True)
    for piece in pieces(len(stream)):
        case = Reading(style)
        request = case.expect(1, Command.BLOCK_STATUS, 0, 1000)
        request.contexts = {3: "base:allocation", 4: "x:y"}
        assert [request] == case.feed(stream, piece)
        assert request.status == {"base:allocation": [(512, 0), (4096, 3)], "x:y": [(5000, 1)]}


@pytest.mark.parametrize("style", [HeaderStyle.SIMPLE, *CHUNKED])
def test_a_forgotten_read_touches_its_memory_no_more(style: HeaderStyle) -> None:
    """Forgetting works before the reply, and at every point in the middle of its payload."""
    length = 2 * STAGING_SIZE
    for received in (0, 10, 100, STAGING_SIZE + 50, 2 * STAGING_SIZE + 10):
        case = Reading(style)
        request = case.expect(1, Command.READ, 0, length)
        into = request.into
        content = b"x" * length
        stream = simple(request) + content if style is HeaderStyle.SIMPLE else case.data(request, 0, content)
        case.feed(stream[:received])
        case.reader.forget(request)
        into[:] = b"m" * length
        follower = case.expect(2, Command.WRITE, 0, 1)
        stream += simple(follower) if style is HeaderStyle.SIMPLE else case.chunk(follower, ChunkType.NONE)
        assert [follower] == case.feed(stream[received:]), "the reply itself must not be reported"
        assert b"m" * length == content_of(into)
        assert not case.pending


Stream = Callable[[Reading, NbdRequest], bytes]

NONSENSE: dict[str, Stream] = {
    "no magic": lambda case, request: bytes(40),
    "an unknown cookie": lambda case, request: case.data(NbdRequest(99, Command.READ, 0, 8), 0, bytes(8)),
    "content before the extent": lambda case, request: case.data(request, 4088, bytes(16)),
    "content past the extent": lambda case, request: case.data(request, 4096, bytes(9)),
    "empty content": lambda case, request: case.data(request, 4096, b""),
    "a gap": lambda case, request: case.data(request, 4100, bytes(4)),
    "an overlap": lambda case, request: (
        case.data(request, 4096, bytes(4), done=False) + case.data(request, 4098, bytes(4))
    ),
    "too much": lambda case, request: (
        case.data(request, 4096, bytes(8), done=False) + case.data(request, 4096, bytes(1), done=False)
    ),
    "nothing at all": lambda case, request: case.chunk(request, ChunkType.NONE),
    "an open end": lambda case, request: case.chunk(request, ChunkType.NONE, done=False),
    "an end with content": lambda case, request: case.chunk(request, ChunkType.NONE, b"!"),
    "an unknown kind": lambda case, request: case.chunk(request, 77, b"!"),
    "status for a read": lambda case, request: case.status(request, 1, [(1, 1)], done=True),
    "an empty hole": lambda case, request: case.hole(request, 4096, 0),
    "a huge hole chunk": lambda case, request: case.chunk(request, ChunkType.OFFSET_HOLE, bytes(13)),
    "a huge error": lambda case, request: case.chunk(request, ChunkType.ERROR, bytes(5000)),
    "an error without code": lambda case, request: case.chunk(request, ChunkType.ERROR, bytes(6)),
    "a message longer than its chunk": lambda case, request: case.chunk(
        request, ChunkType.ERROR, struct.pack(">IH", 5, 100) + b"short"
    ),
}


@pytest.mark.parametrize("style", CHUNKED)
@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_named(style: HeaderStyle, nonsense: Stream) -> None:
    """It is `RemoteProtocolError`, at once or when the pieces have come, and never anything else."""
    for piece in (1, 1 << 20):
        case = Reading(style)
        stream = nonsense(case, case.expect(1, Command.READ, 4096, 8))
        with pytest.raises(RemoteProtocolError):
            case.feed(stream, piece)


def test_a_reply_in_endless_pieces_is_cut_short() -> None:
    """What it costs to remember them is bounded, whatever the server does."""
    case = Reading(HeaderStyle.STRUCTURED)
    length = 200_000
    request = case.expect(1, Command.READ, 0, length)
    even = b"".join(case.data(request, offset, b"x", done=False) for offset in range(0, length, 2))
    with pytest.raises(RemoteProtocolError, match="too many pieces"):
        case.feed(even)
    assert request.error is None


def test_pieces_in_order_are_not_counted() -> None:
    case = Reading(HeaderStyle.STRUCTURED)
    length = 100_000
    request = case.expect(1, Command.READ, 0, length)
    stream = b"".join(case.data(request, offset, b"x", done=False) for offset in range(length))
    assert case.feed(stream + case.chunk(request, ChunkType.NONE)) == [request]
    assert request.error is None


def test_nonsense_in_simple_style() -> None:
    case = Reading(HeaderStyle.SIMPLE)
    with pytest.raises(RemoteProtocolError):
        case.feed(bytes(16))
    with pytest.raises(RemoteProtocolError):
        Reading(HeaderStyle.SIMPLE).feed(simple(NbdRequest(5, Command.WRITE, 0, 1)))


def test_styles_are_not_mixed() -> None:
    """Content in a simple reply cannot be told from the next header once chunks were agreed upon."""
    case = Reading(HeaderStyle.STRUCTURED)
    with pytest.raises(RemoteProtocolError):
        case.feed(simple(case.expect(1, Command.READ, 0, 8)))
    case = Reading(HeaderStyle.EXTENDED)
    with pytest.raises(RemoteProtocolError):
        case.feed(simple(case.expect(1, Command.WRITE, 0, 8)))


def test_extended_replies_name_the_offset_of_their_request() -> None:
    case = Reading(HeaderStyle.EXTENDED)
    case.expect(1, Command.WRITE, 0, 8)
    with pytest.raises(RemoteProtocolError):
        case.feed(case.chunk(NbdRequest(1, Command.WRITE, 512, 8), ChunkType.NONE))


@pytest.mark.parametrize(
    ("told", "one"),
    [
        ([(5, [(1000, 0)])], False),
        ([(3, [(1000, 0)]), (3, [(1000, 0)])], False),
        ([(3, [(500, 0), (500, 1), (1, 0)])], False),
        ([(3, [(500, 0), (500, 1)])], True),
        ([(3, [(1001, 0)])], True),
        ([], False),
    ],
    ids=["unknown", "twice", "too much", "more than one", "one too long", "left out"],
)
def test_status_must_be_what_was_asked_for(told: list[tuple[int, list[tuple[int, int]]]], one: bool) -> None:
    case = Reading(HeaderStyle.EXTENDED)
    request = case.expect(1, Command.BLOCK_STATUS, 0, 1000)
    request.contexts, request.one = {3: "base:allocation"}, one
    stream = b"".join(case.status(request, context, extents, done=False) for context, extents in told)
    with pytest.raises(RemoteProtocolError):
        case.feed(stream + case.chunk(request, ChunkType.NONE))


def test_unknown_codes_are_still_errors() -> None:
    case = Reading(HeaderStyle.SIMPLE)
    request = case.expect(1, Command.WRITE, 0, 8)
    case.feed(simple(request, 4711))
    assert isinstance(request.error, SiloError)
    assert "4711" in str(request.error)
