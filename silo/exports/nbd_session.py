"""The transmission phase from the server's side, without any I/O: bytes in, requests out.

The driver asks `RequestParser.get_buffer` where the next bytes belong, receives into it, reports how many came
with `received`, and takes complete requests in batches from `next_batch`. A request is a plain tuple, because
hundreds of thousands of them pass per second. Three things are decided here:

* *A request is complete or does not exist.* A write whose payload has not fully arrived is never handed out,
  so a client that vanishes in the middle of one has changed nothing.
* *Framing survives a bad request.* A request that will be refused is still consumed to its last byte. Only
  bytes after which nobody could know where the next request starts (a wrong magic number, a payload larger
  than anybody may send) raise `RemoteProtocolError`; the connection must then be closed.
* *Memory is bounded.* The parser holds one receive buffer and at most one payload that does not fit into it.
  ``budget`` bounds the bytes that one batch asks to read or to write, and so what its replies can occupy. Each
  request costs `REQUEST_COST` more, so that requests without data are bounded too.

Payloads are views of the parser's own memory, valid until the next `get_buffer`; whoever needs one longer
calls `detach`. A large write is received in place: once its header is known, `get_buffer` offers room up to
its end (and for one header more), so that the bytes behind it need not be moved.

What a request *means* (is the extent inside, is the flag known) is the business of `silo.exports.nbd_service`.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from silo.errors import LocalProtocolError, RemoteProtocolError
from silo.exports.nbd_wire import (
    EXTENDED_REQUEST_MAGIC,
    PAYLOAD_SIZE_DEFAULT,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
)

__all__ = ["RECEIVE_SIZE", "REQUEST_COST", "HeaderStyle", "Request", "RequestParser"]

Request = tuple[int, int, int, int, int, memoryview | None]
"""``(command, flags, cookie, offset, length, payload)``.

``payload`` is ``None`` when the request carries none, and also when it carries more than the server accepts:
then the payload was skipped, and the request waits for its refusal. In extended requests the flag
``PAYLOAD_LEN`` is dropped from writes, which must have it; a write without it has no payload.
"""

RECEIVE_SIZE: Final = (1 << 20) + 4096
"""Takes a 1 MiB write with its header. A larger one gets a buffer of its own. Only what is used becomes resident."""
REQUEST_COST: Final = 1024
"""What a request counts beside its data: about what it occupies while it waits."""
RECEIVE_STEP: Final = 256 * 1024
"""What is received at once: enough for 64 writes of 4 KiB, and small enough to be still in the cache when they
are carried out."""
_IN_PLACE_MIN: Final = 192 * 1024
"""From this size on, moving the bytes behind a write costs more than receiving them with another call.

A Unix socket holds about as much; smaller writes come several at a time, which is worth more: with 64 KiB here,
writes of 64 KiB cost the server 32 µs of CPU each instead of 23.
"""
_MOVE_MAX: Final = 4096
"""So few bytes are always moved to the front, where the memory is still in the cache."""
_SPARE_MAX: Final = 4 << 20
"""A payload buffer up to this size is kept for the next large write; a larger one is given back."""

_HEADER: Final = struct.Struct(">QQQI")
"""A request: a word of magic number, flags and command, then cookie, offset, length. One comparison of the word
recognises the plain read."""
_EXTENDED_HEADER: Final = struct.Struct(">QQQQ")

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)


class HeaderStyle(enum.Enum):
    """What was negotiated about headers; it decides how requests and replies look."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


