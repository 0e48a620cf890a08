"""Importing: a new group whose disks are still at an NBD server, served at once and fetched meanwhile.

A volume that is imported begins with every chunk *absent at the peer and dirty*: the store has never had it and must
never be asked for it, and until everything is here nothing is committed, as after a claim (safety rule 1). A commit in
between would name a disk that never existed, half of it zeros. So the life of an import is::

    check the server ──► record ──► maps ──► serve, hold commits ──► skip holes, fetch ──► flush ──► forget ──► commit

The *record* says durably which volumes come from where. It is written before the first map, so that a host that
dies at any moment goes on after its next start; and it is deleted only after a flush has made everything durable
that was fetched, so that nothing that a power loss takes back is beyond reach (safety rule 9). Whoever opens the
group again may name another address for the same disk.

`plan_imports` decides when a group is opened, `Import` does the work beside the guest. `import_to_file` does the same
without a guest, a store or a record: it copies a disk into a file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from silo.abc import Clock, ObjectStore
from silo.chunkmap import SYNC_DIRTY, ChunkMap, Residency
from silo.clock import SystemClock
from silo.devices.file import FileDevice
from silo.errors import (
    ClosedError,
    CorruptionError,
    FencedError,
    InvalidRequestError,
    SiloError,
    UnavailableError,
)
from silo.exports.nbd_client_dial import describe_export
from silo.exports.nbd_source import NbdSource
from silo.exports.nbd_uri import parse_uri
from silo.geometry import Geometry
from silo.group import Group
from silo.hydrator import Hydrator
from silo.opening import VolumeSpec
from silo.statedir import GroupState
from silo.storelink import StoreLink
from silo.sync.register import Register
from silo.tasks import task_group
from silo.threads import run_to_completion

__all__ = [
    "IMPORT_HOLD",
    "IMPORT_RECORD",
    "Import",
    "check_not_stored",
    "import_states",
    "import_to_file",
    "plan_imports",
    "remote_size",
]

logger = logging.getLogger(__name__)

IMPORT_RECORD = "import"
IMPORT_HOLD = "import"
FORMAT = 1

DELAY_MIN_S = 0.2
DELAY_MAX_S = 10.0
TELL_S = 0.2
PATIENCE_S = 60.0

Progress = Callable[[int, int], object]
"""Takes the bytes that are done, and all of them."""


class ImportRecord(msgspec.Struct, frozen=True):
    """Which volumes are being imported: name to the URI of the server's disk. It carries no secret."""

    volumes: dict[str, str]
    version: int = msgspec.field(default=FORMAT, name="format")


async def remote_size(uri: str) -> int:
    """The size of a server's disk in bytes. `UnavailableError` when the server does not answer."""
    return (await describe_export(uri)).size


def import_states(geometry: Geometry) -> bytearray:
    """The states of a volume of which nothing is here yet."""
    return bytearray([Residency.ABSENT_PEER | SYNC_DIRTY]) * geometry.chunk_count


async def read_imports(state: GroupState) -> dict[str, str]:
    """What the record says; nothing when there is none. `CorruptionError` when it makes no sense."""
    content = await state.read_record(IMPORT_RECORD)
    if content is None:
        return {}
    try:
        record = msgspec.json.decode(content, type=ImportRecord)
    except msgspec.MsgspecError as error:
        raise CorruptionError(f"the import record of {state.name} makes no sense: {error}") from error
    if record.version != FORMAT:
        raise CorruptionError(
            f"the import record of {state.name} has format {record.version}, which cannot be read",
            hint="it was written by a newer version of Silo",
        )
    return record.volumes


