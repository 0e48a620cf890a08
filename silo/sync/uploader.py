"""From a cut to stored segments, with bounded memory.

::

    chunks, coldest first ─► capture ─► hash, compare, compress (threads) ─► pack ─► send (window)
                              └─ release: the volume may overwrite the chunk without a copy

A batch of chunks is captured and at once released, so old content is protected no longer than it takes to get
here. That is the only time a content is copied: what does not compress is sent from where it was captured to, and
that memory is used again when the segment is stored (`silo.sync.buffers`). Memory is the window of the sender, one
segment being packed, and a few batches in the threads. Batches are packed in the order in which they were captured,
whatever thread was faster, so the same cut makes the same segments.

Chunks whose digest the next head would give them anyway are left out. Zero chunks become runs, whether the guest
zeroed them or wrote zeros.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

import attrs
import numpy as np

from silo.abc import Buffer
from silo.chunkmap import Indices, runs_of
from silo.errors import CapacityError, CorruptionError, UnavailableError
from silo.frozen import Cut, Taken
from silo.heatmap import HeatMap
from silo.sync.ahead import Round
from silo.sync.buffers import BufferPool, Lease, joined
from silo.sync.claim import Owner
from silo.sync.codec import Encoded, Kind
from silo.sync.manifest import Manifest
from silo.sync.pending import Pending
from silo.sync.planner import batches, coldest_first
from silo.sync.segment import ENTRY, SegmentBuilder
from silo.sync.sender import ObjectSender
from silo.sync.settings import SyncSettings
from silo.sync.workers import Workers
from silo.tasks import task_group

__all__ = ["CutUpload", "Uploader"]

PACK_STEP = 16
"""Chunks that are packed before guests get a turn: some tens of microseconds."""

JOIN_STEP = 64
"""Buffers of a segment that are looked at in one go: some hundred microseconds."""


@attrs.frozen
class _Batch:
    volume: str
    chunks: list[int]
    encoded: list[Encoded | None]
    lease: Lease
    """Where raw payloads are."""


@attrs.define
class Uploader:
    """What uploads of one group share. `upload` is called for one cut at a time."""

    group: str
    manifest: Manifest
    pending: Pending
    sender: ObjectSender
    workers: Workers
    settings: SyncSettings
    elided_chunks: int = 0
    pool: BufferPool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.pool = BufferPool(self.settings.batch_size)

    async def upload(self, cut: Cut | Round, owner: Owner, heats: Mapping[str, HeatMap]) -> None:
        """Store what the cut adds to the next head; ``pending`` lists it then.

        `CapacityError` when the room for copies or for the map has run out; otherwise it goes on until everything
        is stored. When it raises or is cancelled, ``pending`` lists what is stored so far.
        """
        try:
            async with task_group() as tasks:
                await CutUpload(self, cut, owner, heats, tasks).run()
        finally:
            self.pool.trim()


class CutUpload:
    """The upload of one cut."""

    def __init__(
        self,
        shared: Uploader,
        cut: Cut | Round,
        owner: Owner,
        heats: Mapping[str, HeatMap],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._shared = shared
        self._cut = cut
        self._owner = owner
        self._heats = heats
        self._tasks = tasks
        self._pipeline: deque[asyncio.Task[_Batch]] = deque()
        self._zeros: dict[str, list[int]] = {name: [] for name in cut.volumes}
        self._builder = self._new_builder()
        self._room = shared.settings.segment_size
        """How large the segment that is being packed may become. One entry always fits."""
        size = sum(len(part.data) << part.geometry.chunk_shift for part in cut.volumes.values())
        if size > 2 * self._room:
            self._room //= 4  # several segments, so the first is small: the sooner something is being sent
        self._leases: list[Lease] = []
        """What the segment that is being packed refers to."""

    async def run(self) -> None:
        """Read, encode, pack and start to send everything; the task group waits for the sending."""
        for part in self._cut.volumes.values():
            size = max(1, self._shared.settings.batch_size // part.geometry.chunk_size)
            ordered = coldest_first(part.data, self._heats[part.name].write_view)
            for chunks in batches(ordered, size):
                indices = np.array(chunks, dtype=np.int64)
                await self._prepare(part.name, indices)
                known = self._shared.pending.digests(part.name, indices)
                lease = self._shared.pool.take(len(chunks) << part.geometry.chunk_shift)
                contents = await part.capture(chunks, lease.view)
                self._pipeline.append(
                    self._tasks.create_task(self._encode(part.name, chunks, contents, known, lease))
                )
                if len(self._pipeline) > self._shared.settings.threads:
                    await self._pack(await self._pipeline.popleft())
        while self._pipeline:
            await self._pack(await self._pipeline.popleft())
        for part in self._cut.volumes.values():
            await self._pack_zeros(part)
        await self._send()

    def check(self) -> None:
        """Raise when the cut has lost old content, so that nothing of it may be committed."""
        if self._cut.overflowed:
            raise CapacityError(
                "the guest writes faster than the store takes it, and the room for copies is used up",
                hint="the cut is taken again; give copies more room, or the guest a slower disk",
            )

    async def _prepare(self, name: str, chunks: Indices) -> None:
        """Make the map ready for entries of these chunks."""
        volume = self._shared.manifest.volume(name)
        for page in volume.pages_of(chunks):
            try:
                await self._shared.manifest.load_page(name, page, demand=False)
            except (UnavailableError, CorruptionError):
                break  # without it the chunks are simply stored again; a checkpoint will say what is wrong
        volume.reserve(chunks)

    async def _encode(
        self,
        volume: str,
        chunks: list[int],
        contents: list[memoryview],
        known: list[bytes | None],
        lease: Lease,
    ) -> _Batch:
        return _Batch(volume, chunks, await self._shared.workers.encode(contents, known), lease)

    async def _pack(self, batch: _Batch) -> None:
        zeros = self._zeros[batch.volume]
        for number, (chunk, encoded) in enumerate(zip(batch.chunks, batch.encoded, strict=True)):
            if number % PACK_STEP == PACK_STEP - 1:
                await asyncio.sleep(0)
            if encoded is None:
                self._shared.elided_chunks += 1
            elif encoded.kind is Kind.ZERO:
                zeros.append(chunk)
            else:
                if self._builder.size + len(encoded.payload) + ENTRY.itemsize > self._room:
                    await self._send()
                self._builder.add(batch.volume, chunk, encoded.kind, encoded.payload, encoded.digest)
                pins = isinstance(encoded.payload, memoryview)
                if pins and (not self._leases or self._leases[-1] is not batch.lease):
                    batch.lease.hold()
                    self._leases.append(batch.lease)
        batch.lease.drop()

    async def _pack_zeros(self, part: Taken) -> None:
        written: Indices = np.array(sorted(self._zeros[part.name]), dtype=np.int64)
        for number, (first, limit) in enumerate(merged([*part.zeros, *runs_of(written)])):
            if number % 1024 == 1023:
                await asyncio.sleep(0)
            if not self._shared.pending.is_zero(part.name, first, limit):
                self._shared.manifest.volume(part.name).reserve(np.array([first, limit - 1]))
                if self._builder.size + ENTRY.itemsize > self._room:
                    await self._send()
                self._builder.add_run(part.name, first, limit)

    async def _send(self) -> None:
        if not self._builder.entry_count:
            return
        builder, self._builder = self._builder, self._new_builder()
        self._room = self._shared.settings.segment_size
        leases, self._leases = self._leases, []
        sender = self._shared.sender
        name = sender.name(self._owner)
        sealer = sender.sealer(name, self._shared.manifest.keys)
        segment = builder.seal() if sealer is None else await self._shared.workers.seal(builder, sealer)
        await sender.enter(segment.size)

        async def send() -> None:
            buffers: list[Buffer] = []
            for first in range(0, len(segment.buffers), JOIN_STEP):
                buffers += joined(segment.buffers[first : first + JOIN_STEP])
                await asyncio.sleep(0)
            attempts = await sender.send(name, buffers, segment.size, self.check)
            self._shared.pending.add(name, segment)
            if attempts == 1:  # bytes of one that was given up may still be on their way
                for lease in leases:
                    lease.drop()

        # A callback, because a task that is cancelled before its first step never gets to a finally.
        self._tasks.create_task(send()).add_done_callback(lambda _: sender.leave(segment.size))

    def _new_builder(self) -> SegmentBuilder:
        keys = self._shared.manifest.keys
        return SegmentBuilder(self._shared.group, list(self._cut.volumes), keys.current if keys else 0)


def merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint runs in order, those that touch joined."""
    joined: list[tuple[int, int]] = []
    for first, limit in sorted(runs):
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], limit)
        else:
            joined.append((first, limit))
    return joined
