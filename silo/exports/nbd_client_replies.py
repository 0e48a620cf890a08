"""Reading an NBD server's replies: which bytes belong to whom, and where they must go.

`ReplyReader` is the receiving half of `silo.exports.nbd_client_session`. It does no I/O: its owner asks
`buffers` where the next bytes should land, fills as much of them as there is in one scatter receive, says how much
with `received`, and is handed the requests that are now finished.

Copies: replies arrive through a staging buffer, because one receive brings many of them. Of a payload, only what came
along with its header is copied from there; the rest is received straight into the memory that the request
named, followed, in the same receive, by whatever comes next. So a payload of a megabyte is copied to about a
sixteenth, and a small one costs no system call of its own.

The server is not trusted. Cookies that nobody waits for, chunks of unknown kinds, lengths without reason, and
whatever `silo.exports.nbd_client_request` objects to raise `RemoteProtocolError`, after which the connection cannot be
used, since nobody knows where the next header starts.
"""

from __future__ import annotations

import struct
from typing import Final

from silo.errors import InvariantError, RemoteProtocolError
from silo.exports.nbd_chunks import (
    OFFSET,
    decode_error,
    decode_offset_hole,
    decode_status,
    decode_status_extended,
)
from silo.exports.nbd_client_request import NbdRequest
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import (
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    NAME_SIZE_MAX,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
    ReplyFlag,
)

__all__ = ["ReplyReader"]

STAGING_SIZE: Final = 64 * 1024
"""Sixteen replies with 4 KiB each per receive; more was not faster, and memory is paid per connection."""
_STATUS_SIZE_MAX: Final = 8 + 16 * (1 << 20)
"""The protocol's limit of 2^20 extents, in the wider of the two encodings."""
_ERROR_BIT: Final = 1 << 15
_ERROR_SIZE_MAX: Final = 6 + NAME_SIZE_MAX + 64
"""Code, message, and room for the fixed fields of error chunks that are yet to be invented."""
_MAGIC: Final = struct.Struct(">I")
_CHUNK_STYLES: Final = {
    HeaderStyle.STRUCTURED: (STRUCTURED_REPLY, STRUCTURED_REPLY_MAGIC),
    HeaderStyle.EXTENDED: (EXTENDED_REPLY, EXTENDED_REPLY_MAGIC),
}


