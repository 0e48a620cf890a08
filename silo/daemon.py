"""``silo serve``: a host that does what its configuration says, until it is told to stop.

It opens the groups of the configuration, exports them, listens for other hosts, and answers on the control socket
(`silo.control`), where all other commands come in. SIGTERM and SIGINT end it in order: clients are drained, what
is dirty is stored, maps are made durable. A second signal skips the storing; what is not stored then is on the
local disk and will be stored after the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from silo.abc import BlockDevice
from silo.arriving import Arrival
from silo.config import GroupConfig, ServeConfig
from silo.control import ControlServer, Result
from silo.devices.file import FileDevice
from silo.devices.overlay_open import open_overlay
from silo.errors import FencedError, InvalidRequestError, SiloError, UnavailableError
from silo.events import Phase
from silo.exports.nbd_tls import NbdTls
from silo.files import lock_exclusive, os_error
from silo.hooks.command import CommandWorkload
from silo.host import Host
from silo.hosted import HostedGroup
from silo.importing import check_not_stored, remote_size
from silo.keysource import load_keys
from silo.moving import Move
from silo.names import check_volume_name
from silo.opening import VolumeSpec
from silo.p2p.settings import MigrationPolicy, MigrationSettings
from silo.p2p.tls import HostTls
from silo.p2p.transport import PlainTransport
from silo.resuming import stored_head
from silo.sync.settings import SyncSettings
from silo.sync.store_url import open_store
from silo.tending import StoreVerbs
from silo.threads import run_to_completion

__all__ = ["Say", "serve_until_told"]

logger = logging.getLogger(__name__)

IMPORT_TELL_S = 0.5
"""Between two lines about how far an import is."""

Say = Callable[[dict[str, Any], str], None]
"""Takes an event for machines and the same for people."""


async def serve_until_told(
    config: ServeConfig, say: Say, *, host_is_dead: bool = False, after_lease: bool = False
) -> None:
    """Serve until SIGTERM or SIGINT. `UnavailableError` when not everything could be stored in the end."""
    stop = asyncio.Event()
    task = asyncio.current_task()
    signals = _Signals(stop, task)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.received)
    try:
        peers = HostTls.in_directory(config.tls_dir, check_names=not config.tls_any_name)
        plain = PlainTransport(insecure_tcp=config.insecure_peer)
        migration = MigrationSettings(
            workload_timeout_s=config.migration.workload_timeout_s,
            hot_size=config.migration.hot_bytes,
            connections=config.migration.connections,
        )
        keys = await run_to_completion(
            None, load_keys, config.encryption.key_file, config.encryption.key_command
        )
        tls = await run_to_completion(None, config.nbd.load)
        async with Host(
            config.state,
            listen=config.peer or None,
            tls=peers if config.tls_dir else None,
            transport=None if config.tls_dir else plain,
            migration=migration,
            nbd=config.nbd.settings(),
            keys=keys,
        ) as host:
            daemon = _Daemon(host, config, say, tls)
            await daemon.open_groups(host_is_dead=host_is_dead, after_lease=after_lease)
            async with (
                ControlServer(Path(config.state) / "control.sock", daemon.verbs()),
                _metrics(config, host),
                asyncio.TaskGroup() as tasks,
            ):
                receiving = tasks.create_task(daemon.take_in())
                say({"event": "ready", "groups": sorted(host.groups)}, daemon.greeting())
                await stop.wait()
                receiving.cancel()
                say({"event": "stopping"}, "storing what is not stored yet; once more to skip that")
    except asyncio.CancelledError:
        if not signals.impatient:
            raise
        if task is not None:
            task.uncancel()
    say({"event": "stopped"}, "stopped")


@contextlib.asynccontextmanager
async def _metrics(config: ServeConfig, host: Host) -> AsyncIterator[None]:
    """Serve numbers, if that is wanted."""
    if not config.metrics:
        yield
        return
    from silo.metrics import MetricsServer

    async with MetricsServer(config.metrics, lambda: [hosted.status() for hosted in host.groups.values()]):
        yield


class _Signals:
    """The first signal asks, the second insists."""

    def __init__(self, stop: asyncio.Event, task: asyncio.Task[Any] | None) -> None:
        self.impatient = False
        self._stop = stop
        self._task = task

    def received(self) -> None:
        if self._stop.is_set() and self._task is not None:
            self.impatient = True
            self._task.cancel()
        self._stop.set()


class _Daemon:
    """The verbs of the control socket, on one host."""

    def __init__(self, host: Host, config: ServeConfig, say: Say, tls: NbdTls | None) -> None:
        self._host = host
        self._tls = tls
        self._config = config
        self._say = say

    # ---- opening ------------------------------------------------------------------------------------------

    async def open_groups(self, *, host_is_dead: bool, after_lease: bool) -> None:
        for name in await self._host.known_groups():
            if name not in self._config.groups and not await self._is_asleep(name):
                await self._reopen_arrived(name)
        for name, settings in self._config.groups.items():
            if await self._is_asleep(name):
                continue
            hosted = await self._host.open_group(
                name,
                await _specs(name, settings),
                store=self._config.store or None,
                sync=self._sync_settings(),
                workload=self._workload(settings),
                host_is_dead=host_is_dead,
                after_lease=after_lease,
            )
            await self.export(hosted)

    async def _is_asleep(self, name: str) -> bool:
        """A hibernated group is not opened by a start, because it may be about to wake somewhere else; but a
        resumption that was begun here is brought to its end."""
        if await self._host.is_waking(name):
            try:
                await self._resume(name, host_is_dead=False)
            except SiloError as error:  # whatever became of it, the other groups are to be served
                logger.error("group %s was not woken: %s", name, error)
            return True
        if not self._config.store:
            return False
        try:
            head = await stored_head(self._config.store, name, self._host.clock)
        except UnavailableError:
            return False  # whoever opens it has more patience, or says it better
        if head is None or not head.is_hibernated:
            return False
        logger.warning("group %s is hibernated, and not opened: `silo resume %s` wakes it", name, name)
        return True

    async def _resume(self, name: str, *, host_is_dead: bool) -> HostedGroup:
        if not self._config.store:
            raise InvalidRequestError("this daemon has no store in which a group could be hibernated")
        if name in self._host.groups:
            raise InvalidRequestError(f"group {name} is open here already")
        head = await stored_head(self._config.store, name, self._host.clock)
        if head is None:
            raise InvalidRequestError(f"the store has no group {name}")
        settings, urls = self._config.groups.get(name), self._config.listen_urls(name)
        if settings is not None:
            devices: Mapping[str, BlockDevice | VolumeSpec] = await _specs(name, settings)
        else:
            devices = await self._fresh_devices(name, {volume.name: volume.size for volume in head.volumes})
        hosted = await self._host.resume_group(
            name,
            devices,
            store=self._config.store,
            sync=self._sync_settings(),
            workload=self._workload(settings),
            host_is_dead=host_is_dead,
            export=urls[0] if urls else None,
            tls=self._tls_at(urls[0]) if urls else None,
        )
        for url in urls[1:]:
            await self._host.export(hosted, url, tls=self._tls_at(url))
        return hosted

    async def _reopen_arrived(self, name: str) -> None:
        """A group that arrived here earlier, and is in no configuration: its disks are where arrivals are put."""
        shapes = await self._host.known_volumes(name)
        paths = {volume: self._incoming(name, volume) for volume in shapes}
        if missing := [str(path) for path in paths.values() if not path.exists()]:
            logger.warning("group %s is not opened: %s is not there", name, ", ".join(missing))
        if missing or not shapes:
            return
        try:
            hosted = await self._host.open_group(
                name,
                {volume: FileDevice(path, shapes[volume].size) for volume, path in paths.items()},
                store=self._config.store or None,
                sync=self._sync_settings(),
                workload=self._workload(None),
            )
        except FencedError as error:
            logger.warning("group %s is not opened: %s", name, error)
            return
        await self.export(hosted)

    def _incoming(self, group: str, volume: str) -> Path:
        base = Path(self._config.incoming.directory or Path(self._config.state) / "incoming")
        return base / group / f"{volume}.img"

    async def take_in(self) -> None:
        """Accept the groups that other hosts bring, until cancelled."""
        async for offer in self._host.offers():
            try:
                await self._accept(offer)
            except SiloError as error:
                logger.warning("group %s from %s was refused: %s", offer.group, offer.peer, error)

    async def _accept(self, offer: Arrival) -> None:
        if not self._config.incoming.accept:
            offer.refuse("this host accepts no groups")
            return
        try:
            devices = await self._devices_for(offer)
        except SiloError as error:
            offer.refuse(f"no room for its disks: {error.message}")
            raise
        urls = self._config.listen_urls(offer.group)
        hosted = await offer.accept(
            devices,
            store=self._config.store or None,
            sync=self._sync_settings(),
            workload=self._workload(self._config.groups.get(offer.group)),
            export=urls[0] if urls else None,
            tls=self._tls_at(urls[0]) if urls else None,
            flush=self._config.flush_of(offer.group),
        )
        for url in urls[1:]:
            await self._export_at(hosted, url)
        text = f"{offer.group} is arriving from {offer.peer}"
        self._say({"event": "arriving", "group": offer.group, "peer": offer.peer}, text)

    async def _devices_for(self, offer: Arrival) -> Mapping[str, BlockDevice | VolumeSpec]:
        """The disks that the configuration has for the group, because the next start will look for it there; else new
        ones among the arrivals."""
        if (settings := self._config.groups.get(offer.group)) is not None:
            return await _specs(offer.group, settings)
        sizes = {name: geometry.size for name, geometry in offer.volumes.items()}
        return await self._fresh_devices(offer.group, sizes)

    async def _fresh_devices(self, group: str, sizes: Mapping[str, int]) -> Mapping[str, BlockDevice]:
        """Disks among the arrivals; all or none are open afterwards."""
        known = await self._host.known_volumes(group)
        devices: dict[str, BlockDevice] = {}
        try:
            for name, size in sizes.items():
                devices[name] = _fresh_device(self._incoming(group, name), size, may_replace=not known)
        except BaseException:
            for device in devices.values():
                await device.aclose()
            raise
        return devices

    async def export(self, hosted: HostedGroup) -> None:
        for url in self._config.listen_urls(hosted.name):
            await self._export_at(hosted, url)

    async def _export_at(self, hosted: HostedGroup, url: str) -> None:
        await self._host.export(hosted, url, tls=self._tls_at(url), flush=self._config.flush_of(hosted.name))

    def _tls_at(self, url: str) -> NbdTls | None:
        """A Unix socket is protected by its file's permissions."""
        return self._tls if url.startswith("tcp:") else None

    def _sync_settings(self) -> SyncSettings:
        return self._config.sync_settings

    def _workload(self, settings: GroupConfig | None) -> CommandWorkload | None:
        chosen = settings.workload if settings is not None and settings.workload else self._config.workload
        return CommandWorkload(chosen.commands, self._host.clock) if chosen.commands else None

    def greeting(self) -> str:
        lines = [
            f"{hosted.name}/{volume['name']}: {uri}"
            for hosted in self._host.groups.values()
            for volume in hosted.status()["volumes"]
            for uri in volume["uris"] or ["not exported (no --listen)"]
        ]
        if self._config.peer:
            lines.append(f"other hosts may bring groups to {self._config.peer}")
        return "\n".join(lines) or "no group and no --peer: there is nothing to do but to wait for a signal"

    # ---- verbs --------------------------------------------------------------------------------------------

    def verbs(self) -> dict[str, Callable[..., AsyncIterator[Any]]]:
        return {
            "status": self.status,
            "heat": self.heat,
            "sync": self.sync,
            "wait": self.wait,
            "migrate": self.migrate,
            "switch": self.switch,
            "hibernate": self.hibernate,
            "resume": self.resume,
            "import": self.import_disk,
            **StoreVerbs(self._group, self._host.clock, self._config.prices).verbs(),
        }

    def _group(self, name: str) -> HostedGroup:
        if (hosted := self._host.groups.get(name)) is None:
            known = ", ".join(sorted(self._host.groups)) or "none"
            raise InvalidRequestError(f"there is no group {name!r} here", hint=f"known groups: {known}")
        return hosted

    async def status(self) -> AsyncIterator[Any]:
        groups = [hosted.status() for hosted in self._host.groups.values()]
        yield Result({"groups": groups, "peer": self._config.peer})

    async def heat(self, group: str, cells: int = 3072) -> AsyncIterator[Any]:
        if not 1 <= cells <= 1 << 16:
            raise InvalidRequestError(f"{cells} cells cannot be drawn", hint="take up to 65536")
        yield Result({"volumes": self._group(group).heat(cells)})

    async def sync(self, group: str) -> AsyncIterator[Any]:
        yield Result({"generation": await self._group(group).sync_now()})

    async def migrate(
        self,
        group: str,
        to: str,
        deadline_s: float | None = None,
        durable: bool = False,
        evacuate: bool = True,
        throttle: bool = True,
        follow: bool = False,
    ) -> AsyncIterator[Any]:
        """Every event, then the report. A caller that leaves aborts it while the guest was not stopped."""
        policy = MigrationPolicy(
            durable_before_switch=durable, evacuate=evacuate, throttle=throttle, follow=follow
        )
        move = self._group(group).migrate(to, deadline=self._deadline(deadline_s), policy=policy)
        async for line in _follow(move):
            yield line

    async def switch(self, group: str, deadline_s: float | None = None) -> AsyncIterator[Any]:
        """Let the target that follows a group take over, and wait for the end of that."""
        move = self._group(group).move
        if move is None or move.phase is not Phase.FOLLOWING:
            raise InvalidRequestError(
                f"no host follows group {group}", hint="silo migrate --follow starts one"
            )
        move.switch(deadline=self._deadline(deadline_s))
        yield Result((await move.wait_released()).as_dict())

    async def hibernate(
        self, group: str, deadline_s: float | None = None, throttle: bool = True
    ) -> AsyncIterator[Any]:
        """As `migrate`, to the store."""
        policy = MigrationPolicy(throttle=throttle)
        move = self._group(group).hibernate(deadline=self._deadline(deadline_s), policy=policy)
        async for line in _follow(move):
            yield line

    def _deadline(self, left_s: float | None) -> float | None:
        return None if left_s is None else self._host.clock.monotonic() + left_s

    async def resume(self, group: str, host_is_dead: bool = False) -> AsyncIterator[Any]:
        """Wake a group that is hibernated in our store."""
        hosted = await self._resume(group, host_is_dead=host_is_dead)
        volumes = hosted.status()["volumes"]
        yield Result({"group": group, "uris": [uri for volume in volumes for uri in volume["uris"]]})

    async def import_disk(self, group: str, volume: str, uri: str) -> AsyncIterator[Any]:
        """Open a new group on a disk of an NBD server: where it can be reached, then how far it is. It goes on when the
        caller leaves, and after the next start."""
        if group in self._config.groups or await self._host.known_volumes(group):
            raise InvalidRequestError(f"this host has a group {group} already", hint="take another name")
        check_volume_name(volume)
        size = await remote_size(uri)
        if self._config.store:
            store = open_store(self._config.store, self._host.clock)
            try:
                await check_not_stored(store, group, self._host.clock)
            finally:
                await store.aclose()
        device = _fresh_device(self._incoming(group, volume), size, may_replace=True)
        hosted = await self._host.open_group(
            group,
            {volume: VolumeSpec(device, import_from=uri)},
            store=self._config.store or None,
            sync=self._sync_settings(),
            workload=self._workload(None),
        )
        await self.export(hosted)
        yield {
            "event": "serving",
            "group": group,
            "uris": hosted.status()["volumes"][0]["uris"],
            "size": size,
        }
        work = hosted.importing
        while work is not None and (status := work.status()) is not None:
            (seen,) = hosted.status()["volumes"]
            yield {"event": "importing", "left_bytes": seen["absent_peer"], **status}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IMPORT_TELL_S):
                    await work.wait_done()
        yield Result({"group": group, "size": size})

    async def wait(self, group: str, timeout_s: float) -> AsyncIterator[Any]:
        """Until the group is hydrated, or for so long."""
        hosted = self._group(group)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(float(timeout_s), 3600.0)):
                await hosted.wait_hydrated()
        yield Result({"hydrated": hosted.is_hydrated})


