"""Chunks that only the source has, for guests at the target that wait for them.

A `silo.abc.ChunkSource` for absent-at-peer chunks. A fetch is a demand on the demand lane of the present link, and
on each later one until it is answered. It never falls back to the store, whose content would be older, and it never
gives up: only the source can know the content, so a guest's read waits for the link to return. A source
that cannot read the chunk itself says so, and that ends the fetch.

A chunk that arrives by other ways while it is waited for (a push, a neighbour) answers the fetch too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Never

import attrs
import numpy as np

from silo.abc import Buffer, ChunkSource
from silo.chunkmap import Indices
from silo.errors import UnavailableError
from silo.p2p.channel import Channel
from silo.p2p.messages import Want
from silo.p2p.signal import Signal

__all__ = ["PeerSource"]

WANTS_AT_ONCE = 256
"""Demands in one send."""


@attrs.define(eq=False)
class _Waiting:
    """Fetches of one chunk that wait for the same answer."""

    answer: asyncio.Future[Buffer | None]
    count: int = 0


class PeerSource(ChunkSource):
    """See the module. Volumes are numbered as in the offer; ``names`` is that order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._waiting: dict[tuple[int, int], _Waiting] = {}
        self._unsaid: deque[tuple[int, int]] = deque()
        self._changed = Signal()

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        """See `silo.abc.ChunkSource`. No deadline, see the module. Cancellation leaves nothing behind."""
        key = (self._numbers[volume], chunk)
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = _Waiting(asyncio.get_running_loop().create_future())
            self._unsaid.append(key)
            self._changed.notify()
        waiting.count += 1
        try:
            await asyncio.wait((waiting.answer,))  # unlike awaiting it, this does not cancel it with us
            return waiting.answer.result()
        finally:
            waiting.count -= 1
            if not waiting.count and self._waiting.get(key) is waiting:
                del self._waiting[key]

    async def demand(self, channel: Channel) -> Never:
        """Say on this lane everything that is waited for, and then what comes to be, for as long as it lives."""
        self._unsaid = deque(self._waiting)
        while True:
            await self._changed.until(lambda: bool(self._unsaid))
            wants: list[Want] = []
            while self._unsaid and len(wants) < WANTS_AT_ONCE:
                key = self._unsaid.popleft()
                if key in self._waiting:
                    wants.append(Want(volume=key[0], chunk=key[1]))
            if wants:
                await channel.send(*wants)

    def arrived(self, volume: int, chunk: int, content: Buffer | None) -> bool:
        """The verified content of a chunk came. True when somebody had waited for it, who will install it."""
        waiting = self._waiting.pop((volume, chunk), None)
        if waiting is None or waiting.answer.done():
            return False
        waiting.answer.set_result(None if content is None else bytes(content))
        return True

    def arrived_zeros(self, volume: int, chunks: Indices) -> None:
        """So many chunks are zeros."""
        for number, chunk in list(self._waiting):
            if (
                number == volume
                and len(chunks)
                and chunks[np.searchsorted(chunks, chunk) % len(chunks)] == chunk
            ):
                self.arrived(volume, chunk, None)

    def unavailable(self, volume: int, chunk: int, message: str) -> None:
        """The source cannot read the chunk."""
        waiting = self._waiting.pop((volume, chunk), None)
        if waiting is not None and not waiting.answer.done():
            waiting.answer.set_exception(UnavailableError(f"the source cannot read chunk {chunk}: {message}"))
            waiting.answer.exception()  # marks it as retrieved: a waiter may have been cancelled
