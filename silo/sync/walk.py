"""Walking over a whole volume of a generation: which requests bring its chunks, and what they bring.

What is stored is fetched segment by segment, in few large requests, one page of the map at a time. Who walks decides
what to do with the contents: `silo.sync.restore` writes them, `silo.sync.verify` counts them.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np

from silo.abc import Buffer
from silo.chunkmap import Indices
from silo.errors import CorruptionError
from silo.geometry import Geometry
from silo.sync.codec import Kind, Place
from silo.sync.committed import VolumeMap
from silo.sync.mappage import Slots
from silo.sync.reader import StoreReader
from silo.sync.runs import plan_runs
from silo.sync.settings import FetchSettings
from silo.sync.workers import Stored, Workers

__all__ = ["Job", "fetch_job", "jobs_of", "stored_in"]


@attrs.frozen
class Job:
    """One request and the chunks that it brings."""

    key: str
    start: int
    length: int
    chunks: list[int]
    slots: Slots


def stored_in(slots: Slots) -> Indices:
    """The positions of the slots that have a payload in the store."""
    return np.flatnonzero((slots["kind"] == Kind.RAW) | (slots["kind"] == Kind.ZSTD))


def jobs_of(
    volume: VolumeMap, first: int, page_slots: Slots, wanted: Indices, settings: FetchSettings
) -> Iterator[Job]:
    """The requests for the chunks at ``wanted`` positions of a page whose first chunk is ``first``.

    The map must not be committed to before the last of them was taken: slots name segments by number.
    """
    segments = page_slots["segment"][wanted]
    for segment in np.unique(segments):
        chosen = wanted[segments == segment]
        slots = page_slots[chosen]
        key = volume.key(int(segment))
        spans = zip(slots["offset"].tolist(), slots["length"].tolist(), strict=True)
        for run in plan_runs(spans, gap=settings.run_gap, size=settings.run_size):
            members = list(run.members)
            yield Job(key, run.start, run.size, (chosen[members] + first).tolist(), slots[members])


async def fetch_job(
    job: Job, reader: StoreReader, workers: Workers, volume: str, geometry: Geometry
) -> list[Buffer | CorruptionError]:
    """The verified contents of the chunks of a job; an error stands where one could not be had.

    `CorruptionError` when the object is missing or too short, `UnavailableError` as `StoreReader.read`.
    """
    payload = await reader.read(job.key, job.start, job.length, demand=True)
    if payload is None:
        raise CorruptionError(f"{job.key} is missing from the store")
    view = memoryview(payload)
    batch = []
    for chunk, slot in zip(job.chunks, job.slots, strict=True):
        start = int(slot["offset"]) - job.start
        part = view[start : start + int(slot["length"])]
        length = geometry.extent_of(chunk)[1]
        place = Place(job.key, volume, chunk)
        batch.append(Stored(int(slot["kind"]), part, length, slot["digest"].tobytes(), place))
    return await workers.decode(batch)