async def _follow(move: Move) -> AsyncIterator[Any]:
    async with move:
        async for event in move.events():
            yield event.as_dict()
        report = await move.wait_released()
    yield Result(report.as_dict())


def _is_new(path: str) -> bool:
    return not Path(path).exists()


async def _spec(group: str, name: str, settings: GroupConfig) -> VolumeSpec:
    volume = settings.volumes[name]
    size = volume.size_bytes
    try:
        if volume.import_from and size is None and _is_new(volume.path):
            size = await remote_size(volume.import_from)
        if volume.bases:
            device: BlockDevice = await open_overlay(volume.path, *volume.bases, size=size)
        else:
            device = FileDevice(volume.path, size)
    except SiloError as error:
        raise type(error)(f"{group}/{name}: {error.message}", hint=error.hint) from error
    return VolumeSpec(
        device, volume.chunk_bytes, volume.read_only, volume.overwrite, import_from=volume.import_from
    )


async def _specs(group: str, settings: GroupConfig) -> dict[str, VolumeSpec]:
    """The devices of a group; all or none are open afterwards."""
    specs: dict[str, VolumeSpec] = {}
    try:
        for name in settings.volumes:
            specs[name] = await _spec(group, name, settings)
    except BaseException:
        for spec in specs.values():
            await spec.device.aclose()
        raise
    return specs


def _fresh_device(path: Path, size: int, *, may_replace: bool) -> FileDevice:
    """The disk of a group that arrives. What an earlier stay left there gives way. One of another size is replaced if
    nothing is known any more of what is on it, and nobody uses it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if may_replace and path.exists() and path.stat().st_size not in (0, size):
            with path.open("rb") as left:
                lock_exclusive(left.fileno(), str(path))
                path.unlink()
    except OSError as error:
        raise os_error(error, f"make {path}") from error
    return FileDevice(path, size)
