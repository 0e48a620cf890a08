"""Streams between hosts under mutual TLS, over the sockets of `silo.p2p.transport`.

OpenSSL works on memory (`ssl.MemoryBIO`) between large reads and writes of our own: asyncio's TLS transport moves
every record by itself and costs four times the CPU. Small buffers are joined before they are encrypted, because each
write begins a record. A listener shakes hands in the background with everybody who calls, and hands out only hosts of
the fleet: strangers get no further, cost little, and hold up nobody.

Unix sockets are not encrypted: they are as private as their directory.

An end without TLS's own farewell is an end like any other: frames have lengths, so that nothing can be cut off
unnoticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, cast

from silo.abc import Buffer, Connection, Listener, Transport
from silo.addresses import TcpAddress, parse_address
from silo.errors import ClosedError, InvariantError, RemoteProtocolError, SiloError, UnavailableError
from silo.p2p.signal import Signal
from silo.p2p.tls import Contexts, HostTls
from silo.p2p.transport import PlainTransport

__all__ = ["TlsTransport"]

_log = logging.getLogger(__name__)

HANDSHAKE_SIZE: Final = 16 << 10
"""Read at once before the other side has proved who it is: many strangers must not cost much memory."""
RECEIVE_SIZE: Final = 256 << 10
PIECE_SIZE: Final = 256 << 10
"""Encrypted in one call, and sent in one."""
HANDSHAKE_S: Final = 10.0
CALLERS_MAX: Final = 128
"""Handshakes under way, and connections that nobody has accepted yet. More are turned away."""
ALERT: Final = b"\x15\x03\x03\x00\x02\x02\x46"
"""Fatal: protocol version. OpenSSL says nothing to those who do not speak TLS; a Silo host knows by this why."""
FAREWELL_S: Final = 1.0
"""How long a caller that is turned away may take to read why."""


class TlsTransport(Transport):
    """See the module."""

    def __init__(self, tls: HostTls) -> None:
        self._contexts = Contexts(tls)
        self._plain = PlainTransport(insecure_tcp=True)

    async def connect(self, url: str) -> Connection:
        """Connect, and see that the other side is of our fleet. No deadline: wrap it in ``asyncio.timeout``.

        `UnavailableError` when nobody answers, `RemoteProtocolError` when it is not whom we look for. That we are
        not accepted shows at the first receive. Cancelled or failed, nothing is left open.
        """
        address = parse_address(url)
        connection = await self._plain.connect(url)
        if not isinstance(address, TcpAddress):
            return connection
        encrypted = TlsConnection(connection, dialled=address.host)
        try:
            await encrypted.shake_hands((await self._contexts.get())[0])
        except BaseException:
            await encrypted.aclose()
            raise
        return encrypted

    async def listen(self, url: str) -> Listener:
        """Bind and listen. `InvalidRequestError` when that, or our files, cannot be used."""
        listener = await self._plain.listen(url)
        if not isinstance(parse_address(url), TcpAddress):
            return listener
        try:
            await self._contexts.get()
        except BaseException:
            await listener.aclose()
            raise
        encrypted = TlsListener(listener, self._contexts)
        await encrypted.start()
        return encrypted


class TlsListener(Listener):
    """Shakes hands with everybody who calls, several at once, and hands out those who are of the fleet."""

    def __init__(self, plain: Listener, contexts: Contexts) -> None:
        self.url = plain.url
        self._plain = plain
        self._contexts = contexts
        self._ready: deque[TlsConnection] = deque()
        self._changed = Signal()
        self._error: SiloError | None = None
        self._tasks = asyncio.TaskGroup()
        self._shaking: set[asyncio.Task[None]] = set()
        self._answering: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to answer; `aclose` ends that."""
        await self._tasks.__aenter__()
        self._answering = self._tasks.create_task(self._answer())

    async def accept(self) -> Connection:
        """See `silo.abc.Listener`."""
        await self._changed.until(lambda: bool(self._ready) or self._error is not None)
        if self._error is not None:
            raise self._error
        return self._ready.popleft()

    async def _answer(self) -> None:
        while self._error is None:
            try:
                plain = await self._plain.accept()
            except SiloError as error:
                self._error = error
                self._changed.notify()
                return
            if len(self._shaking) + len(self._ready) >= CALLERS_MAX:
                _log.warning("too many callers at once: %s was turned away", plain.peer)
                await plain.aclose()
                continue
            task = self._tasks.create_task(self._shake(TlsConnection(plain)))
            self._shaking.add(task)
            task.add_done_callback(self._shaking.discard)

    async def _shake(self, connection: TlsConnection) -> None:
        is_ready = False
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                await connection.shake_hands((await self._contexts.get())[1])
            is_ready = self._error is None
        except TimeoutError:
            _log.warning("%s did not finish the TLS handshake in %g s", connection.peer, HANDSHAKE_S)
        except SiloError as error:
            _log.warning("a caller was turned away: %s", error)
            await connection.hear_out()
        finally:
            if not is_ready:
                await connection.aclose()
        if is_ready:
            self._ready.append(connection)
            self._changed.notify()

    async def aclose(self) -> None:
        """See `silo.abc.Listener`. Those who were not handed out yet are hung up on."""
        answering, self._answering = self._answering, None
        if answering is None:
            return
        self._error = self._error or ClosedError(f"{self.url} is closed")
        self._changed.notify()
        await self._plain.aclose()
        for task in (answering, *self._shaking):
            task.cancel()
        await self._tasks.__aexit__(None, None, None)
        while self._ready:
            await self._ready.popleft().aclose()


