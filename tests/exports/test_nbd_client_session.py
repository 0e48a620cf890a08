"""The client's requests, read back by the server's own parser, and what remains of those that were given up."""

from __future__ import annotations

import pytest

from silo.errors import InvalidRequestError
from silo.exports.nbd_chunks import decode_status_filter
from silo.exports.nbd_client_handshake import RemoteExport
from silo.exports.nbd_client_session import ClientSession
from silo.exports.nbd_options import BlockSizes
from silo.exports.nbd_replies import replies_for
from silo.exports.nbd_session import HeaderStyle, RequestParser
from silo.exports.nbd_wire import Command, CommandFlag, TransmissionFlag

ALL = TransmissionFlag((1 << 13) - 1) & ~TransmissionFlag.READ_ONLY
SIZE = 1 << 40


def export(
    style: HeaderStyle = HeaderStyle.SIMPLE, flags: TransmissionFlag = ALL, size: int = SIZE
) -> RemoteExport:
    return RemoteExport(
        "disk", size, flags, style, BlockSizes(512, 4096, 1 << 20), {1: "base:allocation", 2: "x:y"}
    )


class Pair:
    """A client's session and a server's parser, with a wire between them that breaks where it is told to."""

    def __init__(self, style: HeaderStyle) -> None:
        self.client = ClientSession(export(style))
        self.server = RequestParser(style)
        self.replies = replies_for(style)
        self.arrived: list[tuple[int, int, int, int, int, bytes | None]] = []

    def send(self, count: int = 1 << 30) -> None:
        """Let up to ``count`` bytes of the client's pass."""
        while count and (outgoing := b"".join(self.client.outgoing())):
            buffer = self.server.get_buffer()
            passed = min(count, len(outgoing), len(buffer))
            buffer[:passed] = outgoing[:passed]
            self.server.received(passed)
            self.client.sent(passed)
            count -= passed
            while batch := self.server.next_batch(1 << 30):
                self.arrived += [
                    (*request[:5], None if request[5] is None else bytes(request[5])) for request in batch
                ]

    def answer(self, data: bytes) -> list[int]:
        """Let the client receive; the cookies of the requests that are finished by it."""
        buffer = self.client.buffers()[0]
        buffer[: len(data)] = data
        return [request.cookie for request in self.client.received(len(data))]


@pytest.mark.parametrize("style", list(HeaderStyle))
@pytest.mark.parametrize("piece", [1, 5, 1 << 30])
def test_requests_arrive_as_they_were_meant(style: HeaderStyle, piece: int) -> None:
    pair = Pair(style)
    into = bytearray(512)
    cookies = [
        pair.client.read(1024, memoryview(into)),
        pair.client.write(512, memoryview(b"w" * 512), flags=CommandFlag.FUA),
        pair.client.command(Command.FLUSH),
        pair.client.command(Command.TRIM, 0, 4096),
        pair.client.command(
            Command.WRITE_ZEROES, 4096, 512, flags=CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO
        ),
        pair.client.command(Command.CACHE, 0, 1 << 30),
        pair.client.block_status(0, 8192, one=True),
    ]
    pair.client.disconnect()
    while pair.client.outgoing():
        pair.send(piece)
    assert [
        (Command.READ, 0, cookies[0], 1024, 512, None),
        (Command.WRITE, CommandFlag.FUA, cookies[1], 512, 512, b"w" * 512),
        (Command.FLUSH, 0, cookies[2], 0, 0, None),
        (Command.TRIM, 0, cookies[3], 0, 4096, None),
        (Command.WRITE_ZEROES, CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO, cookies[4], 4096, 512, None),
        (Command.CACHE, 0, cookies[5], 0, 1 << 30, None),
        (Command.BLOCK_STATUS, CommandFlag.REQ_ONE, cookies[6], 0, 8192, None),
    ] == pair.arrived
    assert pair.server.ended
    assert pair.client.in_flight == 7
    content = bytes(range(256)) * 2
    assert [cookies[2]] == pair.answer(pair.replies.done(cookies[2], 0))
    assert [cookies[0]] == pair.answer(pair.replies.data(cookies[0], 1024, 512) + content)
    assert content == into
    assert pair.client.in_flight == 5


