"""Restoring the newest generation of a group: lazily, or whole onto devices.

`open_newest` reads the head and opens its map; both kinds of restore go on from there, and so does an owner that
has claimed the group and has nothing of it on its disk.

*Lazily*: `mark_absent` tells a chunk map which chunks are in the store, and a `silo.sync.store_source.StoreSource`
provides them when they are read. The first byte takes three round trips: head; indexes and page of the map; chunk.

*Whole*: `restore_volume` walks the map page by page, fetches each segment's chunks in few large requests, verifies
every one of them, and writes only what is not zero to a device that already reads as zeros there.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import numpy as np

from silo.abc import BlockDevice
from silo.chunkmap import ChunkMap, Residency, runs_of
from silo.errors import CorruptionError, InvalidRequestError, InvariantError
from silo.geometry import Geometry
from silo.sync.codec import Kind
from silo.sync.head import parse_head
from silo.sync.layout import head_key
from silo.sync.manifest import Manifest
from silo.sync.reader import StoreReader
from silo.sync.walk import Job, fetch_job, jobs_of, stored_in
from silo.sync.workers import Workers
from silo.tasks import task_group

__all__ = ["Progress", "mark_absent", "open_newest", "restore_volume"]

Progress = Callable[[int, int], None]
"""Called with the bytes of the volume that are restored so far, and its size."""


async def open_newest(
    reader: StoreReader, group: str, *, directory: str | None = None, complete: bool = True
) -> Manifest:
    """The newest generation of a group, without claiming it.

    `InvalidRequestError` when there is no such group or nothing was ever committed, `CorruptionError`,
    `UnavailableError` when the reader's patience is over. ``directory`` and ``complete`` as in `Manifest.open`.
    """
    data = await reader.read_object(head_key(group))
    if data is None:
        raise InvalidRequestError(f"the store has no group {group!r}")
    head = parse_head(data, group)
    if head.generation == 0:
        raise InvalidRequestError(
            f"group {group} has no generation yet", hint="it was created, and nothing was committed"
        )
    return await Manifest.open(head, reader, directory=directory, complete=complete)


def mark_absent(manifest: Manifest, name: str, chunks: ChunkMap, *, device_is_zero: bool) -> None:
    """Set the residency of every chunk for a lazy restore: in the store, or zero.

    What is known of the map decides; a chunk of a page that is not loaded counts as being in the store even when it is
    zero there, and so does every chunk before the manifest is complete. ``device_is_zero``: the device reads as
    zeros, so that nothing needs to be punched.
    """
    if not manifest.is_complete:
        manifest.volume(name)  # it exists
        chunks.set_residency_run(0, chunks.count, Residency.ABSENT_STORE)
        return
    zero = Residency.ZERO if device_is_zero else Residency.ZERO_UNPUNCHED
    for first, limit, stored in manifest.volume(name).runs():
        chunks.set_residency_run(first, limit, Residency.ABSENT_STORE if stored else zero)


async def restore_volume(
    manifest: Manifest,
    reader: StoreReader,
    name: str,
    device: BlockDevice,
    *,
    progress: Progress | None = None,
) -> None:
    """Write a volume onto a device and flush it. What the device held before is gone, whatever the outcome.

    `InvalidRequestError` when the device is too small or the volume needs a base image, `CorruptionError` when a
    chunk could not be verified twice, `UnavailableError` when the store does not answer for longer than the
    reader's patience. When it raises or is cancelled the device holds any part of the volume.
    """
    info = manifest.head.volume(name)
    if info is None:
        manifest.volume(name)  # raises
        raise InvariantError(f"volume {name} has a map and is not in the head")
    if device.size < info.size:
        raise InvalidRequestError(f"volume {name} has {info.size} bytes, and the device only {device.size}")
    await manifest.complete()
    workers = Workers(reader.settings.threads, "silo-restore", reader.keys)
    try:
        restore = _Restore(manifest, reader, name, info.geometry, device, workers, progress)
        await restore.run()
        await device.flush()
    finally:
        workers.close()


class _Restore:
    """One `restore_volume` in progress."""

    def __init__(
        self,
        manifest: Manifest,
        reader: StoreReader,
        name: str,
        geometry: Geometry,
        device: BlockDevice,
        workers: Workers,
        progress: Progress | None,
    ) -> None:
        self._manifest = manifest
        self._map = manifest.volume(name)
        self._reader = reader
        self._name = name
        self._geometry = geometry
        self._device = device
        self._workers = workers
        self._progress = progress
        self._done = 0
        self._foreign: list[tuple[int, int]] = []
        """Extents of the device that may hold something else than zeros."""

    async def run(self) -> None:
        """Everything but the flush."""
        self._foreign = [(offset, offset + length) for offset, length in await self._device.data_extents()]
        lanes = self._reader.settings.background_lanes
        queue: asyncio.Queue[Job | None] = asyncio.Queue(lanes)
        async with task_group() as tasks:
            for _ in range(lanes):
                tasks.create_task(self._work(queue))
            async with aclosing(self._plan()) as jobs:
                async for job in jobs:
                    await queue.put(job)
            for _ in range(lanes):
                await queue.put(None)

    async def _plan(self) -> AsyncGenerator[Job, None]:
        """The requests, page by page of the map; zero runs are dealt with on the way."""
        settings = self._reader.settings
        for page in range(self._map.page_total):
            first, limit = self._map.extent_of(page)
            if self._map.is_zero(first, limit):
                await self._write_zeros(first, limit)
                continue
            await self._manifest.load_page(self._name, page, demand=True)
            page_slots = self._map.slots(first, limit)
            kinds = page_slots["kind"]
            if bool((kinds == Kind.INHERIT).any()):
                base = page_slots["digest"][kinds == Kind.INHERIT][0].tobytes().hex()
                raise InvalidRequestError(f"volume {self._name} needs its base image {base}")
            for low, high in runs_of(np.flatnonzero(kinds == Kind.ZERO)):
                await self._write_zeros(first + low, first + high)
            for job in jobs_of(self._map, first, page_slots, stored_in(page_slots), settings):
                yield job

    async def _work(self, queue: asyncio.Queue[Job | None]) -> None:
        while (job := await queue.get()) is not None:
            try:
                await self._restore_run(job)
            except CorruptionError:
                await self._restore_run(job)  # damaged on its way, perhaps; a second time it is an error

    async def _restore_run(self, job: Job) -> None:
        contents = await fetch_job(job, self._reader, self._workers, self._name, self._geometry)
        for chunk, content in zip(job.chunks, contents, strict=True):
            if isinstance(content, CorruptionError):
                raise CorruptionError(f"chunk {chunk} of {self._name} in {job.key}: {content.message}")
            await self._device.write(self._geometry.extent_of(chunk)[0], content)
        self._advance(sum(self._geometry.extent_of(chunk)[1] for chunk in job.chunks))

    async def _write_zeros(self, first: int, limit: int) -> None:
        start = first << self._geometry.chunk_shift
        end = min(limit << self._geometry.chunk_shift, self._geometry.size)
        # The extents are disjoint and ascending: begin with the last one that starts at or before ours.
        index = max(0, bisect_right(self._foreign, (start, self._geometry.size)) - 1)
        while index < len(self._foreign) and self._foreign[index][0] < end:
            low, high = max(self._foreign[index][0], start), min(self._foreign[index][1], end)
            if low < high:
                await self._device.zero(low, high - low)
            index += 1
        self._advance(end - start)

    def _advance(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._geometry.size)
