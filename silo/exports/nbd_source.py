"""A disk of any NBD server as a source of chunks, for a volume that is being imported from it.

The source keeps one connection, because some servers take no more. It is made when a chunk is first wanted, and made
again when it was lost; that the server still shows a disk of the same size is checked each time. Nobody else may
write to that disk while it is imported: what was read of it, and what will be, must be one state.

A *demand* waits until the server answers, however long it is away: only the server has the content, and a guest's disk
that is slow is better than one that lies or fails. What the server itself refuses, as a disk with a bad sector does,
ends the demand with its error. A call in the *background* fails at once, and its caller decides when to try again; few
of them are sent at a time, so that a demand does not wait behind many.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from silo.abc import Buffer, ChunkSource, Clock
from silo.errors import ClosedError, InvalidRequestError, SiloError, UnavailableError
from silo.exports.nbd_client import NbdClient
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import AllocationStatus
from silo.geometry import Geometry

__all__ = ["NbdSource"]

_ALLOCATION: Final = "base:allocation"
_STATUS_MAX: Final = 1 << 30
"""Bytes that one question about holes is about: the answer takes the server a while on a fragmented disk."""
_BACKGROUND_BYTES: Final = 2 << 20
"""What calls in the background ask for at once."""
_ANSWER_TIMEOUT_S: Final = 60.0
"""After that a server that took a request counts as gone, and is connected to anew."""
_PAUSE_MIN_S: Final = 0.1
_PAUSE_MAX_S: Final = 5.0


class NbdSource(ChunkSource):
    """See the module. ``geometry`` is that of the volume. Belongs to the group's event loop."""

    def __init__(self, uri: str, geometry: Geometry, clock: Clock) -> None:
        self.uri = uri
        self.error = ""
        """Why the server could not be had, the last time that it was tried; empty when it could."""
        self.fetched_bytes = 0
        self._geometry = geometry
        self._clock = clock
        self._client: NbdClient | None = None
        self._turn = asyncio.Lock()
        self._closed = False
        self._lanes = asyncio.Semaphore(max(1, _BACKGROUND_BYTES // geometry.chunk_size))

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        """See `silo.abc.ChunkSource`, and the module for what waits and what fails. ``volume`` is for messages only."""
        offset, length = self._geometry.extent_of(chunk)
        if not demand:
            async with self._lanes:
                return await self._read(await self._connected(), offset, length)
        pause_s = _PAUSE_MIN_S
        while True:
            try:
                client = await self._connected()
            except UnavailableError:
                await asyncio.sleep(pause_s * (0.5 + self._clock.token(1)[0] / 512))
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
                continue
            try:
                return await self._read(client, offset, length)
            except UnavailableError:
                if not client.is_lost:
                    raise  # an answer of the server's: its disk cannot be read there

    async def zero_runs(self) -> AsyncIterator[tuple[int, int]]:
        """``(first, limit)`` of chunks that the server knows to read as zeros, ascending. None when it cannot tell.

        `UnavailableError` in between: ask again from the beginning, or do without.
        """
        client = await self._connected()
        if _ALLOCATION not in client.export.contexts.values():
            return
        size = self._geometry.size
        step = max(client.export.block_sizes.minimum, _STATUS_MAX)
        position = start = 0
        while position < size:
            asked = min(step, size - position)
            async with _deadline(client):
                status = await client.block_status(position, asked)
            for length, flags in status[_ALLOCATION]:
                end = min(position + length, size)
                if not flags & AllocationStatus.ZERO:
                    for run in self._covered(start, position):
                        yield run
                    start = end
                position = end
        for run in self._covered(start, size):
            yield run

    def _covered(self, start: int, stop: int) -> list[tuple[int, int]]:
        if stop <= start:
            return []
        first, limit = self._geometry.covered(start, stop - start)
        return [(first, limit)] if first < limit else []

    async def _connected(self) -> NbdClient:
        """The connection, made anew when there is none. `UnavailableError` when it cannot be had."""
        async with self._turn:  # bounded by the client's own deadline for connecting
            if self._closed:
                raise ClosedError(f"the import from {self.uri} was ended")
            if self._client is None or self._client.is_lost:
                try:
                    self._client = await self._connect()
                except SiloError as error:
                    # A name or a certificate that is wrong now may be put right, while the guest waits.
                    self.error = str(error)
                    raise UnavailableError(f"the disk at {self.uri} cannot be had: {error}") from error
                self.error = ""
            return self._client

    async def _connect(self) -> NbdClient:
        # Extended headers would bring a reader nothing.
        client = await NbdClient.connect(self.uri, contexts=[_ALLOCATION], styles=[HeaderStyle.STRUCTURED])
        if client.export.size != self._geometry.size:
            client.abort()
            raise InvalidRequestError(
                f"the disk at {self.uri} has {client.export.size} bytes, not {self._geometry.size}",
                hint="is it the same one as before?",
            )
        return client

    async def _read(self, client: NbdClient, offset: int, length: int) -> bytearray:
        sizes = client.export.block_sizes
        start = offset - offset % sizes.minimum
        stop = min(-(-(offset + length) // sizes.minimum) * sizes.minimum, self._geometry.size)
        content = bytearray(stop - start)
        view = memoryview(content)
        step = max(sizes.minimum, min(sizes.maximum, 1 << 20))
        async with _deadline(client):
            for position in range(start, stop, step):
                await client.read_into(position, view[position - start : position - start + step])
        self.fetched_bytes += length
        return content if len(content) == length else content[offset - start : offset - start + length]

    async def aclose(self) -> None:
        """Part from the server. Calls in flight fail; none is answered afterwards. May be called twice."""
        self._closed = True
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


@contextlib.asynccontextmanager
async def _deadline(client: NbdClient) -> AsyncIterator[None]:
    """Around requests: a server that does not answer in time has lost its connection."""
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            yield
    except TimeoutError as error:
        client.abort()
        raise UnavailableError(f"the NBD server did not answer in {_ANSWER_TIMEOUT_S:.0f} s") from error
