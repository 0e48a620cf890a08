"""A little HTTP proxy that stands between a client and an S3 server and does what networks do.

It forwards every request unchanged, so that signatures still hold, over a connection of its own, except where a
`HttpFault` says otherwise. It speaks as much HTTP/1.1 as S3 clients do: bodies with Content-Length, or chunked on
the server's side; ``Expect: 100-continue``; connections that stay open.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fnmatch
import socket
import struct
from collections.abc import AsyncIterator
from typing import Self
from urllib.parse import urlsplit

import attrs

__all__ = ["Exchange", "FaultProxy", "HttpFault", "HttpFaultKind"]

HEADER_SIZE_MAX = 64 * 1024


class HttpFaultKind(enum.Enum):
    """What happens to a request."""

    STATUS = "answer with a status instead of forwarding"
    RESET = "reset the connection instead of forwarding"
    LOSE_RESPONSE = "forward, then reset the connection instead of answering"
    LATE = "reset the connection at once, and forward when the test says so"
    HOLD = "forward and answer only after the test says so"
    HANG = "neither forward nor answer"
    TRUNCATE = "forward, answer with half of the body, then reset the connection"
    CORRUPT = "forward, answer with one bit of the body flipped"


@attrs.define(eq=False)
class HttpFault:
    """A fault for matching requests: ``skip`` of them pass, then ``times`` suffer (None: all)."""

    kind: HttpFaultKind
    method: str = "*"
    path: str = "*"
    status: int = 503
    code: str = "SlowDown"
    skip: int = 0
    times: int | None = 1
    hits: int = attrs.field(default=0, init=False)

    def strikes(self, request: _Request) -> bool:
        if not fnmatch.fnmatchcase(request.method, self.method) or not fnmatch.fnmatchcase(
            request.path, self.path
        ):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True


@attrs.frozen
class Exchange:
    """One request that arrived, for tests that count or look."""

    method: str
    path: str
    headers: dict[str, str]
    body_size: int
    fault: HttpFaultKind | None


@attrs.frozen
class _Request:
    method: str
    path: str
    head: bytes
    headers: dict[str, str]
    body: bytes


class FaultProxy:
    """``async with FaultProxy(server.endpoint) as proxy``: then give ``proxy.url`` to the client as its endpoint."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self.faults: list[HttpFault] = []
        self.exchanges: list[Exchange] = []
        self.url = ""
        self.go = asyncio.Event()
        """Set by the test to let go of what HOLD keeps."""
        self.struck = asyncio.Event()
        """Set when any fault has struck."""
        self._late: list[_Request] = []
        self._handlers: set[asyncio.Task[None]] = set()

    def inject(self, kind: HttpFaultKind, method: str = "*", path: str = "*", **options) -> HttpFault:
        """Add a fault; ``options`` are the other fields of `HttpFault`."""
        fault = HttpFault(kind, method, path, **options)
        self.faults.append(fault)
        return fault

    async def land_late(self) -> None:
        """Forward now what LATE kept back."""
        for request in self._late:
            await self._forward(request)
        self._late.clear()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=HEADER_SIZE_MAX)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        handlers = list(self._handlers)
        for handler in handlers:
            handler.cancel()
        if handlers:
            await asyncio.wait(handlers)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        try:
            while request := await _read_request(reader, writer):
                if not await self._answer(request, writer):
                    _reset(writer)
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client left; it will say what it thinks of that
        except asyncio.CancelledError:
            return  # the proxy is closing, and waits for us
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()
            self._handlers.discard(handler)

    async def _answer(self, request: _Request, writer: asyncio.StreamWriter) -> bool:
        """False: the connection is to be reset."""
        fault = next((fault for fault in self.faults if fault.strikes(request)), None)
        kind = fault.kind if fault else None
        self.exchanges.append(
            Exchange(request.method, request.path, request.headers, len(request.body), kind)
        )
        if fault is not None:
            self.struck.set()
        match kind:
            case HttpFaultKind.STATUS if fault is not None:
                await _send(writer, _error(fault, request.method))
                return True
            case HttpFaultKind.RESET:
                return False
            case HttpFaultKind.LATE:
                self._late.append(request)
                return False
            case HttpFaultKind.HANG:
                await asyncio.Event().wait()  # until the client gives up, or the proxy closes
            case HttpFaultKind.HOLD:
                await self.go.wait()
        head, body = await self._forward(request)
        if kind is HttpFaultKind.LOSE_RESPONSE:
            return False
        if kind is HttpFaultKind.CORRUPT and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if kind is HttpFaultKind.TRUNCATE:
            await _send(writer, head + body[: len(body) // 2])
            return False
        await _send(writer, head + body)
        return True

    async def _forward(self, request: _Request) -> tuple[bytes, bytes]:
        """Send a request on; the answer's head, with a Content-Length, and its body."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request.head + request.body)
            await writer.drain()
            return await _read_response(reader, request.method)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, headers = _parse_head(head)
    method, path, _ = first.split(" ", 2)
    if headers.get("expect", "").lower() == "100-continue":
        await _send(writer, b"HTTP/1.1 100 Continue\r\n\r\n")
    if "transfer-encoding" in headers:
        raise AssertionError(f"{method} {path} was sent chunked; S3 gateways want a Content-Length")
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    kept = [
        line for line in head.split(b"\r\n")[:-2] if not line.lower().startswith((b"connection:", b"expect:"))
    ]
    return _Request(method, path, b"\r\n".join([*kept, b"Connection: close", b"", b""]), headers, body)


async def _read_response(reader: asyncio.StreamReader, method: str) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    _, headers = _parse_head(head)
    if method == "HEAD":
        body = b""
    elif "chunked" in headers.get("transfer-encoding", ""):
        body = b"".join([chunk async for chunk in _chunks(reader)])
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = await reader.read()
    dropped = (b"connection:", b"transfer-encoding:") + ((b"content-length:",) if method != "HEAD" else ())
    kept = [line for line in head.split(b"\r\n")[:-2] if not line.lower().startswith(dropped)]
    if method != "HEAD":
        kept.append(b"Content-Length: %d" % len(body))
    kept[0] = kept[0].replace(b"HTTP/1.0", b"HTTP/1.1")
    return b"\r\n".join([*kept, b"", b""]), body


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readline()


def _parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    return first, dict(_header(line) for line in lines if line)


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip().lower(), value.strip()


def _error(fault: HttpFault, method: str) -> bytes:
    body = f"<Error><Code>{fault.code}</Code><Message>by the test</Message></Error>".encode()
    head = f"HTTP/1.1 {fault.status} By The Test\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return head if method == "HEAD" else head + body


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN, as a connection that broke."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
