"""The client's half of NBD's transmission phase, without I/O: requests out, replies in.

The owner moves bytes and nothing else: it sends what `outgoing` lists and reports with `sent`; it receives into
`buffers` and reports with `received`, which names the requests that are finished. Any number of requests may be
in flight; replies come in any order.

*Giving up* on a request (`abandon`) is safe at any moment. If no byte of it has left, it never happened. If it is
partly out, the rest is copied, so that the caller may reuse its memory at once, and goes out in peace: a stream
cannot be cut in the middle of a message. The reply is awaited, consumed and dropped. A write that was given up
may therefore still be applied, at any time until its reply has come; `in_flight` counts such requests too.

Requests that the export cannot serve (outside of it, misaligned, a command that it did not offer) are refused here,
with `InvalidRequestError`, before anything is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Final

from silo.abc import Buffer
from silo.errors import InvalidRequestError
from silo.exports.nbd_chunks import encode_status_filter
from silo.exports.nbd_client_handshake import RemoteExport
from silo.exports.nbd_client_replies import ReplyReader
from silo.exports.nbd_client_request import NbdRequest
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    TransmissionFlag,
)

__all__ = ["ClientSession"]

_SEND_BUFFERS_MAX: Final = 256
"""Per send; the kernel takes up to 1024 (IOV_MAX), and the list is built anew for each."""
_COMPACT_LENGTH_MAX: Final = 0xFFFF_FFFF
_WRITES: Final = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
# Plain integers below, because operations on enum.Flag cost a microsecond each, on every request.
_COMMAND_NEEDS: Final[dict[Command, int]] = {
    Command.FLUSH: TransmissionFlag.SEND_FLUSH.value,
    Command.TRIM: TransmissionFlag.SEND_TRIM.value,
    Command.CACHE: TransmissionFlag.SEND_CACHE.value,
    Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES.value,
}
_FLAG_NEEDS: Final[tuple[tuple[int, int], ...]] = (
    (CommandFlag.FUA.value, TransmissionFlag.SEND_FUA.value),
    (CommandFlag.FAST_ZERO.value, TransmissionFlag.SEND_FAST_ZERO.value),
)
_PAYLOAD_LEN: Final = CommandFlag.PAYLOAD_LEN.value


class ClientSession:
    """One connection in transmission. Not for concurrent use by threads."""

    def __init__(self, export: RemoteExport) -> None:
        self.export = export
        self._extended = export.style is HeaderStyle.EXTENDED
        self._offered = int(export.flags)
        self._pending: dict[int, NbdRequest] = {}
        self._reader = ReplyReader(export.style, self._pending)
        self._next_cookie = 1
        # What has not been sent, in order, with the cookie of the request that each piece belongs to.
        self._outbox: deque[tuple[int, Buffer]] = deque()
        self._last_sent = 0

    @property
    def in_flight(self) -> int:
        """Requests whose reply has not come, given up ones included."""
        return len(self._pending)

    # Requests

    def read(self, offset: int, into: memoryview) -> int:
        """Ask for as many bytes as ``into`` (writable, contiguous, of bytes) holds. Returns the request's cookie."""
        if into.readonly:
            raise InvalidRequestError("the buffer to read into is read-only")
        self._check(Command.READ, offset, len(into), payload=len(into))
        request = self._enter(Command.READ, offset, len(into))
        request.into = into
        self._put(request, 0, len(into))
        return request.cookie

    def write(self, offset: int, data: memoryview, *, flags: int = 0) -> int:
        """Write ``data`` (contiguous, of bytes), which must not change until the request is finished or abandoned."""
        self._check(Command.WRITE, offset, len(data), flags, payload=len(data))
        request = self._enter(Command.WRITE, offset, len(data))
        if self._extended:
            flags |= _PAYLOAD_LEN
        self._put(request, flags, len(data))
        self._outbox.append((request.cookie, data))
        return request.cookie

    def command(self, command: Command, offset: int = 0, length: int = 0, *, flags: int = 0) -> int:
        """Ask for FLUSH (of everything), TRIM, WRITE_ZEROES or CACHE."""
        self._check(command, offset, length, flags)
        request = self._enter(command, offset, length)
        self._put(request, flags, length)
        return request.cookie

    def block_status(
        self, offset: int, length: int, *, one: bool = False, contexts: Sequence[str] | None = None
    ) -> int:
        """Ask for the status of an extent, in all contexts or (if the server can do that) only in some."""
        self._check(Command.BLOCK_STATUS, offset, length)
        wanted = self._contexts(contexts)
        request = self._enter(Command.BLOCK_STATUS, offset, length)
        request.contexts, request.one = wanted, one
        flags = CommandFlag.REQ_ONE.value if one else 0
        if contexts is None:
            self._put(request, flags, length)
        else:
            payload = encode_status_filter(length, list(wanted))
            self._put(request, flags | _PAYLOAD_LEN, len(payload))
            self._outbox.append((request.cookie, payload))
        return request.cookie

    def disconnect(self) -> None:
        """Part politely, after all that was asked so far. The server answers by closing the connection."""
        self._outbox.append((0, self._header(Command.DISC, 0, 0, 0, 0)))

    def abandon(self, cookie: int) -> None:
        """Give up on a request; nothing happens when it is finished already."""
        request = self._pending.get(cookie)
        if request is None:
            return
        unsent = [buffer for owner, buffer in self._outbox if owner == cookie]
        if unsent and self._last_sent != cookie:
            del self._pending[cookie]
            self._outbox = deque(entry for entry in self._outbox if entry[0] != cookie)
            return
        if unsent:
            self._outbox = deque((o, bytes(b) if o == cookie else b) for o, b in self._outbox)
        self._reader.forget(request)

    def _contexts(self, names: Sequence[str] | None) -> Mapping[int, str]:
        known = self.export.contexts
        if not known:
            raise InvalidRequestError("the server offered none of the metadata contexts that were asked for")
        if names is None:
            return known
        if TransmissionFlag.BLOCK_STATUS_PAYLOAD not in self.export.flags:
            raise InvalidRequestError("the server cannot report the status of some contexts only")
        wanted = {context_id: name for context_id, name in known.items() if name in names}
        if len(wanted) != len(set(names)):
            raise InvalidRequestError(f"not all of the contexts {list(names)} were agreed upon")
        return wanted

    def _check(self, command: Command, offset: int, length: int, flags: int = 0, *, payload: int = 0) -> None:
        """Refuse what the export cannot do."""
        export = self.export
        if command in _WRITES and export.read_only:
            raise InvalidRequestError(f"the export {export.name!r} is read-only")
        needed = _COMMAND_NEEDS.get(command, 0)
        for flag, need in _FLAG_NEEDS:
            if flags & flag:
                needed |= need
        if needed & ~self._offered:
            missing = TransmissionFlag(needed & ~self._offered)
            raise InvalidRequestError(f"the export {export.name!r} does not offer {missing!r}")
        if command is Command.FLUSH:
            return
        if offset < 0 or length <= 0 or offset + length > export.size:
            raise InvalidRequestError(f"extent {offset}+{length} is empty, or outside of {export.size} bytes")
        if (offset | length) & (export.block_sizes.minimum - 1):
            raise InvalidRequestError(
                f"extent {offset}+{length} is not made of {export.block_sizes.minimum} bytes"
            )
        if payload > export.block_sizes.maximum:
            raise InvalidRequestError(
                f"{payload} bytes are too many for one request", hint=f"at most {export.block_sizes.maximum}"
            )
        if length > _COMPACT_LENGTH_MAX and not self._extended:
            raise InvalidRequestError(f"{length} bytes need extended headers, which the server lacks")

    def _enter(self, command: Command, offset: int, length: int) -> NbdRequest:
        request = NbdRequest(self._next_cookie, command, offset, length)
        self._next_cookie += 1
        self._pending[request.cookie] = request
        return request

    def _put(self, request: NbdRequest, flags: int, length: int) -> None:
        header = self._header(request.command, flags, request.cookie, request.offset, length)
        self._outbox.append((request.cookie, header))

    def _header(self, command: Command, flags: int, cookie: int, offset: int, length: int) -> bytes:
        if self._extended:
            return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
        return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)

    # Bytes

    def outgoing(self) -> list[Buffer]:
        """What should be sent next, in this order; empty when there is nothing."""
        return [buffer for _, buffer in islice(self._outbox, _SEND_BUFFERS_MAX)]

    def sent(self, count: int) -> None:
        """The first ``count`` bytes of `outgoing` are sent."""
        while count:
            self._last_sent, buffer = self._outbox[0]
            if count < len(buffer):
                self._outbox[0] = (self._last_sent, memoryview(buffer)[count:])
                return
            count -= len(buffer)
            self._outbox.popleft()

    def buffers(self) -> list[memoryview]:
        """Where the next received bytes belong, in this order."""
        return self._reader.buffers()

    def received(self, count: int) -> list[NbdRequest]:
        """``count`` bytes have been received into `buffers`; the requests that are finished now.

        Raises `RemoteProtocolError` when the server broke the protocol; the connection is useless then.
        """
        return self._reader.received(count)
