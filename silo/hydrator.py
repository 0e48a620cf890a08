"""Hydration in the background: pulling what is absent, the hottest first, while guests go first.

What was read first after an earlier start comes before all that: a list in the store says so (`FirstReads`).

Runs beside the guest after a lazy restore or a migration, until nothing is absent in the store any more. It asks
for a good number of chunks at once, so that the store's source can fetch neighbours in one request; demand reads
have lanes of their own there. A store that does not answer is asked again with growing delay; a chunk whose
content is damaged is left for later, and said.

Chunks that only a migration's source has are not its business: the migration pulls those. An import
(`silo.importing`) uses it for its own, which are absent at a peer of another kind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping

import numpy as np

from silo.abc import Clock
from silo.chunkmap import RESIDENCY_MASK, Indices, Residency
from silo.errors import ClosedError, CorruptionError, SiloError
from silo.group import Group
from silo.volume import Volume

__all__ = ["FirstReads", "Hydrator"]

logger = logging.getLogger(__name__)

CONCURRENCY = 64
"""Chunks asked for at once: 4 MiB in chunks of the default size, one large request's worth."""
SCAN = 1 << 16
"""Chunks whose heat is looked at in one step."""
DELAY_MIN_S = 0.2
DELAY_MAX_S = 10.0


FirstReads = Callable[[], Awaitable[Mapping[str, Indices]]]
"""Asks for the chunks of each volume that should come first. It is a hint: the numbers may be out of bounds."""


class Hydrator:
    """See the module. ``error`` says why it makes no progress just now; empty when it does."""

    def __init__(self, group: Group, clock: Clock, *, residency: Residency = Residency.ABSENT_STORE) -> None:
        self.error = ""
        self.first_reads: FirstReads | None = None
        self._group = group
        self._residency = residency
        self._clock = clock
        self._delay_s = DELAY_MIN_S
        self._done = asyncio.Event()
        self._closed = False

    async def wait_done(self) -> None:
        """Return when everything is here; `ClosedError` when it will not be. No deadline: the store decides."""
        await self._done.wait()
        if self._closed:
            raise ClosedError(f"group {self._group.name} was closed before it was hydrated")

    def close(self) -> None:
        """Nobody runs it any more. Whoever waits learns of it."""
        if not self._done.is_set():
            self._closed = True
            self._done.set()

    async def run(self) -> None:
        """Hydrate until nothing is absent any more. Cancellation leaves chunks absent or filled, no third way."""
        if self.first_reads is not None and self._group.absent_counts((self._residency,)):
            await self._prefetch(self.first_reads)
        while True:
            failed = 0
            for volume, chunks in self._batches():
                failed += await self._hydrate(volume, chunks)
            if not failed and not self._group.absent_counts((self._residency,)):
                break
            if failed:
                await self._pause()
        self.error = ""
        self._done.set()

    async def _prefetch(self, ask: FirstReads) -> None:
        try:
            wanted = await ask()
        except SiloError as error:
            logger.warning("group %s: its first reads are not known: %s", self._group.name, error)
            return
        for name, chunks in wanted.items():
            if (volume := self._group.volumes.get(name)) is None:
                continue
            chunks = chunks[chunks < volume.chunks.count]
            states = volume.chunks.view[chunks] & RESIDENCY_MASK
            absent = chunks[states == self._residency]
            for start in range(0, len(absent), CONCURRENCY):
                await self._hydrate(volume, absent[start : start + CONCURRENCY].tolist())

    def _batches(self) -> Iterator[tuple[Volume, list[int]]]:
        """Batches of absent chunks, volume by volume and window by window, the hottest-read first in each."""
        for volume in list(self._group.volumes.values()):
            for low in range(0, volume.chunks.count, SCAN):
                limit = min(low + SCAN, volume.chunks.count)
                absent = volume.chunks.select(RESIDENCY_MASK, self._residency, low, limit)
                if not len(absent):
                    continue
                heat = volume.heat.read_heat(low, limit)[absent - low]
                # Chunks of like heat stay in the order of the disk, so that requests can be joined.
                ordered = absent[np.argsort(-np.floor(np.log2(heat + 1)), kind="stable")]
                for start in range(0, len(ordered), CONCURRENCY):
                    yield volume, ordered[start : start + CONCURRENCY].tolist()

    async def _hydrate(self, volume: Volume, chunks: list[int]) -> int:
        """How many could not be had."""
        failures: list[SiloError] = []

        async def one(chunk: int) -> None:
            try:
                await volume.hydrate(chunk)
            except SiloError as error:  # of the store, or of a disk that is full; guests hear of their own
                failures.append(error)

        async with asyncio.TaskGroup() as tasks:
            for chunk in chunks:
                tasks.create_task(one(chunk))
        if failures:
            self.error = str(failures[0])
            if any(not isinstance(error, CorruptionError) for error in failures):
                await self._pause()
        else:
            self.error = ""
            self._delay_s = DELAY_MIN_S
        return len(failures)

    async def _pause(self) -> None:
        chance = int.from_bytes(self._clock.token(2), "big") / 65536
        await asyncio.sleep(self._delay_s * (0.5 + chance / 2))
        self._delay_s = min(2 * self._delay_s, DELAY_MAX_S)