async def plan_imports(
    state: GroupState, specs: Mapping[str, VolumeSpec], *, generation: int
) -> dict[str, str]:
    """Which volumes of a group that is being opened still come from a server, and from where.

    What goes on is taken from the record, or from a spec that names another address. What is new is checked first: the
    server must have a disk of that size, the device must be empty, the group must be new. Returns after all of it
    is written down. ``generation`` is what the store has; ``InvalidRequestError`` when the import makes no sense.
    """
    known = await read_imports(state)
    if lost := sorted(known.keys() - specs.keys()):
        raise InvalidRequestError(
            f"group {state.name} is being imported, and {', '.join(lost)} is missing",
            hint="open it with the devices that it had",
        )
    here = set(await state.volume_names())
    wanted = {name: spec.import_from for name, spec in specs.items() if spec.import_from}
    for uri in wanted.values():
        parse_uri(uri)
    planned = {name: wanted.get(name, uri) for name, uri in known.items()}
    if not generation:
        # A volume that has a map and no record came here long ago; its spec just was not changed since.
        planned = {name: uri for name, uri in wanted.items() if name not in here} | planned
    if planned.keys() - known.keys() and (others := sorted(here - known.keys())):
        raise InvalidRequestError(
            f"a disk can be imported into a new group only, and {state.name} has {', '.join(others)}",
            hint="import it under another group's name",
        )
    for name in planned.keys() - here:
        await _check_new(f"{state.name}/{name}", specs[name], planned[name])
    if planned != known:
        record = msgspec.json.encode(ImportRecord(planned))
        await state.write_record(IMPORT_RECORD, record)
    return planned


async def _check_new(name: str, spec: VolumeSpec, uri: str) -> None:
    size = await remote_size(uri)
    if size != spec.device.size:
        raise InvalidRequestError(
            f"the device for {name} has {spec.device.size} bytes, the disk at {uri} has {size}",
            hint="give it the same size",
        )
    if not spec.overwrite and await spec.device.data_extents():
        raise InvalidRequestError(
            f"the device for {name} has content", hint="name a new file, or say overwrite=true to replace it"
        )


async def check_not_stored(store: ObjectStore, group: str, clock: Clock) -> None:
    """Raise `InvalidRequestError` when the store has a group of that name, which an import would not replace."""
    head = await Register(store, group, clock).read()
    if head is not None and head.generation:
        raise InvalidRequestError(
            f"the store has a group {group} already", hint="import it under another group's name"
        )


async def import_to_file(uri: str, to: Path, progress: Progress) -> dict[str, Any]:
    """Copy a server's disk into a new file or onto a block device of its size, flushed. Holes stay holes.

    ``progress`` is told the bytes that are here, and all of them. Returns size and the bytes that travelled.
    `UnavailableError` when the server is away for longer than `PATIENCE_S`. When it raises or is cancelled, a file
    that it made is gone again.
    """
    made = _is_new(to)
    clock = SystemClock()
    geometry = Geometry(await remote_size(uri))
    try:
        group = Group("import", clock)
        chunks = ChunkMap(import_states(geometry), geometry.chunk_count)
        group.add("disk", FileDevice(to, geometry.size), geometry, chunks=chunks)
        try:
            work = Import(group, clock, {"disk": uri})
            async with task_group() as tasks:
                running = tasks.create_task(work.run())
                await _watch(work, group, geometry, running, progress)
        finally:
            await group.aclose()
    except BaseException:
        if made:
            await run_to_completion(None, lambda: to.unlink(missing_ok=True))
        raise
    return {"size": geometry.size, "fetched_bytes": work.fetched_bytes}


def _is_new(path: Path) -> bool:
    return not path.exists()


async def _watch(
    work: Import, group: Group, geometry: Geometry, running: asyncio.Task[None], progress: Progress
) -> None:
    """Tell how far it is, and give up when the server has been away for too long."""
    patience = 0.0
    while not running.done():
        left = group.absent_counts((Residency.ABSENT_PEER,)) * geometry.chunk_size
        progress(max(0, geometry.size - left), geometry.size)
        await asyncio.wait((running,), timeout=TELL_S)
        patience = patience + TELL_S if work.error else 0.0
        if patience >= PATIENCE_S:
            raise UnavailableError(work.error)


