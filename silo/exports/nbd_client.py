"""An NBD client for asyncio: many requests in flight over one socket.

`NbdClient` moves bytes between a socket and a `ClientSession`, which knows the protocol, and wakes whoever waits.
It has no task of its own: the event loop calls it when the socket is readable or writable. Requests that
are made in the same turn of the loop leave in one gathered send; replies are received in place (see
`silo.exports.nbd_client_replies`).

A connection that is lost stays lost: every call in flight and every later one raises `UnavailableError`.
Connecting again, and deciding what may be asked again, is the caller's business, because only the caller knows
which of its writes it may repeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from silo.abc import Buffer
from silo.errors import ClosedError, RemoteProtocolError, SiloError, UnavailableError
from silo.exports.nbd_client_dial import CONNECT_TIMEOUT_S, converse
from silo.exports.nbd_client_handshake import RICHEST_FIRST, RemoteExport, open_export
from silo.exports.nbd_client_link import Link
from silo.exports.nbd_client_request import NbdRequest
from silo.exports.nbd_client_session import ClientSession
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_uri import parse_uri
from silo.exports.nbd_wire import Command, CommandFlag, NbdError

__all__ = ["NbdClient"]

_CLOSE_TIMEOUT_S: Final = 5.0
"""How long `NbdClient.aclose` waits for the server to finish what it has and to close its end."""
_RECEIVES_PER_WAKEUP: Final = 8
"""After so many full receives the loop gets a turn, so that a fast server cannot starve everybody else."""


class NbdClient:
    """A connection to one export. Made by `connect`; an async context manager that closes itself.

    All calls may be made concurrently, from tasks of one event loop. They raise

    * `InvalidRequestError` when the export cannot serve the request, or the server says so;
    * `CapacityError` when the server has no space;
    * `UnavailableError` when the server failed or the connection was lost: the outcome of a write is unknown;
    * `RemoteProtocolError` when the server broke the protocol, after which the connection is lost;
    * `ClosedError` after `aclose`.

    None of them has a deadline: a disk may be slow. Wrap a call in ``asyncio.timeout`` where one is due.
    Cancelling a call takes effect at once and touches none of the caller's memory afterwards. A cancelled
    read leaves nothing behind. A cancelled write, trim or zeroing may still be applied, until `settle` has returned.
    """

    export: RemoteExport

    def __init__(self, link: Link, export: RemoteExport) -> None:
        self.export = export
        self._link = link
        self._session = ClientSession(export)
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[int, asyncio.Future[NbdRequest]] = {}
        self._settled: asyncio.Future[None] | None = None
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._end: SiloError | None = None
        self._send_scheduled = False
        self._send_blocked = False
        self._loop.add_reader(link.socket, self._on_readable)

    @classmethod
    async def connect(
        cls,
        uri: str,
        *,
        export: str | None = None,
        contexts: Sequence[str] = (),
        styles: Sequence[HeaderStyle] = RICHEST_FIRST,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Self:
        """Connect and open an export.

        ``uri`` is one of the forms of `silo.exports.nbd_uri`; ``export`` overrules the name in it. ``contexts`` are
        the metadata contexts that `block_status` shall report, if the server has them. ``styles`` of headers are
        asked for, the best first; fewer are for tests, and for servers that misbehave.

        Cancellation leaves nothing behind.
        """
        target = parse_uri(uri)
        name = target.export if export is None else export
        conversation = open_export(name, contexts=contexts, styles=styles, tls=target.tls)
        link, agreed = await converse(target, conversation, timeout_s)
        return cls(link, agreed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def is_lost(self) -> bool:
        """Every call from now on will fail; connect anew."""
        return self._end is not None

    # Requests

    async def read(self, offset: int, length: int) -> bytearray:
        """Read ``length`` bytes, at most ``export.block_sizes.maximum``."""
        content = bytearray(max(length, 0))
        await self.read_into(offset, content)
        return content

    async def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Read as many bytes as ``buffer`` holds, into it. When this raises, its content is undefined."""
        await self._reply(self._checked().read(offset, memoryview(buffer).cast("B")))

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write all of ``data``, which must not change meanwhile; with ``fua`` it is durable afterwards."""
        view = memoryview(data).cast("B")
        await self._reply(self._checked().write(offset, view, flags=CommandFlag.FUA.value if fua else 0))

    async def flush(self) -> None:
        """Make every write that ended before this call durable."""
        await self._reply(self._checked().command(Command.FLUSH))

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Tell the server that the content of the extent does not matter any more."""
        flags = CommandFlag.FUA.value if fua else 0
        await self._reply(self._checked().command(Command.TRIM, offset, length, flags=flags))

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> bool:
        """Make the extent read as zeros.

        With ``no_hole`` its space stays allocated. With ``fast`` the server declines unless it is faster
        than writing: False then, and nothing was changed.
        """
        flags = fua * CommandFlag.FUA | no_hole * CommandFlag.NO_HOLE | fast * CommandFlag.FAST_ZERO
        request = await self._outcome(
            self._checked().command(Command.WRITE_ZEROES, offset, length, flags=int(flags))
        )
        if fast and request.code == NbdError.ENOTSUP:
            return False
        if request.error is not None:
            raise request.error
        return True

    async def cache(self, offset: int, length: int) -> None:
        """Tell the server that the extent will be read soon."""
        await self._reply(self._checked().command(Command.CACHE, offset, length))

    async def block_status(
        self, offset: int, length: int, *, one: bool = False, contexts: Sequence[str] | None = None
    ) -> Mapping[str, list[tuple[int, int]]]:
        """What the server knows of an extent: per context, ``(length, flags)`` of consecutive extents.

        They start at ``offset``, are never empty, and may end before the extent that was asked for, or after it.
        ``one`` asks for one extent only. ``contexts`` asks for some of those that were agreed upon; few servers can.
        """
        session = self._checked()
        request = await self._reply(session.block_status(offset, length, one=one, contexts=contexts))
        return request.status

    async def settle(self) -> None:
        """Wait until no request is in flight, cancelled ones included: nothing changes on the server any more.

        `UnavailableError` when the connection is lost before: it cannot be known then.
        """
        while self._session.in_flight:
            self._checked()
            if self._settled is None:
                self._settled = self._loop.create_future()
            # No deadline: as long as a request itself may take.
            await asyncio.wait((self._settled, self._lost), return_when=asyncio.FIRST_COMPLETED)
        self._checked()

    async def aclose(self) -> None:
        """Part from the server and close the socket. Calls in flight raise `ClosedError`. May be called twice.

        Waits, but not for long, until the server has finished what was asked and has closed its end.
        """
        if self._end is None:
            self._session.disconnect()
            self._schedule_send()
        self._end = ClosedError("the connection was closed")
        self._fail_all(self._end)
        try:
            await asyncio.wait((self._lost,), timeout=_CLOSE_TIMEOUT_S)
        finally:
            self._drop()

    def abort(self) -> None:
        """Close the socket at once, without a word to the server. Calls in flight raise `ClosedError`.

        What the server has received of them may still happen. `aclose` afterwards does nothing.
        """
        self._lose(ClosedError("the connection was closed"))

    def _checked(self) -> ClientSession:
        """The session, while it is usable."""
        if self._end is not None:
            raise _again(self._end)
        return self._session

    async def _reply(self, cookie: int) -> NbdRequest:
        """Wait for a request and raise its error."""
        request = await self._outcome(cookie)
        if request.error is not None:
            raise request.error
        return request

    async def _outcome(self, cookie: int) -> NbdRequest:
        """Wait for a request that was just made."""
        self._schedule_send()
        waiter: asyncio.Future[NbdRequest] = self._loop.create_future()
        self._waiters[cookie] = waiter
        try:
            return await waiter
        except asyncio.CancelledError:
            self._waiters.pop(cookie, None)
            self._session.abandon(cookie)
            raise

    # The socket

    def _schedule_send(self) -> None:
        """Send at the end of this turn of the loop, together with what others ask for in it."""
        if not (self._send_scheduled or self._send_blocked):
            self._send_scheduled = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._send_scheduled = False
        if self._lost.done():
            return
        try:
            while buffers := self._session.outgoing():
                self._session.sent(self._link.send(buffers))
            self._link.flush()
        except (BlockingIOError, InterruptedError):
            if not self._send_blocked:
                self._send_blocked = True
                self._loop.add_writer(self._link.socket, self._send)
            return
        except OSError as error:
            self._lose(UnavailableError(f"the NBD connection was lost: {error}"))
            return
        if self._send_blocked:
            self._send_blocked = False
            self._loop.remove_writer(self._link.socket)

    def _on_readable(self) -> None:
        for _ in range(_RECEIVES_PER_WAKEUP):
            if self._lost.done():
                return
            buffers = self._session.buffers()
            try:
                count = self._link.receive(buffers)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lose(UnavailableError(f"the NBD connection was lost: {error}"))
                return
            if not count:
                self._lose(UnavailableError("the NBD server closed the connection"))
                return
            try:
                finished = self._session.received(count)
            except RemoteProtocolError as error:
                self._lose(error)
                return
            for request in finished:
                self._wake(request)
            if self._settled is not None and not self._session.in_flight:
                self._settled.set_result(None)
                self._settled = None
            if count < sum(map(len, buffers)):
                return
        if self._link.pending:
            self._loop.call_soon(self._on_readable)

    def _wake(self, request: NbdRequest) -> None:
        waiter = self._waiters.pop(request.cookie, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(request)
        if request.code == NbdError.ESHUTDOWN and self._end is None:
            # The protocol asks us to leave now; what is in flight will still be answered.
            self._end = UnavailableError("the NBD server is shutting down")
            self._session.disconnect()
            self._schedule_send()

    def _fail_all(self, error: SiloError) -> None:
        waiters, self._waiters = self._waiters, {}
        for cookie, waiter in waiters.items():
            self._session.abandon(cookie)
            if not waiter.done():
                waiter.set_exception(_again(error))

    def _lose(self, error: SiloError) -> None:
        """The connection cannot be used any more."""
        if self._end is None:
            self._end = error
        self._drop()
        self._fail_all(self._end)

    def _drop(self) -> None:
        """Let go of the socket. May be called twice."""
        if not self._lost.done():
            self._loop.remove_reader(self._link.socket)
            self._loop.remove_writer(self._link.socket)
            self._link.close()
            self._lost.set_result(None)


def _again(error: SiloError) -> SiloError:
    """The same error for one more caller; an exception that is raised twice would mix up two tracebacks."""
    return type(error)(error.message, hint=error.hint)
