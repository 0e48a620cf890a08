"""What requests mean: the commands of the transmission phase, carried out on a volume.

One `NbdService` stands between one connection and the volume that it chose. It works at two speeds, as the
volume does. `serve_nowait` takes a whole batch, carries out what nothing stands in the way of, appends the
replies, and returns the rest; each of those goes to `serve`, in a task of its own. So requests may be answered
out of order, which the protocol allows, while everything that is answered in one batch happened in order.

Nothing that a client sends raises here. A request that makes no sense, an extent outside of the export, a
volume that fails: all end in an error reply.

**Live views.** A read is answered with whatever the volume returned, which may be a view of live memory. Until
the batch has been sent, a write may change those bytes, and a read that came first must not see a write that
came after it. So before a write of the same batch touches what an earlier read returned, the replies so far
are made stable (`stabilise`). The driver does the same with whatever it could not send at once.

**Flush.** A flush covers the writes of all connections that were answered before it: they all went to the same
volume, which is asked to flush, or whatever the export has in its place. A write with FUA is a write followed by a
flush.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from silo.abc import Buffer
from silo.chunkmap import RESIDENCY_MASK, Residency
from silo.errors import ProtocolError, SiloError
from silo.exports.nbd_chunks import decode_status_filter
from silo.exports.nbd_contexts import status_extents
from silo.exports.nbd_replies import ChunkedReplies, ExtendedReplies, Replies, stabilise
from silo.exports.nbd_session import Request
from silo.exports.nbd_wire import Command, CommandFlag, NbdError, error_to_code
from silo.volume import Volume
from silo.zeros import zeros

__all__ = ["NbdService"]

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_FLUSH: Final = int(Command.FLUSH)
_TRIM: Final = int(Command.TRIM)
_CACHE: Final = int(Command.CACHE)
_WRITE_ZEROES: Final = int(Command.WRITE_ZEROES)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)

_FUA: Final = int(CommandFlag.FUA)
_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
_DF: Final = int(CommandFlag.DF)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)

_MODIFIES: Final = frozenset((_WRITE, _TRIM, _WRITE_ZEROES))
_PRESENT: Final = int(Residency.PRESENT)
_ZERO_RESIDENCIES: Final = frozenset((int(Residency.ZERO), int(Residency.ZERO_UNPUNCHED)))
_WRITE_STEP: Final = 256 * 1024
"""What a device takes without blocking the loop for long (`silo.devices.file`)."""
_WRITE_NOWAIT_MAX: Final = 1 << 20
"""Up to here a write that the device declines as a whole is offered in steps before a thread gets it: as much
as a batch of small ones may add up to. For 1 MiB that halves the CPU time, which goes into copies and threads."""
_OVERLAP_SCAN_MAX: Final = 64
"""With more reads than this behind us, making them stable costs no more than looking whether it is needed."""


class NbdService:
    """See the module. ``contexts`` are the metadata contexts that the client selected, by identifier."""

    def __init__(
        self,
        volume: Volume,
        replies: Replies,
        *,
        payload_max: int,
        block_size: int = 1,
        read_only: bool = False,
        contexts: dict[int, str] | None = None,
        flush: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._volume = volume
        self._flush = flush or volume.flush
        self._flushes_here = self._flush == volume.flush
        """A flush that must reach the store, too, is never over at once."""
        self._gate = volume.gate
        self._size = volume.geometry.size
        self._states = volume.chunks.states
        self._shift = volume.geometry.chunk_shift
        self._replies = replies
        self._sparse = isinstance(replies, ChunkedReplies)
        """Whether zeros can be answered without sending them."""
        self._payload_max = payload_max
        self._block_mask = block_size - 1
        self._read_only = read_only or volume.read_only
        self._contexts = contexts or {}
        self._known_flags = {
            _READ: _FUA | (_DF if self._sparse else 0),
            _WRITE: _FUA,
            _FLUSH: _FUA,
            _TRIM: _FUA,
            _CACHE: _FUA,
            _WRITE_ZEROES: _FUA | _NO_HOLE | _FAST_ZERO,
            _BLOCK_STATUS: _FUA | _REQ_ONE | (_PAYLOAD_LEN if isinstance(replies, ExtendedReplies) else 0),
        }

    # ---- at once ----------------------------------------------------------------------------------------

    def serve_nowait(self, requests: Sequence[Request], out: list[Buffer]) -> list[Request]:
        """Carry out a batch in order, append the replies to ``out``, and return what must wait.

        ``out`` must be empty, and sent or made stable before anything else happens on the loop. Payloads of
        what is returned are still the parser's: detach them.
        """
        misses: list[Request] = []
        if self._gate.may_serve is not None:
            self._gate.look()
        add, volume, replies = out.append, self._volume, self._replies
        read, write, data, done = volume.read_nowait, volume.write_nowait, replies.data, replies.done
        size, mask, largest = self._size, self._block_mask, self._payload_max
        states, shift, sparse = self._states, self._shift, self._sparse
        live = -1  # index of the first read whose data may be live memory
        for index, request in enumerate(requests):
            command, flags, cookie, offset, length, payload = request
            end = offset + length
            try:
                if flags or end > size or (offset | length) & mask or not 0 < length <= largest:
                    self._uncommon_nowait(request, out, misses)
                elif command == _READ:
                    if sparse and (states[offset >> shift] & RESIDENCY_MASK) != _PRESENT:
                        self._uncommon_nowait(request, out, misses)
                        continue
                    found = read(offset, length)
                    if found is None:
                        misses.append(request)
                        continue
                    add(data(cookie, offset, length))
                    add(found)
                    if live < 0:
                        live = index
                elif command == _WRITE and payload is not None and not self._read_only:
                    if live >= 0 and self._overlaps(requests, live, index):
                        stabilise(out)
                        live = -1
                    if write(offset, payload) or self._write_steps_nowait(offset, payload):
                        add(done(cookie, offset))
                    else:
                        misses.append(request)
                else:
                    self._uncommon_nowait(request, out, misses)
            except SiloError as error:
                add(self._error(request, error_to_code(error), str(error)))
        return misses

    def _overlaps(self, requests: Sequence[Request], first: int, limit: int) -> bool:
        """Whether the request at ``limit`` touches a chunk that a read since ``first`` may show."""
        if limit - first > _OVERLAP_SCAN_MAX:
            return True
        shift = self._shift
        low, high = requests[limit][3] >> shift, requests[limit][3] + requests[limit][4] - 1 >> shift
        return any(
            command == _READ and offset >> shift <= high and offset + length - 1 >> shift >= low
            for command, _, _, offset, length, _ in requests[first:limit]
        )

    def _write_steps_nowait(self, offset: int, payload: memoryview) -> bool:
        """Write a large payload in steps; False when one was declined, and then all of it must be written again."""
        length = len(payload)
        return _WRITE_STEP < length <= _WRITE_NOWAIT_MAX and all(
            self._volume.write_nowait(offset + start, payload[start : start + _WRITE_STEP])
            for start in range(0, length, _WRITE_STEP)
        )

    def _uncommon_nowait(self, request: Request, out: list[Buffer], misses: list[Request]) -> None:
        """Whatever is not a plain read or write: refuse it, do it at once, or put it among the misses."""
        command, flags, cookie, offset, length, payload = request
        if command == _FLUSH and not (flags or offset or length):
            return self._flush_nowait(cookie, offset, out, misses)
        refusal = self._refusal(request)
        if refusal is not None:
            out.append(self._error(request, *refusal))
        elif command == _BLOCK_STATUS:
            out.extend(self._status(request))
        elif command == _FLUSH:
            self._flush_nowait(cookie, offset, out, misses)
        elif length == 0:
            out.append(self._replies.done(cookie, offset))
        elif command == _READ:
            parts = self._read_nowait(flags, cookie, offset, length)
            if parts is None:
                misses.append(request)
            else:
                out.extend(parts)
        elif not self._modify_nowait(command, flags, offset, length, payload, out):
            misses.append(request)
        elif flags & _FUA:
            self._flush_nowait(cookie, offset, out, misses)
        else:
            out.append(self._replies.done(cookie, offset))

    def _flush_nowait(self, cookie: int, offset: int, out: list[Buffer], misses: list[Request]) -> None:
        """Flush at once, which devices in memory can, or later: what was carried out before is covered either way."""
        if self._flushes_here and self._volume.flush_nowait():
            out.append(self._replies.done(cookie, offset))
        else:
            misses.append((_FLUSH, 0, cookie, offset, 0, None))

    def _read_nowait(self, flags: int, cookie: int, offset: int, length: int) -> list[Buffer] | None:
        """Answer a read, with holes where the style and the client allow them; ``None`` means wait."""
        volume, replies = self._volume, self._replies
        if flags & _DF or not isinstance(replies, ChunkedReplies):
            found = volume.read_nowait(offset, length)
            return None if found is None else [replies.data(cookie, offset, length), found]
        parts: list[Buffer] = []
        for first, limit, residency in volume.chunks.residency_runs(*volume.geometry.touched(offset, length)):
            start = max(first << self._shift, offset)
            span = min(limit << self._shift, offset + length) - start
            found = volume.read_nowait(start, span)
            if found is None:
                return None
            if residency in _ZERO_RESIDENCIES:
                parts.append(replies.hole_chunk(cookie, offset, start, span))
            else:
                parts += (replies.data_chunk(cookie, offset, start, span), found)
        parts.append(replies.done(cookie, offset))
        return parts

    def _modify_nowait(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: memoryview | None,
        out: list[Buffer],
    ) -> bool:
        """Write, zero or trim at once, or return False."""
        volume = self._volume
        if command == _WRITE and payload is not None:
            stabilise(out)
            return volume.write_nowait(offset, payload) or self._write_steps_nowait(offset, payload)
        if command == _TRIM:
            first, limit = volume.geometry.covered(offset, length)
            offset, length = (
                first << self._shift,
                min(limit << self._shift, self._size) - (first << self._shift),
            )
            return limit <= first or volume.zero_nowait(offset, length)
        if command == _WRITE_ZEROES and flags & _NO_HOLE:
            stabilise(out)
            return length <= _WRITE_STEP and volume.write_nowait(offset, zeros(length))
        return command == _WRITE_ZEROES and volume.zero_nowait(offset, length)

    def _status(self, request: Request) -> list[bytes]:
        """Answer ``BLOCK_STATUS``: one chunk per context."""
        _, flags, cookie, offset, length, payload = request
        replies, wanted = self._replies, tuple(self._contexts)
        if payload is not None:
            try:
                length, wanted = decode_status_filter(payload)
            except ProtocolError as error:
                return [self._error(request, NbdError.EINVAL, str(error))]
            if len(set(wanted)) != len(wanted) or not self._contexts.keys() >= set(wanted):
                return [
                    self._error(request, NbdError.EINVAL, "the list of contexts has unknown or repeated ones")
                ]
        if not wanted or not isinstance(replies, ChunkedReplies):
            return [self._error(request, NbdError.EINVAL, "no metadata context was selected")]
        if not length or offset + length > self._size:
            return [self._error(request, NbdError.EINVAL, "the extent is empty or not inside of the export")]
        single = bool(flags & _REQ_ONE)
        parts = [
            replies.status_chunk(
                cookie,
                offset,
                context_id,
                status_extents(self._volume, self._contexts[context_id], offset, length, single=single),
            )
            for context_id in wanted
        ]
        return [*parts, replies.done(cookie, offset)]

    # ---- refusing ---------------------------------------------------------------------------------------

    def _refusal(self, request: Request) -> tuple[NbdError, str] | None:
        """Why a request is not even tried, if so."""
        command, flags, _, offset, length, payload = request
        known = self._known_flags.get(command)
        if known is None:
            return NbdError.EINVAL, f"command {command} is not known"
        if flags & ~known:
            return NbdError.EINVAL, f"flags {flags:#x} do not go with {Command(command).name}"
        if command == _WRITE and payload is None:
            return NbdError.EINVAL, f"a write must carry its data, at most {self._payload_max} bytes"
        if self._read_only and command in _MODIFIES:
            return NbdError.EPERM, "the export is read-only"
        if command == _FLUSH:
            return (NbdError.EINVAL, "a flush has no extent") if offset or length else None
        if payload is not None and command == _BLOCK_STATUS:
            return None  # the extent is in the payload
        if offset + length > self._size:
            code = NbdError.ENOSPC if command in (_WRITE, _WRITE_ZEROES) else NbdError.EINVAL
            return code, f"the extent {offset}+{length} is not inside of the export of {self._size} bytes"
        if (offset | length) & self._block_mask:
            return NbdError.EINVAL, f"offset and length must be multiples of {self._block_mask + 1}"
        if command == _READ and length > self._payload_max:
            code = NbdError.EOVERFLOW if self._sparse else NbdError.EINVAL
            return code, f"at most {self._payload_max} bytes can be read at once"
        if flags & _FAST_ZERO:
            first, limit = self._volume.geometry.covered(offset, length)
            if flags & _NO_HOLE or limit <= first:
                return NbdError.ENOTSUP, "only whole chunks are zeroed faster than written"
        return None

    def refuse(self, request: Request, error: SiloError) -> bytes:
        """The reply to a request that is not tried at all, because of the server's own state."""
        return self._error(request, error_to_code(error), str(error))

    def _error(self, request: Request, code: int, message: str) -> bytes:
        return self._replies.error(request[2], request[3], code, message)

    # ---- in a task --------------------------------------------------------------------------------------

    async def serve(self, request: Request) -> list[Buffer]:
        """Carry out a miss, however long it takes, and return the reply, to be sent before anything is awaited.

        Concurrent calls are allowed. Cancellation leaves what the volume's operations leave: any part of a write
        may have happened, and nothing more will.
        """
        _, _, cookie, offset, length, _ = request
        try:
            found = await self._perform(request)
        except SiloError as error:
            return [self.refuse(request, error)]
        if found is None:
            return [self._replies.done(cookie, offset)]
        return [self._replies.data(cookie, offset, length), found]

    async def _perform(self, request: Request) -> Buffer | None:
        command, flags, _, offset, length, payload = request
        volume = self._volume
        if command == _READ:
            return await volume.read(offset, length)
        if command == _WRITE and payload is not None:
            await volume.write(offset, payload)
        elif command == _TRIM:
            await volume.trim(offset, length)
        elif command == _WRITE_ZEROES and flags & _NO_HOLE:
            for start in range(offset, offset + length, _WRITE_STEP):
                await volume.write(start, zeros(min(_WRITE_STEP, offset + length - start)))
        elif command == _WRITE_ZEROES:
            await volume.zero(offset, length)
        elif command == _CACHE:
            await volume.prefetch(offset, length)
        if command == _FLUSH or (flags & _FUA and command in _MODIFIES):
            await self._flush()
        return None