def test_the_buffer_of_a_finished_read_is_free() -> None:
    """A bytearray of which somebody holds a view cannot be resized."""
    pair = Pair(HeaderStyle.SIMPLE)
    into = bytearray(512)
    cookie = pair.client.read(0, memoryview(into))
    pair.answer(pair.replies.data(cookie, 0, 512) + bytes(512))
    into.append(1)
    assert len(into) == 513


def test_status_of_some_contexts_and_64_bits() -> None:
    """Extended headers carry a filter, and lengths beyond 4 GiB."""
    pair = Pair(HeaderStyle.EXTENDED)
    cookie = pair.client.block_status(0, 1 << 36, contexts=["x:y"])
    pair.client.command(Command.WRITE_ZEROES, 0, 1 << 36)
    pair.send()
    (command, flags, arrived, offset, _, payload), zeroes = pair.arrived
    assert (Command.BLOCK_STATUS, CommandFlag.PAYLOAD_LEN, cookie, 0) == (command, flags, arrived, offset)
    assert decode_status_filter(payload) == (1 << 36, (2,))
    assert zeroes[4] == 1 << 36


def test_giving_up_before_anything_left_means_that_nothing_happened() -> None:
    pair = Pair(HeaderStyle.SIMPLE)
    kept = pair.client.write(0, memoryview(b"k" * 512))
    dropped = pair.client.write(512, memoryview(b"d" * 512))
    also_kept = pair.client.read(0, memoryview(bytearray(512)))
    pair.send(5)
    pair.client.abandon(dropped)
    assert pair.client.in_flight == 2
    pair.send()
    assert [kept, also_kept] == [request[2] for request in pair.arrived]


@pytest.mark.parametrize("passed", [1, 27, 28, 29, 300])
def test_giving_up_half_way_sends_what_was_promised(passed: int) -> None:
    """The caller may reuse its memory at once; the write goes on with the bytes that it had then."""
    pair = Pair(HeaderStyle.SIMPLE)
    data = bytearray(b"a" * 512)
    cookie = pair.client.write(0, memoryview(data))
    follower = pair.client.command(Command.FLUSH)
    pair.send(passed)
    pair.client.abandon(cookie)
    data[:] = b"b" * 512
    pair.send()
    assert [request[5] for request in pair.arrived] == [b"a" * 512, None]
    assert pair.client.in_flight == 2
    done = pair.replies.done
    assert [follower] == pair.answer(done(cookie, 0) + done(follower, 0)), "its reply is consumed and dropped"
    assert pair.client.in_flight == 0


def test_giving_up_twice_or_too_late_is_nothing() -> None:
    pair = Pair(HeaderStyle.STRUCTURED)
    cookie = pair.client.read(0, memoryview(bytearray(512)))
    pair.send()
    pair.client.abandon(cookie)
    pair.client.abandon(cookie)
    assert pair.answer(pair.replies.data(cookie, 0, 512) + bytes(512)) == []
    pair.client.abandon(cookie)
    assert pair.client.in_flight == 0


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0), (-512, 512), (SIZE, 512), (SIZE - 512, 1024), (1, 512), (0, 100), (0, 0x1_0000_0000)],
)
def test_refuses_extents_that_the_export_does_not_have(offset: int, length: int) -> None:
    with pytest.raises(InvalidRequestError):
        ClientSession(export()).command(Command.TRIM, offset, length)


def test_refuses_what_was_not_offered() -> None:
    bare = ClientSession(export(flags=TransmissionFlag.HAS_FLAGS))
    data = memoryview(bytes(512))
    for ask in (
        lambda: bare.command(Command.FLUSH),
        lambda: bare.command(Command.TRIM, 0, 512),
        lambda: bare.command(Command.CACHE, 0, 512),
        lambda: bare.command(Command.WRITE_ZEROES, 0, 512),
        lambda: bare.write(0, data, flags=CommandFlag.FUA),
        lambda: bare.block_status(0, 512, contexts=["x:y"]),
        lambda: bare.read(0, data),
        lambda: bare.read(0, memoryview(bytearray((1 << 20) + 512))),
        lambda: ClientSession(RemoteExport("", 512, ALL)).block_status(0, 512),
        lambda: ClientSession(export()).block_status(0, 512, contexts=["no:such"]),
        lambda: ClientSession(export(flags=ALL | TransmissionFlag.READ_ONLY)).write(0, data),
    ):
        with pytest.raises(InvalidRequestError):
            ask()
    assert bare.outgoing() == []
    assert bare.in_flight == 0
