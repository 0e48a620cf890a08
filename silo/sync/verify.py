"""Verifying a generation: every digest from the head down to the chunks, or those of a sample.

The head, the root, the indexes and the pages of the map are verified whole in any case; a sample is one of chunks.
What is damaged or missing is listed, and the rest is verified all the same. Reads only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import numpy as np

from silo.abc import Buffer, Clock
from silo.chunkmap import Indices
from silo.errors import CorruptionError, InvalidRequestError
from silo.geometry import Geometry
from silo.sync.codec import Kind
from silo.sync.manifest import Manifest
from silo.sync.reader import StoreReader
from silo.sync.walk import Job, fetch_job, jobs_of, stored_in
from silo.sync.workers import Workers
from silo.tasks import task_group

__all__ = ["Damage", "VerifyProgress", "VerifyReport", "verify_generation"]

VerifyProgress = Callable[[int, int], None]
"""Called with the bytes of all volumes that were looked at so far, and their sizes together."""

DAMAGES_MAX = 1000
"""More are counted, not listed."""


@attrs.frozen
class Damage:
    """A part of a volume that cannot be had."""

    volume: str
    first: int
    """Chunk."""
    limit: int
    why: str


@attrs.define(kw_only=True)
class VerifyReport:
    """What was looked at and found. Sizes in bytes."""

    generation: int
    chunks: int = 0
    """Chunks whose content was fetched and whose digest was compared."""
    bytes_store: int = 0
    damaged_chunks: int = 0
    damages: list[Damage] = attrs.field(factory=list)

    @property
    def is_sound(self) -> bool:
        """Nothing was found."""
        return not self.damaged_chunks


async def verify_generation(
    manifest: Manifest,
    reader: StoreReader,
    clock: Clock,
    *,
    sample: float = 1.0,
    progress: VerifyProgress | None = None,
) -> VerifyReport:
    """Verify all volumes of a generation; of their chunks the part ``sample``, chosen by chance.

    `CorruptionError` when the head, the root or an index is damaged, so that nothing can be said of the chunks;
    `UnavailableError` when the store does not answer for longer than the reader's patience.
    """
    if not 0 < sample <= 1:
        raise InvalidRequestError(f"{sample} is no part of a whole", hint="take a number above 0 and up to 1")
    await manifest.complete()
    report = VerifyReport(generation=manifest.head.generation)
    chance = np.random.default_rng(int.from_bytes(clock.token(8), "little"))
    workers = Workers(reader.settings.threads, "silo-verify", reader.keys)
    before = reader.bytes_read
    try:
        verification = _Verification(manifest, reader, workers, report, progress)
        for info in manifest.head.volumes:
            await verification.run(info.name, info.geometry, sample, chance)
    finally:
        workers.close()
    report.bytes_store = reader.bytes_read - before
    return report


class _Verification:
    """One `verify_generation` in progress."""

    def __init__(
        self,
        manifest: Manifest,
        reader: StoreReader,
        workers: Workers,
        report: VerifyReport,
        progress: VerifyProgress | None,
    ) -> None:
        self._manifest = manifest
        self._reader = reader
        self._workers = workers
        self._report = report
        self._progress = progress
        self._done = 0
        self._total = sum(info.size for info in manifest.head.volumes)

    async def run(self, name: str, geometry: Geometry, sample: float, chance: np.random.Generator) -> None:
        """One volume, page by page; a few requests at once."""
        volume = self._manifest.volume(name)
        for page in range(volume.page_total):
            first, limit = volume.extent_of(page)
            try:
                await self._manifest.load_page(name, page, demand=True)
            except CorruptionError as damage:
                self._note(name, first, limit, damage)
            else:
                slots = volume.slots(first, limit)
                wanted = stored_in(slots)
                if sample < 1:
                    wanted = wanted[chance.random(len(wanted)) < sample]
                jobs = jobs_of(volume, first, slots, wanted, self._reader.settings)
                await self._run_page(name, geometry, jobs)
                if bool((slots["kind"] == Kind.INHERIT).any()):
                    inherited: Indices = np.flatnonzero(slots["kind"] == Kind.INHERIT) + first
                    why = CorruptionError("it is in a base image, which the store does not have")
                    self._note(name, int(inherited[0]), int(inherited[-1]) + 1, why)
            self._done += geometry.extent_of(limit - 1)[0] + geometry.extent_of(limit - 1)[1]
            self._done -= geometry.extent_of(first)[0]
            if self._progress is not None:
                self._progress(self._done, self._total)

    async def _run_page(self, name: str, geometry: Geometry, jobs: Iterator[Job]) -> None:
        async def work() -> None:
            for job in jobs:  # shared by all lanes, which take turns between awaits
                await self._verify(name, geometry, job)

        async with task_group() as tasks:
            for _ in range(self._reader.settings.background_lanes):
                tasks.create_task(work())

    async def _verify(self, name: str, geometry: Geometry, job: Job) -> None:
        contents = await self._fetch(name, job, geometry)
        if isinstance(contents, CorruptionError) or any(
            isinstance(content, CorruptionError) for content in contents
        ):
            contents = await self._fetch(name, job, geometry)  # damaged on its way, perhaps
        if isinstance(contents, CorruptionError):
            for chunk in job.chunks:
                self._note(name, chunk, chunk + 1, contents)
            return
        for chunk, content in zip(job.chunks, contents, strict=True):
            if isinstance(content, CorruptionError):
                self._note(name, chunk, chunk + 1, content)
        self._report.chunks += len(job.chunks)

    async def _fetch(
        self, name: str, job: Job, geometry: Geometry
    ) -> list[Buffer | CorruptionError] | CorruptionError:
        try:
            return await fetch_job(job, self._reader, self._workers, name, geometry)
        except CorruptionError as error:
            return error

    def _note(self, name: str, first: int, limit: int, why: CorruptionError) -> None:
        self._report.damaged_chunks += limit - first
        if len(self._report.damages) < DAMAGES_MAX:
            self._report.damages.append(Damage(name, first, limit, why.message))