class RequestParser:
    """One connection's requests. See the module for the contract between it and its driver.

    ``payload_max`` is the largest payload, in bytes, that is accepted. Up to `PAYLOAD_SIZE_DEFAULT` a larger
    one is skipped and its request handed out without it; beyond, the client is hostile.
    """

    def __init__(
        self,
        style: HeaderStyle,
        *,
        payload_max: int = PAYLOAD_SIZE_DEFAULT,
        buffer_size: int = RECEIVE_SIZE,
    ) -> None:
        self.ended = False
        """The client has said goodbye (``DISC``); nothing that it may send afterwards is looked at."""
        self.held = 0
        """Bytes of memory that an incomplete payload occupies outside of the receive buffer."""
        self._extended = style is HeaderStyle.EXTENDED
        self._header = _EXTENDED_HEADER if self._extended else _HEADER
        self._magic = EXTENDED_REQUEST_MAGIC if self._extended else REQUEST_MAGIC
        self._plain_read = self._magic << 32 | _READ
        self._plain_write = self._magic << 32 | (_PAYLOAD_LEN << 16 if self._extended else 0) | _WRITE
        self._payload_max = payload_max
        self._buffer = memoryview(bytearray(buffer_size))
        self._first = 0
        self._limit = 0
        self._wanted = 0
        """Bytes of the incomplete request at ``_first``, header included; 0 while they are not known."""
        self._partial: Request | None = None
        """A request that does not fit: its payload gets a buffer of its own, or is skipped (``None``)."""
        self._missing = 0
        """Bytes that the payload of the partial request still lacks."""
        self._spare: memoryview | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of what was received."""
        return self._first == self._limit and self._partial is None

    @property
    def lacks(self) -> int:
        """Bytes of a large payload that are still on their way; until they have come there is nothing to take."""
        if self._partial is not None:
            return self._missing
        return max(0, self._first + self._wanted - self._limit) if self._wanted > _IN_PLACE_MIN else 0

    def prepend(self, data: bytes) -> None:
        """Bytes of the stream that the handshake received too much; before anything else, and few."""
        self._buffer[: len(data)] = data
        self._limit = len(data)

    def get_buffer(self) -> memoryview:
        """Where the next bytes of the stream belong; never empty. Ends the life of payloads handed out before.

        Only after `next_batch` has returned nothing: else the buffer may be full (`LocalProtocolError`).
        """
        if self._partial is not None and self._partial[5] is not None:
            return self._partial[5][-self._missing :]
        first, limit, size = self._first, self._limit, len(self._buffer)
        if first == limit:
            self._first = self._limit = 0
            return self._buffer[:RECEIVE_STEP]
        if first and (limit - first <= _MOVE_MAX or limit == size or first + self._wanted > size):
            self._buffer[: limit - first] = self._buffer[first:limit]
            first, limit = self._first, self._limit = 0, limit - first
        if limit == size:
            raise LocalProtocolError("the receive buffer is full of requests that nobody has taken")
        if self._wanted > _IN_PLACE_MIN:
            return self._buffer[limit : first + self._wanted + self._header.size]
        return self._buffer[limit : limit + RECEIVE_STEP]

    def received(self, count: int) -> None:
        """``count`` bytes were written to the start of what `get_buffer` returned."""
        if self._partial is not None and self._partial[5] is not None:
            self._missing -= count
        else:
            self._limit += count

    def next_batch(self, budget: int) -> list[Request]:
        """The complete requests that were received, in order, until ``budget`` bytes are spent.

        The request that overdraws it is included, so that a positive budget always makes progress. Raises
        `RemoteProtocolError` when the stream cannot be followed any further, once the requests before that point
        have been taken.
        """
        requests: list[Request] = []
        while budget > 0:
            if self._partial is None:
                budget = self._take_complete(requests, budget)
                if self._partial is None:
                    break
            request = self._take_partial()
            if request is None:
                break
            requests.append(request)
            budget -= request[4] + REQUEST_COST
        return requests

    def detach(self, payload: memoryview) -> memoryview:
        """The same bytes, valid for as long as the caller likes. Call it before the next `get_buffer`."""
        if payload.obj is self._buffer.obj:
            return memoryview(bytes(payload))
        self._spare = None
        return payload

    def _take_complete(self, requests: list[Request], budget: int) -> int:
        """Append what is complete in the receive buffer and return what is left of the budget.

        Stops when there is nothing more, the budget is spent, or a request turns out not to fit.
        """
        view, first, limit = self._buffer, self._first, self._limit
        size, unpack = self._header.size, self._header.unpack_from
        plain_read, plain_write = self._plain_read, self._plain_write
        extended, add = self._extended, requests.append
        self._wanted = 0
        while limit - first >= size and budget > 0:
            word, cookie, offset, length = unpack(view, first)
            if word == plain_read:
                add((_READ, 0, cookie, offset, length, None))
                first += size
                budget -= length + REQUEST_COST
                continue
            if word == plain_write:
                command, flags, carries = _WRITE, 0, True
            else:
                flags, command = word >> 16 & 0xFFFF, word & 0xFFFF
                carries = bool(flags & _PAYLOAD_LEN) if extended else command == _WRITE
                if extended and carries and command == _WRITE:
                    flags ^= _PAYLOAD_LEN
            if word >> 32 != self._magic:
                self._lose_track(requests, f"a request starts with {word >> 32:#x}")
                break
            if carries:
                end = first + size + length
                if end > limit or length > self._payload_max:
                    first = self._wait_for(requests, first, (command, flags, cookie, offset, length, None))
                    break
                add((command, flags, cookie, offset, length, view[first + size : end]))
                first = end
                budget -= length + REQUEST_COST
            elif command == _DISC:
                self.ended = True
                first = limit
            else:
                add((command, flags, cookie, offset, length, None))
                first += size
                budget -= REQUEST_COST + (length if command == _READ else 0)
        self._first = first
        return budget

    def _lose_track(self, requests: list[Request], reason: str) -> None:
        """Nobody knows where the next request starts. Those before it come first; the next call ends here again."""
        if not requests:
            raise RemoteProtocolError(reason)

    def _wait_for(self, requests: list[Request], first: int, request: Request) -> int:
        """Prepare for the rest of a request that is incomplete or too long; where parsing goes on."""
        length, size = request[4], self._header.size
        if length > max(self._payload_max, PAYLOAD_SIZE_DEFAULT):
            self._lose_track(requests, f"a payload of {length} bytes was announced")
            return first
        if length <= self._payload_max and size + length <= len(self._buffer):
            self._wanted = size + length
            return first
        self._missing = length
        if length > self._payload_max:
            self._partial = request
            return first + size
        if self._spare is None or len(self._spare) < length:
            self._spare = memoryview(bytearray(length))
        payload = self._spare[:length]
        self._partial = (*request[:5], payload)
        self.held = length
        there = self._limit - first - size
        payload[:there] = self._buffer[first + size : self._limit]
        self._missing -= there
        return self._limit

    def _take_partial(self) -> Request | None:
        """The request that did not fit, if all of it has come."""
        request = self._partial
        if request is None:
            return None
        if request[5] is None:
            skipped = min(self._missing, self._limit - self._first)
            self._first += skipped
            self._missing -= skipped
        if self._missing:
            return None
        self._partial = None
        self.held = 0
        if self._spare is not None and len(self._spare) > _SPARE_MAX:
            self._spare = None
        return request