def _nothing() -> None:
    """When nobody waits for the end of an import but its caller."""


class Import:
    """See the module. One per group that is being imported; `run` is awaited once, by a task of the group's."""

    def __init__(
        self,
        group: Group,
        clock: Clock,
        volumes: Mapping[str, str],
        *,
        state: GroupState | None = None,
        link: StoreLink | None = None,
    ) -> None:
        """``state`` has the record, ``link`` holds commits back from here on; without them nothing is remembered or
        stored."""
        self.volumes = dict(volumes)
        """Volume name to where it comes from."""
        self._group = group
        self._state = state
        self._link = link
        self._hydrator = Hydrator(group, clock, residency=Residency.ABSENT_PEER)
        self._sources = {
            name: NbdSource(uri, group.volumes[name].geometry, clock) for name, uri in volumes.items()
        }
        self._trouble = ""
        self._done = asyncio.Event()
        self._ended = False
        for name, source in self._sources.items():
            group.volumes[name].set_source(Residency.ABSENT_PEER, source)
        if link is not None:
            link.hold(IMPORT_HOLD)

    @property
    def error(self) -> str:
        """Why it makes no progress just now; empty when it does."""
        sources = (source.error for source in self._sources.values())
        return next(filter(None, sources), "") or self._hydrator.error or self._trouble

    @property
    def fetched_bytes(self) -> int:
        """Bytes that travelled."""
        return sum(source.fetched_bytes for source in self._sources.values())

    @property
    def is_done(self) -> bool:
        """Everything is here, or nothing more will come."""
        return self._done.is_set()

    def status(self) -> dict[str, Any] | None:
        """For people and for JSON; ``None`` when it is over."""
        if self.is_done:
            return None
        return {"from": self.volumes, "fetched_bytes": self.fetched_bytes, "error": self.error}

    async def wait_done(self) -> None:
        """Return when everything is durably here; `ClosedError` when it will not be. No deadline: see the module."""
        await self._done.wait()
        if self._ended:
            raise ClosedError(f"group {self._group.name} was closed before it was imported")

    async def run(self, on_done: Callable[[], object] = _nothing) -> None:
        """Fetch everything, make it durable, forget the record, call ``on_done``, and let commits go.

        Goes on for as long as the server is away; ends early when the group is not ours any more. Cancellation leaves
        the record; the next start goes on. However it ends, the servers are parted from.
        """
        try:
            if await self._bring_in():
                if self._link is not None:
                    self._link.release_hold(IMPORT_HOLD)
                on_done()
                self._done.set()
        finally:
            self._ended = not self._done.is_set()
            self._done.set()
            for source in self._sources.values():
                await source.aclose()

    async def _bring_in(self) -> bool:
        """False when the group is not ours any more."""
        for name in self._sources:
            await self._skip_holes(name)
        await self._hydrator.run()
        delay_s = DELAY_MIN_S
        while True:
            try:
                await self._group.flush()
                if self._state is not None:
                    await self._state.delete_record(IMPORT_RECORD)
            except (FencedError, ClosedError) as error:
                logger.warning("group %s: its import was ended: %s", self._group.name, error)
                return False
            except SiloError as error:  # of the local disk
                self._trouble = str(error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, DELAY_MAX_S)
            else:
                break
        self._trouble = ""
        for name in self._sources:
            self._group.volumes[name].set_source(Residency.ABSENT_PEER, None)
        return True

    async def _skip_holes(self, name: str) -> None:
        """What the server knows to be zeros need not travel. Only that: a server that cannot say costs time."""
        volume = self._group.volumes[name]
        delay_s = DELAY_MIN_S
        while True:
            try:
                async for first, limit in self._sources[name].zero_runs():
                    volume.fill_zeros_nowait(first, limit)
            except SiloError as error:
                self._trouble = str(error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, DELAY_MAX_S)
            else:
                self._trouble = ""
                return
