"""An encrypted NBD connection: the face of a `Stream`, with TLS between it and the socket.

The encryption works on memory (`ssl.MemoryBIO`), so the same session and the same driver serve both kinds of
connection, and many small replies become few records and one system call. TLS 1.2 is the oldest version; who
must show a certificate is a matter of the context (`server_context`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self, cast

import attrs

from silo.abc import Buffer
from silo.errors import InvalidRequestError
from silo.exports.nbd_catalog import TlsPolicy
from silo.exports.nbd_stream import Stream

__all__ = ["NbdTls", "TlsStream", "server_context", "using"]

_CIPHER_READ: Final = 256 * 1024


@attrs.frozen
class NbdTls:
    """How a server encrypts. With ``REQUIRED`` nothing but ``STARTTLS`` is answered before."""

    context: ssl.SSLContext
    policy: TlsPolicy = TlsPolicy.REQUIRED

    @classmethod
    def from_files(
        cls,
        certificate: str | os.PathLike[str],
        key: str | os.PathLike[str],
        *,
        client_authority: str | os.PathLike[str] | None = None,
        clients_must_show: bool = True,
        required: bool = True,
    ) -> Self:
        """From PEM files, which are read now, in the calling thread.

        With ``client_authority`` only clients with a certificate that it has signed are let in; without
        ``clients_must_show`` a client may also show none. ``required``: nothing is served in the clear.
        `InvalidRequestError` when a file cannot be used, or they do not fit together.
        """
        authority = None if client_authority is None else Path(client_authority)
        context = server_context(
            Path(certificate),
            Path(key),
            authority=authority,
            require_client=authority is not None and clients_must_show,
        )
        return cls(context, TlsPolicy.REQUIRED if required else TlsPolicy.OPTIONAL)

    async def upgrade(self, stream: Stream) -> Stream:
        """Encrypt a connection from here on. Whatever fails closes it."""
        encrypted = TlsStream(stream.release(), self.context)
        try:
            await encrypted.shake_hands()
        except BaseException:
            encrypted.close()
            raise
        return encrypted


def server_context(
    certificate: Path, key: Path, *, authority: Path | None = None, require_client: bool = False
) -> ssl.SSLContext:
    """A context from PEM files. With ``authority`` clients may show a certificate that it has signed, or must.

    `InvalidRequestError` when the files do not fit together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with using(certificate):
        # Without a passphrase callback a protected key would ask on the terminal, or wait for ever without one.
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    if authority is not None:
        with using(authority):
            context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_OPTIONAL
    if require_client and authority is None:
        raise InvalidRequestError(
            "client certificates are required and nobody is trusted", hint="name an authority"
        )
    return context


@contextlib.contextmanager
def using(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a PEM file into an `InvalidRequestError` that names it."""
    try:
        yield
    except OSError as error:  # of the file system, or of `ssl`
        raise InvalidRequestError(f"cannot use {path}: {error.strerror or error}") from error


def _no_passphrase() -> str:
    raise InvalidRequestError(
        "the key is protected by a passphrase", hint="decrypt it and protect the file instead"
    )


class TlsStream(Stream):
    """See the module. `shake_hands` comes first."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(sock)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._again: asyncio.Handle | None = None

    async def shake_hands(self) -> None:
        """Agree on keys. ``OSError`` (`ssl.SSLError` is one) when that fails; the connection must then be closed."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._send_outgoing()
                if not await self._fill():
                    raise ConnectionResetError("the client left during the TLS handshake") from None
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    await self._send_outgoing()  # the alert that tells the client why
                raise
            else:
                await self._send_outgoing()
                return

    async def _send_outgoing(self) -> None:
        if self._outgoing.pending:
            await super().send(self._outgoing.read())

    async def _fill(self) -> bool:
        data = await super().receive()
        self._incoming.write(data)
        return bool(data)

    async def receive(self) -> bytes:
        while True:
            try:
                return self._tls.read(16 * 1024)
            except ssl.SSLWantReadError:
                if not await self._fill():
                    return b""

    async def send(self, data: bytes) -> None:
        if data:
            self._tls.write(data)
            await self._send_outgoing()

    def resume(self) -> None:
        super().resume()
        # What is already decrypted, or waits to be, does not make the socket readable.
        if self._again is None and (self._tls.pending() or self._incoming.pending):
            self._again = self._loop.call_soon(self._read_again)

    def _read_again(self) -> None:
        self._again = None
        if self.is_reading:
            self._on_readable()

    def receive_into(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer):
            try:
                # In this form the result is a number, which typeshed overlooks.
                count = cast("int", self._tls.read(len(buffer) - filled, buffer[filled:]))
            except ssl.SSLWantReadError:
                if filled:
                    break
                data = self._sock.recv(_CIPHER_READ)
                if not data:
                    return 0
                self._incoming.write(data)
            else:
                filled += count
                if not count:
                    break  # the client has said goodbye
        return filled

    def unread(self) -> int:
        return super().unread() + self._incoming.pending + self._tls.pending()

    def post(self, parts: list[Buffer]) -> None:
        self._tls.write(b"".join(parts))
        super().post([self._outgoing.read()])

    def close(self) -> None:
        if not self._closed:
            # Best effort: say goodbye so that the client can tell an end from a cut.
            with contextlib.suppress(OSError):
                self._tls.unwrap()
            with contextlib.suppress(OSError):
                if not self.queued:
                    self._sock.send(self._outgoing.read())
        if self._again is not None:
            self._again.cancel()
            self._again = None
        super().close()
