"""The bytes of a client's connection: a socket, in the clear or encrypted.

The conversation before the transmission waits for what it needs (`Link.send_all`, `Link.receive_exactly`); the
transmission is called by the event loop and never waits (`Link.send`, `Link.receive`, which raise
``BlockingIOError`` instead). `TlsLink` has the same face: it keeps what was encrypted and is not sent yet
(`Link.flush`), and what was received and is not read yet (`Link.pending`), which makes no socket readable.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from silo.abc import Buffer
from silo.errors import InvalidRequestError, UnavailableError
from silo.exports.nbd_tls import using
from silo.exports.nbd_uri import NbdUri

__all__ = ["Link", "TlsLink", "client_context"]

_CIPHER_READ: Final = 256 * 1024
_PLAIN_WRITE: Final = 256 * 1024
"""Bytes that are encrypted at once; more would only wait in memory."""


def client_context(target: NbdUri) -> ssl.SSLContext:
    """How a server is verified, and what we show it, from the files that the URI names. Blocks.

    `InvalidRequestError` when a file cannot be used, or when nothing says which name the certificate must have.
    """
    if not target.server_name:
        raise InvalidRequestError(
            f"{target} does not say whose certificate to expect", hint="add tls-hostname=NAME to the URI"
        )
    if not target.certificates:
        return ssl.create_default_context()
    directory = Path(target.certificates)
    authority, own, key = (directory / f"{name}.pem" for name in ("ca-cert", "client-cert", "client-key"))
    with using(authority):
        context = ssl.create_default_context(cafile=authority)
    if own.exists():
        with using(own):
            context.load_cert_chain(own, key)
    return context


class Link:
    """A connected, non-blocking socket, which the link owns."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    async def send_all(self, data: bytes) -> None:
        """Send everything. Not while `send` is in use."""
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def receive_exactly(self, size: int) -> bytes:
        """So many bytes. `UnavailableError` when the server closes before. Not while `receive` is in use."""
        content = bytearray(size)
        position = 0
        while position < size:
            count = await self._receive_some(memoryview(content)[position:])
            if not count:
                raise UnavailableError("the NBD server closed the connection during the handshake")
            position += count
        return bytes(content)

    async def _receive_some(self, buffer: memoryview) -> int:
        return await asyncio.get_running_loop().sock_recv_into(self.socket, buffer)

    def send(self, buffers: Sequence[Buffer]) -> int:
        """Take the first bytes of these; how many. ``BlockingIOError`` when none can be taken now."""
        return self.socket.sendmsg(buffers)

    def flush(self) -> None:
        """Pass on what was taken and is not sent. ``BlockingIOError`` when not all of it could be."""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Receive into these, in order; 0 when the server has closed. ``BlockingIOError`` when there is nothing."""
        return self.socket.recvmsg_into(buffers)[0]

    @property
    def pending(self) -> bool:
        """Whether `receive` has something without the socket being readable."""
        return False

    def close(self) -> None:
        """Close at once. May be called twice."""
        self.socket.close()


class TlsLink(Link):
    """See the module. `shake_hands` comes first; it takes the socket over from a link in the clear."""

    def __init__(self, link: Link, context: ssl.SSLContext, server_name: str) -> None:
        super().__init__(link.socket)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._unsent = memoryview(b"")

    async def shake_hands(self) -> None:
        """Agree on keys, and see that the server is who it should be. ``OSError`` (`ssl.SSLError` is one) if not."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._send_outgoing()
                await self._fill()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    await self._send_outgoing()  # the alert that tells the server why
                raise
            else:
                return await self._send_outgoing()

    async def _send_outgoing(self) -> None:
        if self._outgoing.pending:
            await super().send_all(self._outgoing.read())

    async def _fill(self) -> None:
        buffer = bytearray(_CIPHER_READ)
        count = await super()._receive_some(memoryview(buffer))
        if not count:
            raise UnavailableError("the NBD server closed the connection during the handshake")
        self._incoming.write(memoryview(buffer)[:count])

    async def send_all(self, data: bytes) -> None:
        """As the link in the clear."""
        self._tls.write(data)
        await self._send_outgoing()

    async def _receive_some(self, buffer: memoryview) -> int:
        while True:
            try:
                return self._read(buffer)
            except ssl.SSLWantReadError:
                await self._fill()

    def _read(self, buffer: memoryview) -> int:
        # In this form the result is a number, which typeshed overlooks.
        return cast("int", self._tls.read(len(buffer), buffer))

    def send(self, buffers: Sequence[Buffer]) -> int:
        """As the link in the clear; what was taken may still wait for `flush`."""
        self.flush()
        taken = 0
        for buffer in buffers:
            part = memoryview(buffer)[: _PLAIN_WRITE - taken]
            if len(part):
                self._tls.write(part)
            taken += len(part)
            if taken == _PLAIN_WRITE:
                break
        with contextlib.suppress(BlockingIOError):
            self.flush()
        return taken

    def flush(self) -> None:
        """As the link in the clear."""
        if self._outgoing.pending:
            self._unsent = memoryview(bytes(self._unsent) + self._outgoing.read())
        while self._unsent:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """As the link in the clear. Fewer bytes than there is room for mean that nothing is `pending`."""
        filled = 0
        for buffer in buffers:
            position = 0
            while position < len(buffer):
                try:
                    count = self._read(buffer[position:])
                except ssl.SSLWantReadError:
                    if not self._receive_cipher(may_block=not filled):
                        return filled
                    continue
                except ssl.SSLZeroReturnError:
                    return filled
                if not count:
                    return filled
                position += count
                filled += count
        return filled

    def _receive_cipher(self, *, may_block: bool) -> bool:
        """Fetch more to decrypt; False when the server has closed, or when there is nothing now."""
        try:
            data = self.socket.recv(_CIPHER_READ)
        except BlockingIOError:
            if may_block:
                raise
            return False
        self._incoming.write(data)
        return bool(data)

    @property
    def pending(self) -> bool:
        """As the link in the clear."""
        return bool(self._tls.pending() or self._incoming.pending)
