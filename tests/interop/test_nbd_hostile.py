"""Clients that vanish, babble, dawdle or ask for what they may not have; and what is left of everybody else."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct

import pytest

from benchmarks.common.child import resident_bytes
from silo.exports.nbd_client import NbdClient
from silo.exports.nbd_options import encode_info_request, encode_option
from silo.exports.nbd_wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    OPTION,
    OPTION_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Command,
    NbdError,
    Option,
    OptionReply,
)
from tests.interop.conftest import EXPORT_SIZE, StartServer
from tests.support.nbd import NbdServerProcess, RawClient

pytestmark = pytest.mark.interop

MIB = 1 << 20
STYLES = [None, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS]
PAYLOAD_LEN = 1 << 5


def assert_serves(server: NbdServerProcess) -> None:
    """A decent client gets what it asks for."""
    server.check()
    with server.raw() as client:
        client.go()
        content = os.urandom(512)
        assert client.ask(Command.WRITE, 8 * MIB, 512, content).code == 0
        assert client.ask(Command.READ, 8 * MIB, 512, read=512).payload == content


def content_at(server: NbdServerProcess, offset: int, length: int) -> bytes:
    with server.raw() as client:
        client.go()
        return client.ask(Command.READ, offset, length, read=length).payload


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(4096), b"\xff" * 4096, b"\x00\x00\x00\x03" + b"!" * 64],
    ids=["http", "zeros", "ones", "after the flags"],
)
def test_garbage_before_the_handshake(served: NbdServerProcess, garbage: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        assert RawClient(connection).is_closed()
    assert_serves(served)


@pytest.mark.parametrize("style", STYLES)
def test_garbage_after_the_handshake(served: NbdServerProcess, style: Option | None) -> None:
    """The server hangs up, on this client only."""
    with served.raw() as client:
        client.go(style=style)
        assert client.ask(Command.FLUSH).code == 0
        client.send(b"garbage" * 100)
        assert client.is_closed()
    assert_serves(served)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("length", [512, 65536, 4 * MIB])
def test_a_client_that_vanishes_in_a_write_has_written_nothing(
    served: NbdServerProcess, style: Option | None, length: int
) -> None:
    """All of the payload but its last byte has come, or half of it, or none."""
    flags = PAYLOAD_LEN if style is Option.EXTENDED_HEADERS else 0
    before = content_at(served, 0, length)
    for sent in (0, length // 2, length - 1):
        with served.raw() as client:
            client.go(style=style)
            client.request(Command.WRITE, 0, length, bytes(b ^ 0xFF for b in before[:sent]), flags=flags)
            client.connection.shutdown(socket.SHUT_WR)
            assert client.is_closed()
    assert content_at(served, 0, length) == before


def test_a_client_that_resets_the_connection(served: NbdServerProcess) -> None:
    """With replies unread and a write half sent: RST instead of FIN."""
    for _ in range(10):
        client = served.raw()
        client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.go()
        client.request(Command.READ, 0, 4 * MIB)
        client.request(Command.WRITE, 0, 4096, b"half")
        client.connection.close()
    assert_serves(served)


def test_a_slow_client_is_served_in_the_end(served: NbdServerProcess) -> None:
    """Byte by byte, through handshake and transmission, with other clients served in between."""
    content = os.urandom(512)
    with served.raw() as slow:
        slow.receive(GREETING.size)
        for byte in CLIENT_FLAGS.pack(3) + encode_option(Option.EXPORT_NAME, b"disk"):
            slow.send(bytes([byte]))
        assert_serves(served)
        slow.receive(EXPORT_NAME_REPLY.size)
        for byte in REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, 1, 0, 512) + content:
            slow.send(bytes([byte]))
        assert slow.reply().code == 0
        assert_serves(served)
    assert content_at(served, 0, 512) == content


def test_clients_that_say_nothing_stand_in_nobodys_way(served: NbdServerProcess) -> None:
    """Half-open ones, some before and some in the middle of the handshake."""
    silent = [served.connect() for _ in range(20)]
    for connection in silent[10:]:
        connection.sendall(CLIENT_FLAGS.pack(3) + OPTION.pack(OPTION_MAGIC, Option.GO, 100)[:11])
    assert_serves(served)
    for connection in silent:
        connection.close()
    assert_serves(served)


def test_a_client_that_does_not_listen_stops_itself_only(start_server: StartServer) -> None:
    """It asks for gigabytes and reads none of them: the server's memory stays bounded, others are served."""
    server = start_server("--memory", str(EXPORT_SIZE))
    with server.raw() as client:
        client.go()
        for offset in range(0, EXPORT_SIZE, MIB):
            assert client.ask(Command.WRITE, offset, MIB, b"x" * MIB).code == 0
    before = resident_bytes(server.pid)
    deaf = [server.raw() for _ in range(8)]
    for client in deaf:
        client.go()
        client.connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                client.send(REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, 1, 0, 4 * MIB))
    assert_serves(server)
    assert resident_bytes(server.pid) - before < 128 * MIB
    for client in deaf:
        client.connection.close()
    assert_serves(server)


