"""The host: the one place where the rooms are wired together.

A host has a state directory, a clock, and any number of groups. It opens groups (`open_group`), exports them
(`export`), moves them away (`HostedGroup.migrate`) and takes in those that other hosts bring (`offers`)::

    async with silo.Host("/var/lib/silo") as host:
        group = await host.open_group("vm1", {"disk": silo.FileDevice("disk.img")}, store="s3://bucket/prefix")
        nbd = await host.export(group, "unix:/run/silo/vm1.sock")
        ...

Leaving the block stores what was acknowledged and is not stored yet, or raises `UnavailableError` with the number
of bytes that are only on the local disk. Everything belongs to the event loop on which the host was entered.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import attrs

from silo.abc import BlockDevice, Clock, ObjectStore, Transport, Workload
from silo.arriving import Arrival, prepare_arrival
from silo.clock import SystemClock
from silo.errors import ClosedError, InvalidRequestError, SiloError
from silo.exporting import Exporter, GroupExport
from silo.exports.nbd_server import NbdServerSettings
from silo.exports.nbd_tls import NbdTls
from silo.flushing import store_flush
from silo.geometry import Geometry
from silo.group import CopyLimits, Group
from silo.hooks.runner import WorkloadRunner
from silo.hosted import HostedGroup
from silo.importing import Import, import_states, plan_imports
from silo.opening import (
    VolumeSpec,
    claim_group,
    open_volumes,
    preparation,
    read_unfinished,
    reopen_volumes,
)
from silo.p2p.ports import Site
from silo.p2p.reception import IncomingOffer, Reception
from silo.p2p.records import HANDOVER_RECORD
from silo.p2p.settings import MigrationSettings
from silo.p2p.target import TargetMigration
from silo.p2p.tls import HostTls
from silo.p2p.tls_transport import TlsTransport
from silo.p2p.transport import PlainTransport
from silo.resuming import RESUME_RECORD, begin_resumption, refuse_hibernated
from silo.statedir import GroupState, StateDir
from silo.storelink import StoreLink
from silo.sync.cipher import KeyRing
from silo.sync.settings import FetchSettings, SyncSettings
from silo.sync.store_url import open_store

__all__ = ["Host"]

T = TypeVar("T")

HEAT_INTERVAL_S = 1.0


@attrs.frozen
class _Opening:
    """How a group is to be opened, see `Host.open_group` and `Host.resume_group`."""

    store: str | ObjectStore | None
    sync: SyncSettings | None
    fetch: FetchSettings | None
    workload: Workload | None
    copies: CopyLimits | None
    host_is_dead: bool = False
    after_lease: bool = False
    cold: bool = False
    resumes: bool = False


class Host:
    """See the module. Use as an async context manager; one per state directory and process."""

    def __init__(
        self,
        state: str | os.PathLike[str],
        *,
        listen: str | None = None,
        tls: HostTls | None = None,
        transport: Transport | None = None,
        migration: MigrationSettings | None = None,
        nbd: NbdServerSettings | None = None,
        clock: Clock | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        """``listen`` is where other hosts may bring groups. With ``tls`` hosts reach one another over TCP, each
        showing its certificate; without it, over Unix sockets only. ``transport`` stands for any other way, plain TCP
        (`silo.p2p.transport.PlainTransport`) among them. ``nbd`` limits what the clients of `export` may take. ``keys``
        encrypt what new groups have in their stores, and are needed for groups that are encrypted."""
        if tls is not None and transport is not None:
            raise InvalidRequestError("a host has either tls or a transport of its own")
        self.clock = clock or SystemClock()
        self.groups: dict[str, HostedGroup] = {}
        self._path = Path(state)
        self._listen = listen
        self._keys = keys
        self._nbd = nbd
        self._tls = tls
        self._transport = transport or (TlsTransport(tls) if tls is not None else PlainTransport())
        self._migration = migration or MigrationSettings()
        self._site: Site | None = None
        self._reception: Reception | None = None
        self.peer_url = ""
        """Where other hosts reach this one, with the port that was really bound."""
        self._state: StateDir | None = None
        self._tasks = asyncio.TaskGroup()
        self._exporter: Exporter | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._receiving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._state = StateDir(self._path)
        try:
            if self._tls is not None:
                await self._tls.check(self.clock)
            self._site = Site(
                host=await self._state.host_name(self.clock),
                transport=self._transport,
                clock=self.clock,
                settings=self._migration,
            )
            self._reception = Reception(self._site, self._holds_handover)
            if self._listen is not None:
                self.peer_url = await self._reception.listen(self._listen)
        except BaseException:
            await self._state.aclose()
            raise
        await self._tasks.__aenter__()
        if self._listen is not None:
            self._receiving = self._tasks.create_task(self._reception.run())
        self._exporter = Exporter(self._tasks, self._nbd)
        self._ticker = self._tasks.create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        errors: list[SiloError] = []
        drain = kind is None or not issubclass(kind, asyncio.CancelledError)
        try:
            await self._close_groups(errors, drain=drain)
        finally:
            if self._reception is not None:
                await self._reception.aclose()
            if self._exporter is not None:
                await self._exporter.aclose()
            for task in (self._ticker, self._receiving):
                if task is not None:
                    task.cancel()
            await self._end_tasks()
            if self._state is not None:
                await self._state.aclose()
                self._state = None
        if errors and kind is None:
            raise errors[0]

    async def _close_groups(self, errors: list[SiloError], *, drain: bool) -> None:
        """Close them all. A cancellation means haste: from there on nothing is stored, but all the rest is done."""
        hurry: asyncio.CancelledError | None = None
        groups = list(self.groups.values())
        while groups:
            try:
                await self.close_group(groups[0], drain=drain and hurry is None)
            except SiloError as failure:
                errors.append(failure)
            except asyncio.CancelledError as cancelled:
                hurry = cancelled
                continue
            del groups[0]
        if hurry is not None:
            raise hurry

    async def _end_tasks(self) -> None:
        """All of them have been told to end. One that failed had cancelled us; its error is the one to raise."""
        try:
            await self._tasks.__aexit__(None, None, None)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _tick(self) -> None:
        """Let every group look around once a second, until cancelled."""
        while True:
            await asyncio.sleep(HEAT_INTERVAL_S)
            for hosted in self.groups.values():
                hosted.tick()

    async def open_group(
        self,
        name: str,
        devices: Mapping[str, BlockDevice | VolumeSpec],
        *,
        store: str | ObjectStore | None = None,
        sync: SyncSettings | None = None,
        fetch: FetchSettings | None = None,
        workload: Workload | None = None,
        copies: CopyLimits | None = None,
        host_is_dead: bool = False,
        after_lease: bool = False,
        cold: bool = False,
    ) -> HostedGroup:
        """Become the owner of a group and serve it from these devices, which are the host's from now on.

        A group that the store has and this host does not know is restored lazily: it can be used at once, and its
        chunks come from the store when they are read, and in the background. ``host_is_dead`` takes a group whose
        last owner did not let go; the caller asserts that no other host serves it any more. ``after_lease`` does it
        without an assertion, when that owner had a lease (`SyncSettings.lease_s`): after waiting until it has ended.
        A hibernated group is refused, because it has more than its disks (`resume_group`), unless that shall be
        given up: ``cold``. A volume with ``import_from`` begins with what that NBD server has, and can be used at once.

        `FencedError` when another host owns it, `InvalidRequestError` when it must not be opened like this,
        `UnavailableError` when the store does not answer. Then, and after a cancellation, the devices are closed
        and nothing is left but perhaps a claim, which this host can repeat.
        """
        how = _Opening(
            store,
            sync,
            fetch,
            workload,
            copies,
            host_is_dead=host_is_dead,
            after_lease=after_lease,
            cold=cold,
        )
        return await self._open_or_close(name, _specs(devices), how)

    async def resume_group(
        self,
        name: str,
        devices: Mapping[str, BlockDevice | VolumeSpec],
        *,
        store: str | ObjectStore,
        sync: SyncSettings | None = None,
        fetch: FetchSettings | None = None,
        workload: Workload | None = None,
        copies: CopyLimits | None = None,
        host_is_dead: bool = False,
        export: str | None = None,
        tls: NbdTls | None = None,
    ) -> HostedGroup:
        """Wake a hibernated group here, onto these devices; what they hold gives way. Returns when its workload runs;
        content comes from the store when it is read, and in the background.

        ``export`` serves it over NBD at this address (with ``tls`` as in `export`), before the workload is told to
        resume. ``host_is_dead`` takes the group from a host that died while it resumed it. When this raises or is
        cancelled the group is hibernated as before, or, when that could not be said to the store, this call can be
        repeated here. Raises as `open_group`, and `InvalidRequestError` when the group is not hibernated.
        """
        specs = {volume: attrs.evolve(spec, overwrite=True) for volume, spec in _specs(devices).items()}
        how = _Opening(store, sync, fetch, workload, copies, host_is_dead=host_is_dead, resumes=True)
        hosted = await self._open_or_close(name, specs, how)
        try:
            if export is not None:
                await self.export(hosted, export, tls=tls)
            await hosted.wake()
        except BaseException:
            await hosted.give_back()
            raise
        return hosted

    async def _open_or_close(self, name: str, specs: Mapping[str, VolumeSpec], how: _Opening) -> HostedGroup:
        """The group, open and known; or its devices are closed."""
        try:
            if not specs:
                raise InvalidRequestError(f"group {name} needs at least one volume")
            hosted = await self._open(name, specs, how)
        except BaseException:
            for spec in specs.values():
                await spec.device.aclose()
            raise
        self.groups[name] = hosted
        return hosted

    async def _open(self, name: str, specs: Mapping[str, VolumeSpec], how: _Opening) -> HostedGroup:
        state = await self._open_state(name)
        link: StoreLink | None = None
        try:
            link = await self._open_link(state, how.store, how.sync, how.fetch)
            left = await read_unfinished(state)
            imports: dict[str, str] = {}
            waking = await begin_resumption(state, link) if how.resumes else None
            if waking is None:
                await refuse_hibernated(state, link, cold=how.cold)
            group = Group(name, self.clock, is_open=not left.is_undecided, copies=self._room(how.copies))
            if left.is_undecided:
                await reopen_volumes(group, state, link, specs)
            else:
                arrived = left.handover is not None
                head = await claim_group(
                    state, link, specs, force=how.host_is_dead, after_lease=how.after_lease, arrived=arrived
                )
                if waking is not None:
                    waking.check(head)
                imports = await plan_imports(state, specs, generation=head.generation if head else 0)
                await open_volumes(
                    group, state, link, head, specs, imported=dict.fromkeys(imports, import_states)
                )
            hosted = self._hosted(group, state, link, how.workload)
            hosted.waking = waking
            if imports:
                hosted.importing = Import(group, self.clock, imports, state=state, link=link)
            if not left.is_undecided:
                await hosted.start()
            if left.offer is not None:
                hosted.continue_leaving(left.offer)
            elif left.handover is not None:
                self._continue_arriving(hosted, left.handover)
        except BaseException:
            if link is not None:
                await link.close(drain=False)
            await state.aclose()
            raise
        return hosted

    # ---- groups that arrive -------------------------------------------------------------------------------

    async def offers(self) -> AsyncIterator[Arrival]:
        """The groups that other hosts would move here, as they come. No deadline: waiting is what it is for."""
        reception = self._running_reception()
        async for offer in reception.offers():
            if (hosted := self.groups.get(offer.group)) is not None:
                await hosted.make_way(offer.source_host)
            yield Arrival(offer, self)

    async def accept(
        self,
        offer: IncomingOffer,
        devices: Mapping[str, BlockDevice | VolumeSpec],
        *,
        store: str | ObjectStore | None,
        sync: SyncSettings | None,
        fetch: FetchSettings | None,
        workload: Workload | None,
        copies: CopyLimits | None,
        export: str | None,
        tls: NbdTls | None,
        flush: str,
    ) -> HostedGroup:
        """See `Arrival.accept`."""
        specs = _specs(devices)
        state: GroupState | None = None
        link: StoreLink | None = None
        try:
            state = await self._open_state(offer.group)
            link = await self._open_link(state, store, sync, fetch)
            group = Group(offer.group, self.clock, is_open=False, copies=self._room(copies))
            await prepare_arrival(offer, group, state, link, specs)
            hosted = self._hosted(group, state, link, workload)
            if export is not None:
                await self.export(hosted, export, tls=tls, flush=flush)
        except BaseException as error:
            offer.refuse(
                error.message if isinstance(error, SiloError) else "the host failed to prepare for it"
            )
            if link is not None:
                await link.close(drain=False)
            if state is not None:
                await state.aclose()
            for spec in specs.values():
                await spec.device.aclose()
            raise
        hosted.arrive(lambda plugs: TargetMigration.accept(group, offer, self._running_site(), plugs))
        self.groups[offer.group] = hosted
        return hosted

    def _continue_arriving(self, hosted: HostedGroup, record: bytes) -> None:
        """After a restart: a migration to here was past its handover."""
        reception, site = self._running_reception(), self._running_site()
        hosted.arrive(lambda plugs: TargetMigration.restore(hosted.group, record, reception, site, plugs))

    async def _holds_handover(self, group: str) -> bool:
        """A group that is not open may have arrived all the same: its source must not be told otherwise."""
        return await self._running_state().has_record(group, HANDOVER_RECORD)

    def _running_reception(self) -> Reception:
        return _running(self._reception)

    def _hosted(
        self, group: Group, state: GroupState, link: StoreLink | None, workload: Workload | None
    ) -> HostedGroup:
        exporter = self._running_exporter()
        runner = WorkloadRunner(
            workload,
            self.clock,
            group=group.name,
            devices=lambda: exporter.first_uris(group.name),
            timeout_s=self._migration.workload_timeout_s,
        )
        return HostedGroup(
            group, state, link, runner, exporter, self._running_site(), self._tasks, self._gone
        )

    def _gone(self, name: str) -> None:
        """A group was closed: by us, or because it has moved away or did not arrive."""
        self.groups.pop(name, None)

    async def _open_state(self, name: str) -> GroupState:
        if name in self.groups:
            raise InvalidRequestError(f"group {name} is open already")
        return await self._running_state().open_group(name)

    async def _open_link(
        self,
        state: GroupState,
        store: str | ObjectStore | None,
        sync: SyncSettings | None,
        fetch: FetchSettings | None,
    ) -> StoreLink | None:
        if store is None:
            return None
        opened = open_store(store, self.clock) if isinstance(store, str) else store
        return await StoreLink.open(
            state.name,
            opened,
            self.clock,
            prepare=preparation(state, opened),
            owns_store=isinstance(store, str),
            sync=sync,
            fetch=fetch,
            keys=self._keys,
            directory=str(self._path),
        )

    def _room(self, copies: CopyLimits | None) -> CopyLimits:
        """Copies spill into the state directory unless told otherwise: a common temporary one may be in memory."""
        return copies or CopyLimits(directory=str(self._path))

    def _running_state(self) -> StateDir:
        return _running(self._state)

    def _running_site(self) -> Site:
        return _running(self._site)

    def _running_exporter(self) -> Exporter:
        return _running(self._exporter)

    async def is_waking(self, name: str) -> bool:
        """Whether a resumption of the group began here, and its end was not seen: then it must be resumed again."""
        return await self._running_state().has_record(name, RESUME_RECORD)

    async def known_groups(self) -> list[str]:
        """The groups of which the state directory knows something, open or not."""
        return await self._running_state().groups()

    async def known_volumes(self, name: str) -> dict[str, Geometry]:
        """The volumes of a group that is not open, as the state directory remembers them; empty when it does not."""
        state = await self._open_state(name)
        try:
            identity = await state.read_identity()
        finally:
            await state.aclose()
        return {volume.name: volume.geometry for volume in identity.volumes} if identity is not None else {}

    async def export(
        self, group: HostedGroup, url: str, *, tls: NbdTls | None = None, flush: str = "local"
    ) -> GroupExport:
        """Serve a group over NBD at ``unix:/path`` or ``tcp:host:port``, until the group or the host is closed.

        With ``flush="store"`` a client's flush (or FUA write) returns when a committed generation covers it, and so
        survives the loss of this host; see `silo.flushing`. All exports of a group have the same.

        With ``tls`` (`NbdTls.from_files`) connections are encrypted, and clients may be asked who they are; several
        groups at one address share one. `InvalidRequestError` when the address cannot be had.
        """
        return self._running_exporter().add(
            group.group, url, tls, store_flush(group.group, group.link, flush)
        )

    async def close_group(self, group: HostedGroup, *, drain: bool = True) -> None:
        """Stop serving a group, as `HostedGroup.close`. A migration away is aborted, or waited for when it is too late
        for that; without ``drain`` it is left as it is, to be continued after a restart."""
        if group.move is not None:
            await group.move.leave(wait=drain)
        await group.close(drain=drain)


def _specs(devices: Mapping[str, BlockDevice | VolumeSpec]) -> dict[str, VolumeSpec]:
    return {
        name: device if isinstance(device, VolumeSpec) else VolumeSpec(device)
        for name, device in devices.items()
    }


def _running(part: T | None) -> T:
    if part is None:
        raise ClosedError("the host is not running", hint="use `async with silo.Host(...) as host`")
    return part
