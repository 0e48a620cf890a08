"""What a volume may hold, block by block, while requests overlap: the oracle of the simulations.

Every write carries a *stamp* of its own in each block, so that a block tells who wrote it. For each block the
oracle keeps the requests whose content it may hold now. A request joins when it begins. When one is
acknowledged, all those that had ended before it began leave: whatever is there now, it is not older than this.
A request that failed or was cancelled stays possible until then, but can have no effect after its end.

So a read may return what was possible at some time while it ran, and a cut must hold, in every block, what was
possible at its instant.

After a power loss a block may hold what was possible when the last flush began that has ended, or what came since.
"""

from __future__ import annotations

import struct

import attrs

from silo.abc import Buffer

BLOCK = 512

_PATTERN = struct.Struct("<Q")


def stamped(stamp: int, blocks: int) -> bytes:
    """The content of blocks with a stamp. Stamp 0 is zeros."""
    return _PATTERN.pack(stamp) * (BLOCK // _PATTERN.size * blocks)


def stamps_of(content: Buffer) -> list[int]:
    """The stamp of each block; fails when a block is torn."""
    stamps = [_PATTERN.unpack_from(content, offset)[0] for offset in range(0, len(content), BLOCK)]
    for block, stamp in enumerate(stamps):
        assert content[block * BLOCK : (block + 1) * BLOCK] == stamped(stamp, 1), f"block {block} is torn"
    return stamps


@attrs.define(eq=False)
class Request:
    """A write or zeroing of blocks ``first`` to ``limit``."""

    first: int
    limit: int
    stamp: int
    began: int
    ended: int | None = None


@attrs.define(eq=False)
class Reading:
    """A read in progress, and the stamps that each of its blocks may show."""

    first: int
    allowed: list[set[int]]


@attrs.define(eq=False)
class Flush:
    """A flush in progress, and what each block might hold when it began."""

    began: int
    possible: list[set[Request]]


class Oracle:
    """One volume. ``name`` is for messages; the content begins with the given stamps, one per block."""

    def __init__(self, name: str, stamps: list[int]) -> None:
        self.name = name
        self._ticks = 0
        self._possible = [{Request(block, block + 1, stamp, 0, 0)} for block, stamp in enumerate(stamps)]
        self._durable = [set(requests) for requests in self._possible]
        self._readings: set[Reading] = set()

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def begin(self, first: int, limit: int, stamp: int) -> Request:
        """A write of ``stamp`` (0: zeroing) begins."""
        request = Request(first, limit, stamp, self._tick())
        for block in range(first, limit):
            self._possible[block].add(request)
            self._durable[block].add(request)
            for reading in self._readings:
                if 0 <= block - reading.first < len(reading.allowed):
                    reading.allowed[block - reading.first].add(stamp)
        return request

    def end(self, request: Request, *, acknowledged: bool) -> None:
        """It ended; unless it was acknowledged, any part of it may have happened."""
        request.ended = self._tick()
        if acknowledged:
            for block in range(request.first, request.limit):
                self._possible[block] = {
                    other
                    for other in self._possible[block]
                    if other is request or other.ended is None or other.ended > request.began
                }

    def begin_read(self, first: int, limit: int) -> Reading:
        """A read begins."""
        reading = Reading(first, self.now()[first:limit])
        self._readings.add(reading)
        return reading

    def end_read(self, reading: Reading, content: Buffer | None) -> None:
        """It returned ``content``, or nothing because it failed."""
        self._readings.remove(reading)
        if content is not None:
            self.check(content, reading.allowed, reading.first, "a read")

    def begin_flush(self) -> Flush:
        """A flush begins."""
        return Flush(self._tick(), [set(requests) for requests in self._possible])

    def end_flush(self, flush: Flush) -> None:
        """It returned: what was older than the possible contents at its beginning is gone for good."""
        for requests, possible in zip(self._durable, flush.possible, strict=True):
            requests &= possible | {request for request in requests if request.began > flush.began}

    def durable(self) -> list[set[int]]:
        """The stamps that each block may hold if the power fails at this instant."""
        return [{request.stamp for request in requests} for requests in self._durable]

    def now(self) -> list[set[int]]:
        """The stamps that each block may hold at this instant."""
        return [{request.stamp for request in requests} for requests in self._possible]

    def check(self, content: Buffer, allowed: list[set[int]], first: int, what: str) -> None:
        """Every block of ``content`` shows a stamp that it may show."""
        for block, (stamp, stamps) in enumerate(zip(stamps_of(content), allowed, strict=True), start=first):
            assert stamp in stamps, f"{what} of {self.name} saw {stamp} in block {block}, not one of {stamps}"