def test_unknown_options_are_answered_and_passed(served: NbdServerProcess) -> None:
    """With and without data, known kinds with data that they must not have, and then business as usual."""
    with served.raw() as client:
        client.greet()
        assert client.option(4711, b"what is this")[-1][0] == OptionReply.ERR_UNSUP
        assert client.option(Option.STARTTLS)[-1][0] in (OptionReply.ERR_UNSUP, OptionReply.ERR_POLICY)
        for option in (Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
            assert client.option(option, b"data")[-1][0] == OptionReply.ERR_INVALID
        for data in (b"", b"\0\0\0\x10disk", b"\0\0\0\x04disk\0\5\0\0", b"\xff" * 8, b"\0\0\0\2\xff\xfe\0\0"):
            assert client.option(Option.GO, data)[-1][0] == OptionReply.ERR_INVALID
        assert client.option(Option.GO, encode_info_request("disk"))[-1][0] == OptionReply.ACK
        assert client.ask(Command.READ, 0, 512, read=512).code == 0


def test_options_without_measure(served: NbdServerProcess) -> None:
    """A huge one is skipped or ends the connection, and so does a flood; the server's memory does not follow."""
    before = resident_bytes(served.pid)
    with served.raw() as client:
        client.greet()
        try:
            client.send(OPTION.pack(OPTION_MAGIC, Option.GO, 1 << 31))
            for _ in range(64):
                client.send(bytes(MIB))
        except (BrokenPipeError, ConnectionResetError):
            assert client.is_closed()
    with served.raw() as client:
        client.greet()
        with pytest.raises((EOFError, ConnectionError)):
            for _ in range(100_000):
                client.option(4711)
    assert resident_bytes(served.pid) - before < 16 * MIB
    assert_serves(served)


@pytest.mark.parametrize("style", STYLES)
def test_unknown_commands(served: NbdServerProcess, style: Option | None) -> None:
    with served.raw() as client:
        client.go(style=style)
        assert client.ask(99, 0, 512).code == NbdError.EINVAL
        assert client.ask(8, 0, 512).code == NbdError.EINVAL
        assert client.ask(Command.FLUSH).code == 0
        assert client.ask(Command.FLUSH, 512, 512).code == NbdError.EINVAL
        assert client.ask(Command.READ, 0, 512, read=512).code == 0


def test_disconnect_finishes_what_came_before(served: NbdServerProcess) -> None:
    """DISC right behind a thousand writes: all of them are answered and done, then the connection ends."""
    with served.raw() as client:
        client.go()
        client.send(
            b"".join(
                REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, 1, index * 512, 512)
                + bytes([index % 251]) * 512
                for index in range(1000)
            )
            + REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0)
        )
        assert [client.reply().code for _ in range(1000)] == [0] * 1000
        assert client.is_closed()
    assert content_at(served, 0, 512_000) == b"".join(bytes([index % 251]) * 512 for index in range(1000))


def test_a_reconnected_client_is_not_overtaken_by_its_past(served: NbdServerProcess) -> None:
    """Writes that an older connection had sent never land over what a newer one was told is written."""
    length = 256 * 1024
    for attempt in range(20):
        old = served.raw()
        old.go()
        old.connection.setblocking(False)
        for cookie in range(8):
            try:
                old.request(Command.WRITE, 0, length, b"o" * length, cookie=cookie)
            except BlockingIOError:
                break
        with served.raw() as new:
            new.go()
            content = bytes([attempt + 1]) * length
            assert new.ask(Command.WRITE, 0, length, content).code == 0
            old.connection.close()
            assert new.ask(Command.READ, 0, length, read=length).payload == content
            assert_serves(served)
            assert new.ask(Command.READ, 0, length, read=length).payload == content


async def test_many_connections_at_once(served: NbdServerProcess) -> None:
    """Each writes and reads its own part at depth; a flush on one of them covers the others."""
    clients = [await NbdClient.connect(served.uri("disk")) for _ in range(64)]

    async def work(client: NbdClient, base: int) -> None:
        for turn in range(8):
            content = os.urandom(16 * 1024)
            offset = base + turn * len(content)
            await client.write(offset, content)
            assert await client.read(offset, len(content)) == content

    async with asyncio.TaskGroup() as tasks:
        for index, client in enumerate(clients):
            for lane in range(4):
                tasks.create_task(work(client, (4 * index + lane) * 128 * 1024))
    await clients[0].flush()
    for client in clients:
        await client.aclose()
    assert_serves(served)


@pytest.mark.parametrize("seed", range(10))
def test_noise_never_harms_anybody_else(served: NbdServerProcess, seed: int) -> None:
    """Valid beginnings with bytes flipped behind them: a clean error or the end of that connection, no more."""
    chance = random.Random(seed)
    stream = bytearray(
        CLIENT_FLAGS.pack(3)
        + encode_option(Option.STRUCTURED_REPLY)
        + encode_option(Option.GO, encode_info_request("disk"))
        + b"".join(
            REQUEST.pack(REQUEST_MAGIC, 0, chance.randrange(9), index, chance.randrange(0, 1 << 20, 512), 512)
            + bytes(512)
            for index in range(50)
        )
    )
    for _ in range(chance.randrange(1, 8)):
        stream[chance.randrange(len(stream))] ^= 1 << chance.randrange(8)
    with served.connect() as connection:
        try:
            connection.sendall(stream)
            connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert RawClient(connection).is_closed()
    assert_serves(served)
