"""The bytes of one NBD connection on the event loop: a socket that the server owns, without a transport.

asyncio's transports copy what they receive and join what they send. Here the parser's own memory receives,
and replies leave in one scatter-gather call, headers and live memory side by side. What the kernel does not
take at once is copied, because live memory may change as soon as the loop turns, and goes out when the socket
is writable again.

There are two halves: coroutines for the handshake, where nothing is urgent, and callbacks for the transmission
(`start`), where everything is. They are not used at the same time.

`TlsStream` in `silo.exports.nbd_tls` has the same face.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from typing import Final

from silo.abc import Buffer
from silo.exports.nbd_replies import stabilise

__all__ = ["Stream"]

_IOV_MAX: Final = 1024
"""``UIO_MAXIOV``: more parts than that are sent in several calls."""
_HANDSHAKE_READ: Final = 16 * 1024


class Stream:
    """See the module. The stream owns the socket, which must be non-blocking, and closes it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.is_reading = False
        """Whether `resume` was called, and `pause` was not."""
        self._closed = False
        self._queue: list[Buffer] = []
        self.queued = 0
        """Bytes that wait for the socket to become writable."""
        self._on_readable: Callable[[], None] = _ignore
        self._on_drained: Callable[[], None] = _ignore

    # ---- the handshake's half ---------------------------------------------------------------------------

    async def receive(self) -> bytes:
        """Some bytes; none when the client has closed. ``OSError`` when the connection broke."""
        return await self._loop.sock_recv(self._sock, _HANDSHAKE_READ)

    async def send(self, data: bytes) -> None:
        """Send everything. Cancelled or failed, it may have sent any part."""
        await self._loop.sock_sendall(self._sock, data)

    # ---- the transmission's half ------------------------------------------------------------------------

    def start(self, on_readable: Callable[[], None], on_drained: Callable[[], None]) -> None:
        """Call ``on_readable`` when there are bytes and `resume` was called; ``on_drained`` when a queue has gone.

        Both may find that the connection broke.
        """
        self._on_readable, self._on_drained = on_readable, on_drained

    def resume(self) -> None:
        """Want bytes."""
        if not self.is_reading and not self._closed:
            self.is_reading = True
            self._loop.add_reader(self._sock, self._on_readable)

    def pause(self) -> None:
        """Want no bytes for now."""
        if self.is_reading:
            self.is_reading = False
            self._loop.remove_reader(self._sock)

    def receive_into(self, buffer: memoryview) -> int:
        """Receive what there is; 0 means that the client has closed. ``BlockingIOError`` when there is nothing."""
        return self._sock.recv_into(buffer)

    def unread(self) -> int:
        """Bytes that have arrived and were not received yet."""
        (count,) = struct.unpack("i", fcntl.ioctl(self._sock, termios.FIONREAD, bytes(4)))
        return int(count)

    def post(self, parts: list[Buffer]) -> None:
        """Send the parts in order: now as far as the socket takes them, the rest as copies later.

        The parts may be live memory; nothing refers to it afterwards. ``OSError`` when the connection broke.
        """
        if self.queued:
            self._enqueue(parts)
        else:
            rest = self._send(parts)
            if rest:
                self._enqueue(rest)
                self._loop.add_writer(self._sock, self._flush)

    def _enqueue(self, parts: list[Buffer]) -> None:
        stabilise(parts)
        self._queue += parts
        self.queued += sum(map(len, parts))

    def _send(self, parts: list[Buffer]) -> list[Buffer]:
        """Send until the socket is full; what is left."""
        while parts:
            window = parts[:_IOV_MAX] if len(parts) > _IOV_MAX else parts
            try:
                sent = self._sock.sendmsg(window)
            except BlockingIOError:
                return parts
            if sent == sum(map(len, window)):
                parts = parts[len(window) :]
            else:
                parts = _after(parts, sent)
        return parts

    def _flush(self) -> None:
        """The socket is writable."""
        try:
            self._queue = self._send(self._queue)
        except OSError:
            # The reader finds out as well, and ends the connection in its own way.
            self._queue = []
        self.queued = sum(map(len, self._queue))
        if not self.queued:
            self._loop.remove_writer(self._sock)
            self._on_drained()

    def release(self) -> socket.socket:
        """Give the socket away; the stream is closed without it."""
        self._closed = True
        return self._sock

    def close(self) -> None:
        """Close at once; queued bytes are lost. Twice is harmless."""
        if not self._closed:
            self._closed = True
            self.pause()
            if self.queued:
                self._loop.remove_writer(self._sock)
            self._queue, self.queued = [], 0
            self._sock.close()


def _ignore() -> None:
    """Before `Stream.start` nobody listens."""


def _after(parts: list[Buffer], sent: int) -> list[Buffer]:
    """The parts without their first ``sent`` bytes."""
    for index, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[index + 1 :]]
        sent -= len(part)
    return []