class TlsConnection(Connection):
    """One encrypted stream, after `shake_hands`. One receiver and one sender at a time, perhaps different tasks."""

    def __init__(self, plain: Connection, *, dialled: str | None = None) -> None:
        """``dialled`` is the host that we wanted; without it, it is the other side that has called."""
        self.peer = plain.peer
        self._plain = plain
        self._dialled = dialled
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object: ssl.SSLObject | None = None
        self._received = memoryview(bytearray(HANDSHAKE_SIZE))

    # ---- the handshake ----------------------------------------------------------------------------------

    async def shake_hands(self, context: ssl.SSLContext) -> None:
        """See who is there. `RemoteProtocolError` when it is nobody for us, `UnavailableError` when the link broke.

        Failed or cancelled, the connection can only be closed.
        """
        tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=self._dialled is None, server_hostname=self._dialled
        )
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._send_outgoing()
                if not await self._receive_more():
                    raise self._left() from None
            except ssl.SSLError as error:
                if not self._outgoing.pending and error.reason in _NO_TLS:
                    self._outgoing.write(ALERT)
                with contextlib.suppress(UnavailableError, ClosedError):
                    await self._send_outgoing()  # the alert that tells the other side why
                raise explained(error, self.peer) from error
        await self._send_outgoing()
        self._received = memoryview(bytearray(RECEIVE_SIZE))
        self.peer = f"{self.peer} ({_name_in(tls)})"
        self._object = tls

    @property
    def _tls(self) -> ssl.SSLObject:
        if self._object is None:
            raise InvariantError(f"the connection to {self.peer} was used before its handshake")
        return self._object

    async def hear_out(self) -> None:
        """After a handshake that failed, wait until the caller has hung up: hung up on, it would see a reset and not
        the alert that it was sent."""
        with contextlib.suppress(UnavailableError, ClosedError, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                while await self._plain.receive_into(self._received):
                    pass  # whatever it had to say is for somebody else

    def _left(self) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"{self.peer} closed the connection during the TLS handshake",
            hint="does the other host speak TLS, and does it trust the authority of this one?",
        )

    # ---- the stream -------------------------------------------------------------------------------------

    async def receive_into(self, buffer: memoryview) -> int:
        """See `silo.abc.Connection`. `RemoteProtocolError` when the other side does not accept us."""
        while True:
            count = self._decrypt(buffer)
            if count is not None:
                return count
            if not await self._receive_more():
                return 0

    def _decrypt(self, buffer: memoryview) -> int | None:
        """As much as there is, 0 at the end; ``None`` when there is nothing yet. A record holds at most 16 KiB."""
        tls, filled = self._tls, 0
        try:
            while filled < len(buffer):
                # In this form the result is a number, which typeshed overlooks.
                count = cast("int", tls.read(len(buffer) - filled, buffer[filled:]))
                if not count:
                    break
                filled += count
        except ssl.SSLWantReadError:
            return filled or None
        except ssl.SSLError as error:
            if not filled:
                raise explained(error, self.peer) from error
        return filled

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """See `silo.abc.Connection`."""
        for piece in _pieces(buffers):
            self._tls.write(piece)
            await self._send_outgoing()

    async def _send_outgoing(self) -> None:
        if self._outgoing.pending:
            await self._plain.send([self._outgoing.read()])

    async def _receive_more(self) -> int:
        count = await self._plain.receive_into(self._received)
        self._incoming.write(self._received[:count])
        return count

    async def aclose(self) -> None:
        """See `silo.abc.Connection`."""
        await self._plain.aclose()


def _pieces(buffers: Sequence[Buffer]) -> Iterator[Buffer]:
    """The same bytes in pieces worth a call each."""
    some: list[memoryview] = []
    size = 0
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            part, view = view[: PIECE_SIZE - size], view[PIECE_SIZE - size :]
            some.append(part)
            size += len(part)
            if size == PIECE_SIZE:
                yield b"".join(some)
                some, size = [], 0
    if some:
        yield b"".join(some)


def _name_in(tls: ssl.SSLObject) -> str:
    """The name in the certificate of the other side, for logs."""
    subject = cast("Sequence[Sequence[tuple[str, str]]]", (tls.getpeercert() or {}).get("subject", ()))
    names = [value for part in subject for key, value in part if key == "commonName"]
    return names[0] if names else "a certificate without a name"


_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNKNOWN_PROTOCOL"})
_OLD_TLS = frozenset({"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "VERSION_TOO_LOW"})


def explained(error: ssl.SSLError, peer: str) -> RemoteProtocolError:
    """What OpenSSL has found wrong, as a sentence and with what to do about it. Never holds anything secret."""
    reason = error.reason or "UNKNOWN"
    if isinstance(error, ssl.SSLCertVerificationError):
        message = f"the certificate of {peer} is not accepted: {error.verify_message.rstrip('.')}"
        if "mismatch" in error.verify_message:
            hint = "issue it with that name (`silo certs issue NAME --address ...`), or do not check names"
        else:
            hint = "both hosts need certificates of the same authority that are still valid (`silo certs`)"
    elif reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        message, hint = f"{peer} showed no certificate", "only hosts of the fleet are served"
    elif reason in _NO_TLS:
        message, hint = f"{peer} does not speak TLS", "give that host its certificate (--tls-dir), too"
    elif reason in _OLD_TLS:
        message, hint = f"{peer} does not speak TLS 1.3", "nothing older is spoken between hosts"
    elif "_ALERT_" in reason:
        what = reason.partition("_ALERT_")[2].replace("_", " ").lower()
        message = f"{peer} does not accept the certificate of this host: {what}"
        hint = "both hosts need certificates of the same authority that are still valid (`silo certs`)"
    else:
        message, hint = f"TLS with {peer} failed: {reason.replace('_', ' ').lower()}", ""
    return RemoteProtocolError(message, hint=hint)