class ReplyReader:
    """Sorts a stream of replies into the requests that wait for them.

    ``pending`` is shared with the owner, who adds requests; the reader removes them when they are finished.
    """

    def __init__(self, style: HeaderStyle, pending: dict[int, NbdRequest]) -> None:
        self._style = style
        self._pending = pending
        self._staging = memoryview(bytearray(STAGING_SIZE))
        self._start = 0
        self._end = 0
        # The payload being received: whose, of which kind (None: of a simple reply), and whether it is the last.
        self._request: NbdRequest | None = None
        self._kind: int | None = None
        self._done = False
        # Where its rest goes. At most one of the two is set, and a sink only while nothing is staged.
        self._sink: memoryview | None = None
        self._skip = 0
        self._control = bytearray()
        self._finished: list[NbdRequest] = []

    def buffers(self) -> list[memoryview]:
        """Where the next bytes go, in this order. Valid until the next call of any method."""
        staging = self._staging[self._end :]
        return [staging] if self._sink is None else [self._sink, staging]

    def received(self, count: int) -> list[NbdRequest]:
        """``count`` bytes have landed in `buffers`; the requests that are finished by them, in order."""
        if self._sink is not None:
            taken = min(count, len(self._sink))
            count -= taken
            self._sink = self._sink[taken:]
            if self._sink:
                return []
            self._complete_payload()
        self._end += count
        while self._take_payload() and self._take_header():
            pass
        self._compact()
        finished, self._finished = self._finished, []
        return finished

    def forget(self, request: NbdRequest) -> None:
        """Nobody wants the content of this request any more: its memory is not written to from now on."""
        request.forget()
        if (
            self._request is request
            and self._sink is not None
            and self._kind in (None, ChunkType.OFFSET_DATA)
        ):
            self._skip, self._sink = len(self._sink), None

    def _compact(self) -> None:
        """Move the beginning of what is not complete yet to the start of the staging buffer."""
        staged = self._end - self._start
        if staged and self._start:
            self._staging[:staged] = self._staging[self._start : self._end]
        self._start, self._end = 0, staged

    # Payloads

    def _begin_payload(
        self, request: NbdRequest, kind: int | None, sink: memoryview | int, *, done: bool
    ) -> None:
        """Bytes of a payload follow; they go to a place, or (when it is a number) that many go nowhere."""
        self._request, self._kind, self._done = request, kind, done
        if isinstance(sink, int):
            self._skip = sink
        else:
            self._sink = sink

    def _take_payload(self) -> bool:
        """Move staged bytes on to where the current payload goes; False when more are needed for it."""
        if self._request is None:
            return True
        staged = self._end - self._start
        if self._sink is not None:
            taken = min(staged, len(self._sink))
            self._sink[:taken] = self._staging[self._start : self._start + taken]
            self._sink = self._sink[taken:]
            self._start += taken
            if self._sink:
                return False
        else:
            taken = min(staged, self._skip)
            self._skip -= taken
            self._start += taken
            if self._skip:
                return False
        self._complete_payload()
        return True

    def _complete_payload(self) -> None:
        request, kind, self._request, self._sink = self._request, self._kind, None, None
        if request is None:
            raise InvariantError("a payload belongs to no request")
        if kind is not None and kind != ChunkType.OFFSET_DATA:
            self._take_control(request, kind)
        if self._done:
            self._finish(request)

    def _take_control(self, request: NbdRequest, kind: int) -> None:
        """Understand the payload of a chunk that carries no content."""
        payload, self._control = self._control, bytearray()
        if kind & _ERROR_BIT:
            chunk = decode_error(payload, has_offset=kind == ChunkType.ERROR_OFFSET)
            request.fail(chunk.code, chunk.message)
        elif kind == ChunkType.OFFSET_HOLE:
            offset, length = decode_offset_hole(payload)
            target = request.claim(offset, length)
            if target is not None:
                target[:] = bytes(length)
        else:
            extended = kind == ChunkType.BLOCK_STATUS_EXT
            context_id, extents = decode_status_extended(payload) if extended else decode_status(payload)
            request.take_status(context_id, extents)

    # Headers

    def _take_header(self) -> bool:
        """Understand the next header; False when it is not complete yet."""
        if self._style is HeaderStyle.SIMPLE:
            return self._take_simple()
        header, magic = _CHUNK_STYLES[self._style]
        if self._end - self._start < _MAGIC.size:
            return False
        found: int = _MAGIC.unpack_from(self._staging, self._start)[0]
        if found == magic:
            return self._take_chunk(header)
        if found == SIMPLE_REPLY_MAGIC and self._style is HeaderStyle.STRUCTURED:
            return self._take_simple()
        raise RemoteProtocolError(f"a reply starts with {found:#x}")

    def _waiting(self, cookie: int) -> NbdRequest:
        request = self._pending.get(cookie)
        if request is None:
            raise RemoteProtocolError(f"a reply to cookie {cookie}, for which nothing waits")
        return request

    def _take_simple(self) -> bool:
        if self._end - self._start < SIMPLE_REPLY.size:
            return False
        magic, code, cookie = SIMPLE_REPLY.unpack_from(self._staging, self._start)
        if magic != SIMPLE_REPLY_MAGIC:
            raise RemoteProtocolError(f"a reply starts with {magic:#x}")
        request = self._waiting(cookie)
        self._start += SIMPLE_REPLY.size
        if code:
            request.fail(code, "")
        elif request.command is Command.READ:
            if self._style is not HeaderStyle.SIMPLE:
                raise RemoteProtocolError("a simple reply to a read, though structured ones were agreed upon")
            target = request.claim(request.offset, request.length)
            self._begin_payload(request, None, request.length if target is None else target, done=True)
            return True
        self._finish(request)
        return True

    def _take_chunk(self, header: struct.Struct) -> bool:
        staged = self._end - self._start
        if staged < header.size:
            return False
        _, flags, kind, cookie, *offsets, length = header.unpack_from(self._staging, self._start)
        request = self._waiting(cookie)
        if offsets and offsets[0] != request.offset:
            raise RemoteProtocolError(f"the reply to the {request} names the offset {offsets[0]}")
        done = bool(flags & ReplyFlag.DONE)
        if kind == ChunkType.OFFSET_DATA:
            if staged < header.size + OFFSET.size:
                return False
            if length <= OFFSET.size:
                raise RemoteProtocolError("a chunk of content is empty")
            offset: int = OFFSET.unpack_from(self._staging, self._start + header.size)[0]
            size = length - OFFSET.size
            target = request.claim(offset, size)
            self._start += header.size + OFFSET.size
            self._begin_payload(request, kind, size if target is None else target, done=done)
            return True
        self._start += header.size
        if kind == ChunkType.NONE:
            if length or not done:
                raise RemoteProtocolError("a closing chunk has content, or does not close")
            self._finish(request)
            return True
        self._check_control(request, kind, length)
        self._control = bytearray(length)
        self._begin_payload(request, kind, memoryview(self._control), done=done)
        return True

    def _check_control(self, request: NbdRequest, kind: int, length: int) -> None:
        """Refuse a chunk that we do not know, or whose length has no reason, before making room for it."""
        if kind & _ERROR_BIT:
            limit = _ERROR_SIZE_MAX
        elif kind == ChunkType.OFFSET_HOLE:
            limit = 12
        elif kind == self._status_kind and request.command is Command.BLOCK_STATUS:
            limit = _STATUS_SIZE_MAX
        else:
            raise RemoteProtocolError(f"a chunk of kind {kind} in the reply to the {request}")
        if not 0 < length <= limit:
            raise RemoteProtocolError(f"a chunk of kind {kind} has {length} bytes")

    @property
    def _status_kind(self) -> ChunkType:
        extended = self._style is HeaderStyle.EXTENDED
        return ChunkType.BLOCK_STATUS_EXT if extended else ChunkType.BLOCK_STATUS

    def _finish(self, request: NbdRequest) -> None:
        """The last part of a reply is here."""
        del self._pending[request.cookie]
        request.finish()
        if not request.abandoned:
            self._finished.append(request)
