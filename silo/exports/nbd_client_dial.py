"""Reaching an NBD server, and holding a conversation with it.

The conversations themselves are in `silo.exports.nbd_client_handshake`; here they meet a socket. Those that only ask
a question and part (`list_exports`, `describe_export`, `list_contexts`) are complete calls; `converse` is
for `silo.exports.nbd_client`, which keeps the connection. All of them have a deadline for the whole, raise
`UnavailableError` when the server cannot be reached in time, and leave nothing behind when they are cancelled.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Final, TypeVar

from silo.addresses import UnixAddress
from silo.errors import InvalidRequestError, InvariantError, UnavailableError
from silo.exports import nbd_client_handshake as handshake
from silo.exports.nbd_client_handshake import Conversation, ExportEntry, RemoteExport
from silo.exports.nbd_client_link import Link, TlsLink, client_context
from silo.exports.nbd_uri import NbdUri, parse_uri
from silo.threads import run_to_completion

__all__ = ["CONNECT_TIMEOUT_S", "converse", "describe_export", "list_contexts", "list_exports"]

T = TypeVar("T")

CONNECT_TIMEOUT_S: Final = 10.0
"""For reaching the server and agreeing with it."""
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""A peer that vanished without a word is noticed after 25 s: seconds, seconds, probes."""


async def list_exports(uri: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> list[ExportEntry]:
    """The exports that a server lists."""
    return await _ask(uri, handshake.list_exports(tls=parse_uri(uri).tls), timeout_s)


async def describe_export(
    uri: str, *, export: str | None = None, timeout_s: float = CONNECT_TIMEOUT_S
) -> RemoteExport:
    """Size and abilities of an export, without opening it."""
    target = parse_uri(uri)
    name = target.export if export is None else export
    return await _ask(uri, handshake.describe_export(name, tls=target.tls), timeout_s)


async def list_contexts(
    uri: str, *, export: str | None = None, queries: Sequence[str] = (), timeout_s: float = CONNECT_TIMEOUT_S
) -> list[str]:
    """The metadata contexts that an export has and that match any of the queries; all of them without queries."""
    target = parse_uri(uri)
    name = target.export if export is None else export
    return await _ask(uri, handshake.list_contexts(name, queries, tls=target.tls), timeout_s)


async def _ask(uri: str, conversation: Conversation[T], timeout_s: float) -> T:
    """Hold a conversation that ends the connection."""
    link, answer = await converse(parse_uri(uri), conversation, timeout_s)
    link.close()
    return answer


async def converse(target: NbdUri, conversation: Conversation[T], timeout_s: float) -> tuple[Link, T]:
    """Connect, and hold a conversation; the connection, for what comes after it, and the result."""
    context = await run_to_completion(None, client_context, target) if target.tls else None
    try:
        async with asyncio.timeout(timeout_s):
            link = Link(await _connect(target))
            try:
                return await _hold(link, conversation, context, target.server_name)
            except BaseException:
                link.close()
                raise
    except TimeoutError as error:
        raise UnavailableError(f"the NBD server at {target} did not answer in {timeout_s} s") from error
    except ssl.SSLCertVerificationError as error:
        raise InvalidRequestError(
            f"the certificate of the NBD server at {target} is not accepted: {error.verify_message}"
        ) from error
    except OSError as error:
        raise UnavailableError(f"the NBD server at {target} cannot be reached: {error}") from error


async def _connect(target: NbdUri) -> socket.socket:
    """A non-blocking connected socket, tuned for requests that must not wait for one another."""
    loop = asyncio.get_running_loop()
    if isinstance(target.address, UnixAddress):
        return await _connect_to(socket.AF_UNIX, target.address.path)
    host, port = target.address.host, target.address.port
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for index, (family, *_, address) in enumerate(found, start=1):
        try:
            connection = await _connect_to(family, address)
        except OSError:
            if index == len(found):
                raise
            continue
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        return connection
    raise InvalidRequestError(f"the host {host!r} has no address")


async def _connect_to(family: int, address: object) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, address)  # type: ignore[arg-type]
    except BaseException:
        connection.close()
        raise
    return connection


async def _hold(
    link: Link, conversation: Conversation[T], context: ssl.SSLContext | None, server_name: str
) -> tuple[Link, T]:
    """Move the bytes of a conversation until it ends."""
    try:
        step = next(conversation)
        while True:
            if isinstance(step, bytes):
                await link.send_all(step)
                step = conversation.send(b"")
            elif isinstance(step, int):
                step = conversation.send(await link.receive_exactly(step))
            elif context is not None:
                link = encrypted = TlsLink(link, context, server_name)
                await encrypted.shake_hands()
                step = conversation.send(b"")
            else:
                raise InvariantError("a conversation in the clear wanted to encrypt")
    except StopIteration as end:
        result: T = end.value
        return link, result
