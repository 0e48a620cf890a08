"""Our NBD server as a child process, and a raw client that can say anything.

The server is the one of the benchmarks (``benchmarks.nbd.serve_silo``), so tests and numbers are about the
same thing. The raw client sends what no decent client would: it knows how messages look, and checks nothing.
"""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from benchmarks.common.child import ListeningChild, listen_tcp, listen_unix
from silo.exports.nbd_options import encode_info_request, encode_option
from silo.exports.nbd_wire import (
    CLIENT_FLAGS,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    GREETING,
    OPTION_REPLY,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    Option,
    OptionReply,
    ReplyFlag,
)

__all__ = ["NbdServerProcess", "RawClient", "RawReply"]


class NbdServerProcess(ListeningChild):
    """Serves one volume under the name ``disk``, on a Unix socket or on TCP."""

    def __init__(self, directory: Path, *options: str, tcp: bool = False) -> None:
        listener = listen_tcp() if tcp else listen_unix(directory / "nbd.sock")
        argv = [sys.executable, "-m", "benchmarks.nbd.serve_silo", *options]
        super().__init__(argv, listener, directory / "server.log")

    def connect(self) -> socket.socket:
        """A connection on which nothing has been said yet, with a deadline on everything."""
        family = socket.AF_INET if isinstance(self.address, tuple) else socket.AF_UNIX
        connection = socket.socket(family)
        connection.settimeout(20)
        connection.connect(self.address)
        return connection

    def raw(self) -> RawClient:
        """A client that can say anything."""
        return RawClient(self.connect())


@attrs.frozen
class RawReply:
    """The answer to a request: its error code (0 for success), and the payloads of its chunks."""

    code: int
    payload: bytes


class RawClient:
    """Speaks NBD a message at a time, without judgment."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.extended = False
        self.structured = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.connection.sendall(data)

    def receive(self, size: int) -> bytes:
        """Exactly so many bytes; ``EOFError`` when the server closes before."""
        content = b""
        while len(content) < size:
            part = self.connection.recv(size - len(content))
            if not part:
                raise EOFError(f"the server closed after {len(content)} of {size} bytes")
            content += part
        return content

    def is_closed(self) -> bool:
        """Wait until the server closes; whatever it still says is dropped. True, or the deadline's error."""
        try:
            while self.connection.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        return True

    # The handshake

    def greet(self, flags: int = 3) -> int:
        """Exchange greetings; the server's flags."""
        _, _, offered = GREETING.unpack(self.receive(GREETING.size))
        self.send(CLIENT_FLAGS.pack(flags))
        return int(offered)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; all replies to it, the last of which is an ACK or an error."""
        self.send(encode_option(option, data))
        replies: list[tuple[int, bytes]] = []
        while not replies or (replies[-1][0] != OptionReply.ACK and replies[-1][0] < 1 << 31):
            _, to, kind, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
            assert to == option, "the reply is to another option"
            replies.append((kind, self.receive(length)))
        return replies

    def go(self, name: str = "disk", *, style: Option | None = None) -> None:
        """Greet, agree on headers, and enter transmission."""
        self.greet()
        if style is not None:
            assert self.option(style)[-1][0] == OptionReply.ACK
            self.extended = style is Option.EXTENDED_HEADERS
            self.structured = not self.extended
        assert self.option(Option.GO, encode_info_request(name))[-1][0] == OptionReply.ACK

    # Transmission

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
        *,
        flags: int = 0,
        cookie: int = 1,
    ) -> None:
        """Send a request. With a payload and extended headers, PAYLOAD_LEN is the caller's to set."""
        if self.extended:
            header = EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
        else:
            header = REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
        self.send(header + payload)

    def reply(self, *, read: int = 0, cookie: int = 1) -> RawReply:
        """Receive one whole reply; ``read`` is the number of bytes that a simple reply to a read brings."""
        if not (self.extended or self.structured):
            _, code, found = SIMPLE_REPLY.unpack(self.receive(SIMPLE_REPLY.size))
            assert found == cookie
            return RawReply(code, b"" if code else self.receive(read))
        code, payload = 0, b""
        while True:
            header = EXTENDED_REPLY if self.extended else STRUCTURED_REPLY
            magic, flags, kind, found, *_, length = header.unpack(self.receive(header.size))
            assert magic == (EXTENDED_REPLY_MAGIC if self.extended else STRUCTURED_REPLY_MAGIC)
            assert found == cookie
            part = self.receive(length)
            payload += part
            if kind & 1 << 15:
                (code,) = struct.unpack_from(">I", part)
            if flags & ReplyFlag.DONE:
                return RawReply(code, payload)

    def ask(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
        *,
        flags: int = 0,
        read: int = 0,
    ) -> RawReply:
        """A request and its reply."""
        self.request(command, offset, length, payload, flags=flags)
        return self.reply(read=read)
