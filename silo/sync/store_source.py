"""The store as a source of chunks, for volumes whose content is there and not here.

A read resolves through a `Manifest`: one page of the map when it is not loaded yet, then one ranged GET of the
chunk, verified against its digest. For the owner of the group that manifest is the syncer's, which follows its own
commits; so a chunk is always looked up in the current map. When an object is missing, or its bytes are wrong, the
chunk is looked up and read once more before the read fails. It never becomes zeros.

Calls on *demand* (a guest waits) go out at once in their own lanes and are tried again for a while when the store
does not answer. Calls in the *background* wait for a lane, and whoever gets one takes along all waiting
neighbours of its segment: hydrate with a good number of concurrent calls, and they become few large requests.
Background calls fail at once.
"""

from __future__ import annotations

import asyncio

import attrs

from silo.abc import Buffer, ChunkSource
from silo.errors import CorruptionError, InvariantError, SiloError, UnavailableError
from silo.sync.codec import ChunkDecoder, Kind, Place
from silo.sync.committed import Location
from silo.sync.flight import SingleFlight
from silo.sync.manifest import Manifest
from silo.sync.reader import StoreReader
from silo.sync.runs import plan_runs
from silo.sync.workers import Stored, Workers

__all__ = ["StoreSource"]


@attrs.define(eq=False)
class _Wanted:
    """A background call that waits for its content."""

    location: Location
    length: int
    place: Place
    content: asyncio.Future[Buffer | None]
    """``None``: there is no such object. Cancelled: whoever fetched it was, and it must be asked for again."""
    woken: asyncio.Event = attrs.field(factory=asyncio.Event)
    leads: bool = False
    """It got a lane: its own task fetches."""


class StoreSource(ChunkSource):
    """See the module. `aclose` when no call is in progress; the manifest and the reader are the caller's."""

    def __init__(self, manifest: Manifest, reader: StoreReader) -> None:
        self.manifest = manifest
        """Where chunks are looked up. May be replaced by a newer generation of the same group at any time; the old
        one may be closed then."""
        self.fetched_chunks = 0
        self._reader = reader
        self._decoder = ChunkDecoder(reader.keys)
        self._workers = Workers(reader.settings.threads, "silo-fetch", reader.keys)
        self._flights: SingleFlight[tuple[str, int, bool], Buffer | None] = SingleFlight()
        self._lanes = reader.settings.background_lanes
        self._waiting: dict[_Wanted, None] = {}
        """Background calls in the order in which they came, none of them in a run yet."""

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came from the store, pages of the map included."""
        return self._reader.bytes_read

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        """The content of a chunk as of the newest generation; ``None`` when it is zeros. As the port says."""
        return await self._flights.run(
            (volume, chunk, demand), lambda: self._fetch(volume, chunk, demand=demand)
        )

    async def _fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        while True:
            manifest = self.manifest
            try:
                return await self._fetch_from(manifest, volume, chunk, demand=demand)
            except SiloError:
                if manifest is self.manifest:
                    raise  # else it was replaced, and perhaps closed, while we read

    async def _fetch_from(
        self, manifest: Manifest, volume: str, chunk: int, *, demand: bool
    ) -> Buffer | None:
        error = CorruptionError(f"chunk {chunk} of {volume} is missing from the store")
        for _ in range(2):
            location = await manifest.locate(volume, chunk, demand=demand)
            if location.kind is Kind.ZERO:
                return None
            if location.kind is Kind.INHERIT:
                raise CorruptionError(
                    f"chunk {chunk} of {volume} is in the base image {location.digest.hex()}",
                    hint="restore onto an overlay over that image",
                )
            info = manifest.head.volume(volume)
            if info is None:
                raise CorruptionError(f"generation {manifest.head.generation} lost its volume {volume}")
            length = info.geometry.extent_of(chunk)[1]
            try:
                content = await (self._read_alone if demand else self._read_along)(
                    location, length, Place(location.key, volume, chunk)
                )
            except CorruptionError as damage:
                error = CorruptionError(f"chunk {chunk} of {volume}: {damage.message}", hint=damage.hint)
                continue
            if content is not None:
                self.fetched_chunks += 1
                return content
        raise error

    async def _read_alone(self, location: Location, length: int, place: Place) -> Buffer | None:
        payload = await self._reader.read(location.key, location.offset, location.length, demand=True)
        if payload is None:
            return None
        # Inline: a chunk takes less time than the way to a thread and back.
        return self._decoder.decode(location.kind, payload, length, location.digest, place)

    # ---- background: runs of neighbours ---------------------------------------------------------------------

    async def _read_along(self, location: Location, length: int, place: Place) -> Buffer | None:
        while True:
            wanted = _Wanted(location, length, place, asyncio.get_running_loop().create_future())
            self._waiting[wanted] = None
            self._assign_lanes()
            try:
                # No deadline: it is woken by those before it, and each of them ends or is cancelled.
                await wanted.woken.wait()
                if wanted.leads:
                    await self._fetch_run(wanted)
            finally:
                self._waiting.pop(wanted, None)
                self._lanes += wanted.leads
                self._assign_lanes()
            if not wanted.content.cancelled():
                return wanted.content.result()

    def _assign_lanes(self) -> None:
        """Let the longest waiting calls fetch, each with its neighbours, while there are lanes."""
        while self._lanes and self._waiting:
            first = next(iter(self._waiting))
            del self._waiting[first]
            self._lanes -= 1
            first.leads = True
            first.woken.set()

    def _take_run(self, leader: _Wanted) -> tuple[int, int, list[_Wanted]]:
        """``(offset, length, members)`` of the request that serves ``leader`` and its waiting neighbours."""
        candidates = [leader]
        candidates += (other for other in self._waiting if other.location.key == leader.location.key)
        spans = ((wanted.location.offset, wanted.location.length) for wanted in candidates)
        settings = self._reader.settings
        for run in plan_runs(spans, gap=settings.run_gap, size=settings.run_size):
            if 0 in run.members:
                members = [candidates[member] for member in run.members]
                for wanted in members:
                    self._waiting.pop(wanted, None)
                return run.start, run.size, members
        raise InvariantError("a run was planned without the one that it was planned for")

    async def _fetch_run(self, leader: _Wanted) -> None:
        """Read and verify a run, and hand every member its content or error."""
        start, length, members = self._take_run(leader)
        try:
            payload = await self._reader.read_behind(leader.location.key, start, length)
            if payload is not None:
                view = memoryview(payload)
                contents = await self._workers.decode([_cut_out(view, start, wanted) for wanted in members])
                for wanted, content in zip(members, contents, strict=True):
                    _settle(wanted, content)
        except (UnavailableError, CorruptionError) as error:
            for wanted in members:
                _settle(wanted, error)
        except asyncio.CancelledError:
            for wanted in members:
                wanted.content.cancel()
            raise
        finally:
            for wanted in members:
                _settle(wanted, None)
                wanted.woken.set()

    async def aclose(self) -> None:
        """Let the threads end."""
        self._workers.close()


def _cut_out(run: memoryview, start: int, wanted: _Wanted) -> Stored:
    location = wanted.location
    first = location.offset - start
    payload = run[first : first + location.length]
    return Stored(location.kind, payload, wanted.length, location.digest, wanted.place)


def _settle(wanted: _Wanted, outcome: Buffer | SiloError | None) -> None:
    if wanted.content.done():
        return
    if isinstance(outcome, SiloError):
        wanted.content.set_exception(outcome)
        wanted.content.exception()  # its caller may have been cancelled
    else:
        wanted.content.set_result(outcome)
