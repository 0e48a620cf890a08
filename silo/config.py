"""What ``silo serve`` is told: a TOML file, flags, or both, ending in one `ServeConfig`.

The file and the flags say the same things under the same names. A flag beats the file; a ``--volume`` or
``--listen`` replaces what the file has for that group. Everything is checked before anything is opened, and
an error names the key, what was found and what would have been right::

    state = "/var/lib/silo"
    store = "file:///var/lib/silo-store"      # or s3://bucket/prefix?endpoint=...
    peer = "tcp:0.0.0.0:5170"                 # where other hosts may bring groups
    tls_dir = "/etc/silo/tls"                 # this host's certificate, as `silo certs issue` makes it
    listen = "unix:/run/silo/{group}.sock"    # for groups that arrive, or that say nothing else

    [sync]
    interval = "5s"
    bandwidth = "200Mbit"
    lease = "30s"                             # let another host take over by itself; see docs/operations.md

    [encryption]
    key_file = "/etc/silo/keys"               # what new groups store is encrypted with the first of them

    [incoming]
    directory = "/srv/silo"                   # where the disks of arriving groups are put

    [nbd]                                     # see silo.nbdconfig
    certificate = "/etc/silo/server-cert.pem"
    key = "/etc/silo/server-key.pem"

    [groups.vm1]
    listen = ["unix:/run/silo/vm1.sock"]

    [groups.vm1.volumes.disk]
    path = "disk.img"
    size = "8G"

    [workload]
    suspend = "virsh suspend $SILO_GROUP"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from silo.errors import InvalidRequestError
from silo.exports.nbd_uri import parse_uri
from silo.names import check_group_name, check_volume_name
from silo.nbdconfig import NbdConfig
from silo.p2p.settings import CONNECTIONS_MAX
from silo.settings import parse_duration, parse_rate, parse_size
from silo.sync.cost import PriceTable
from silo.sync.lease import check_lease
from silo.sync.retention import RetentionPolicy
from silo.sync.settings import CollectorSettings, SyncSettings

__all__ = [
    "CollectorConfig",
    "GroupConfig",
    "IncomingConfig",
    "MigrationConfig",
    "PointsConfig",
    "ServeConfig",
    "SyncConfig",
    "VolumeConfig",
    "WorkloadConfig",
    "load_config",
    "load_prices",
    "merge_flags",
    "parse_volume_flag",
]


class VolumeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One disk: a path, and a size when it may have to be created."""

    path: str
    size: str | int | None = None
    chunk_size: str | int | None = None
    """``None``: as before, 64 KiB for a new volume."""
    read_only: bool = False
    overwrite: bool = False
    """The device may hold something else, which gives way to what the store has."""
    base: str | list[str] = []
    """Copy-on-write over this image; of several, the nearest first (`silo.devices.overlay_open`)."""
    import_from: str = msgspec.field(default="", name="import")
    """A new volume begins with what this NBD server has, and is served at once (`silo.importing`)."""

    @property
    def bases(self) -> list[str]:
        """The images below an overlay, the nearest first; none for a plain disk."""
        return [self.base] if isinstance(self.base, str) else self.base

    @property
    def size_bytes(self) -> int | None:
        """The size in bytes, or ``None`` to take what the file has."""
        return None if self.size is None else parse_size(self.size)

    @property
    def chunk_bytes(self) -> int | None:
        """The chunk size in bytes, if it was given."""
        return None if self.chunk_size is None else parse_size(self.chunk_size)


class WorkloadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shell commands for the steps of a migration, see ``docs/vm-managers.md``."""

    prepare: str = ""
    quiesce: str = ""
    suspend: str = ""
    flush: str = ""
    capture: str = ""
    resume: str = ""
    unquiesce: str = ""
    unsuspend: str = ""
    fence: str = ""
    probe: str = ""

    @property
    def commands(self) -> dict[str, str]:
        """The steps that have a command."""
        return {name: command for name in self.__struct_fields__ if (command := getattr(self, name))}


Flush = Literal["local", "store"]


class GroupConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One group that this host opens at start."""

    volumes: dict[str, VolumeConfig]
    listen: list[str] = []
    flush: Flush | None = None
    """``None``: as for all groups."""
    workload: WorkloadConfig | None = None


class SyncConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the store is kept up to date."""

    interval: str | float = "5s"
    bandwidth: str | float | None = None
    throttle: bool = False
    """Slow guests down rather than let the recovery point slip."""
    lease: str | float | None = None

    @property
    def interval_s(self) -> float:
        """Seconds between two cuts."""
        return parse_duration(self.interval)

    @property
    def lease_s(self) -> float | None:
        """Seconds that a group is served without a sign of the store that it is ours; ``None`` is no limit."""
        return None if self.lease is None else check_lease(parse_duration(self.lease))

    @property
    def bandwidth_bps(self) -> float | None:
        """Bytes per second that uploads may use; ``None`` is no limit."""
        return None if self.bandwidth is None else parse_rate(self.bandwidth)


class CollectorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How what is not needed any more is deleted from the store."""

    enabled: bool = True
    interval: str | float = "10m"
    """Between two passes, when anything was committed."""
    grace: str | float = "5m"
    """How long an object that nothing needs is left alone."""

    @property
    def settings(self) -> CollectorSettings:
        """As the library takes it."""
        interval_s = parse_duration(self.interval)
        return CollectorSettings(
            is_on=self.enabled,
            interval_s=interval_s,
            grace_s=parse_duration(self.grace),
            pause_s=min(10.0, interval_s),
        )


class PointsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which restore points are made by themselves, and which of them are kept."""

    every: str | float = 0
    """Time between two; 0: none."""
    last: int = 0
    hourly: int = 24
    daily: int = 7

    @property
    def policy(self) -> RetentionPolicy:
        """As the library takes it."""
        return RetentionPolicy(
            every_s=parse_duration(self.every), last=self.last, hourly=self.hourly, daily=self.daily
        )


class MigrationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How groups move, to here and away."""

    workload_timeout: str | float = "30s"
    """For each hook of a workload."""
    connections: int = 1
    """Over so many connections content is pushed to another host; demands have one more. More help where a network
    gives each only a part of its capacity."""
    hot: str | int = "512M"
    """Most of what the store has, too, and is pushed all the same because the guest reads it a lot."""

    @property
    def hot_bytes(self) -> int:
        """The same in bytes."""
        return parse_size(self.hot)

    @property
    def workload_timeout_s(self) -> float:
        """The same in seconds."""
        return parse_duration(self.workload_timeout)


class EncryptionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the master keys of encrypted groups are; never the keys themselves. See `silo.keysource`."""

    key_file: str = ""
    key_command: str = ""


class IncomingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is done with groups that arrive. Nothing a peer sends chooses a path; this does."""

    accept: bool = True
    directory: str = ""


class ServeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that ``silo serve`` needs to know."""

    state: str = "/var/lib/silo"
    store: str = ""
    listen: str = ""
    flush: Flush = "local"
    """What a guest's flush makes durable: the local disk, or the store, too."""
    peer: str = ""
    tls_dir: str = ""
    """Where ``host.crt``, ``host.key`` and ``ca.crt`` are; with it hosts talk over mutual TLS."""
    tls_any_name: bool = False
    """A certificate of the fleet is enough; it need not name the host that was dialled."""
    insecure_peer: bool = False
    """Plain TCP between hosts, in a network that is trusted."""
    metrics: str = ""
    """Where Prometheus finds numbers: ``tcp:127.0.0.1:9090``."""
    sync: SyncConfig = SyncConfig()
    migration: MigrationConfig = MigrationConfig()
    encryption: EncryptionConfig = EncryptionConfig()
    collector: CollectorConfig = CollectorConfig()
    points: PointsConfig = PointsConfig()
    prices: PriceTable = PriceTable()
    incoming: IncomingConfig = IncomingConfig()
    nbd: NbdConfig = NbdConfig()
    groups: dict[str, GroupConfig] = {}
    workload: WorkloadConfig = WorkloadConfig()

    def flush_of(self, group: str) -> Flush:
        """What a flush of a group's guest makes durable."""
        own = self.groups[group].flush if group in self.groups else None
        return own or self.flush

    @property
    def sync_settings(self) -> SyncSettings:
        """As the library takes them."""
        return SyncSettings(
            rpo_s=self.sync.interval_s,
            rate_bps=self.sync.bandwidth_bps,
            throttle=self.sync.throttle,
            lease_s=self.sync.lease_s,
            collector=self.collector.settings,
            points=self.points.policy,
        )

    def listen_urls(self, group: str) -> list[str]:
        """Where a group is exported: its own addresses, else the common pattern."""
        own = self.groups[group].listen if group in self.groups else []
        urls = own or ([self.listen] if self.listen else [])
        return [url.replace("{group}", group) for url in urls]


def load_config(path: Path) -> ServeConfig:
    """Read and check a TOML file. `InvalidRequestError` names the file, the key and the trouble."""
    return check_config(_convert(_read_toml(path), str(path)), str(path))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} is not valid TOML: {error}") from error


def load_prices(path: Path) -> PriceTable:
    """A table of prices in a TOML file of its own. `InvalidRequestError` as `load_config`."""
    data = _read_toml(path)
    try:
        return msgspec.convert(data, PriceTable)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"{path}: {error}") from error


def _convert(data: Mapping[str, Any], origin: str) -> ServeConfig:
    try:
        return msgspec.convert(data, ServeConfig)
    except msgspec.ValidationError as error:
        text = str(error).replace("Object contains unknown field", "there is no setting").replace("`$.", "`")
        raise InvalidRequestError(
            f"{origin}: {text}", hint="see `silo serve --help` and docs/operations.md"
        ) from error


def _convert_nbd(values: Mapping[str, Any]) -> NbdConfig:
    try:
        return msgspec.convert(values, NbdConfig)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"flags: nbd: {error}", hint="see `silo serve --help`") from error


def check_config(config: ServeConfig, origin: str) -> ServeConfig:
    """Check every number, name and address. Returns the config."""
    where = origin
    try:
        where = f"{origin}: sync"
        if config.sync.interval_s <= 0:
            raise InvalidRequestError("the interval must be positive")
        _ = config.sync.lease_s  # raises
        if config.sync.bandwidth_bps is not None and config.sync.bandwidth_bps <= 0:
            raise InvalidRequestError("the bandwidth must be positive")
        where = f"{origin}: migration"
        if config.migration.workload_timeout_s <= 0:
            raise InvalidRequestError("the timeout of hooks must be positive")
        if config.migration.hot_bytes < 0:
            raise InvalidRequestError("the limit of hot chunks cannot be negative", hint='"0" pushes none')
        if not 1 <= config.migration.connections <= CONNECTIONS_MAX:
            raise InvalidRequestError(f"content is pushed over 1 to {CONNECTIONS_MAX} connections")
        where = f"{origin}: nbd"
        config.nbd.check()
        where = f"{origin}: collector"
        _ = config.collector.settings
        where = f"{origin}: points"
        _ = config.points.policy
        for url in (config.listen, config.peer, config.metrics):
            where = f"{origin}: address {url!r}"
            _check_address(url)
        for name, group in config.groups.items():
            where = f"{origin}: groups.{name}"
            _check_group(name, group)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}: {error.message}", hint=error.hint) from error
    if config.flush not in ("local", "store"):
        raise InvalidRequestError(f"{origin}: flush {config.flush!r} is not known", hint="say local or store")
    if not config.store and any(config.flush_of(group) == "store" for group in ("", *config.groups)):
        raise InvalidRequestError(
            f"{origin}: flush = 'store' needs a store", hint="say where it is: store = ..."
        )
    if config.insecure_peer and config.tls_dir:
        raise InvalidRequestError(
            f"{origin}: hosts talk either over TLS or over plain TCP",
            hint="leave out tls_dir or insecure_peer",
        )
    if config.peer.startswith("tcp:") and not (config.insecure_peer or config.tls_dir):
        raise InvalidRequestError(
            f"{origin}: peer {config.peer} would be plain TCP",
            hint="name this host's certificate with tls_dir (--tls-dir; `silo certs` makes it), say "
            "insecure_peer = true (--insecure-peer) if you trust the network, or use a Unix socket",
        )
    return config


def _check_group(name: str, group: GroupConfig) -> None:
    check_group_name(name)
    if not group.volumes:
        raise InvalidRequestError("a group needs at least one volume")
    for url in group.listen:
        _check_address(url)
    for volume, settings in group.volumes.items():
        check_volume_name(volume)
        if not settings.path:
            raise InvalidRequestError(f"volume {volume} needs a path")
        chunk = settings.chunk_bytes
        if chunk is not None and (chunk & (chunk - 1) or not 4096 <= chunk <= 4 << 20):
            raise InvalidRequestError(
                f"volume {volume}: chunk size {settings.chunk_size} is not usable",
                hint="take a power of two from 4K to 4M",
            )
        if settings.import_from:
            parse_uri(settings.import_from)
            if settings.bases:
                raise InvalidRequestError(
                    f"volume {volume}: it can be imported, or lie over a base, not both"
                )
        if settings.size_bytes is not None and settings.size_bytes <= 0:
            raise InvalidRequestError(f"volume {volume}: the size must be positive")


def _check_address(url: str) -> None:
    if not url:
        return
    scheme, _, rest = url.partition(":")
    if scheme == "unix" and rest:
        return
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdigit() and int(port) < 65536:
        return
    raise InvalidRequestError(f"{url!r} is not an address", hint="write tcp:HOST:PORT or unix:/path")


def parse_volume_flag(text: str) -> tuple[str, VolumeConfig]:
    """``disk=disk.img,size=8G,chunk_size=64K,read_only=true`` as a name and its settings."""
    name, equals, rest = text.partition("=")
    path, *options = rest.split(",")
    if not equals or not name or not path:
        raise InvalidRequestError(
            f"--volume {text!r} is not understood", hint="write NAME=PATH, perhaps with ,size=8G"
        )
    values: dict[str, Any] = {"path": path}
    for option in options:
        key, _, value = option.partition("=")
        if key == "base":
            values.setdefault("base", []).append(value)
        else:
            values[key] = {"true": True, "false": False}.get(value, value)
    try:
        return name, msgspec.convert(values, VolumeConfig)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(
            f"--volume {text!r}: {error}", hint="size, chunk_size, read_only, overwrite, base, import"
        ) from error


def merge_flags(
    config: ServeConfig,
    *,
    group: str | None = None,
    volumes: Sequence[str] = (),
    listen: Sequence[str] = (),
    sync_interval: str | None = None,
    lease: str | None = None,
    key_file: str = "",
    key_command: str = "",
    incoming: str | None = None,
    nbd: Mapping[str, str | None] | None = None,
    **flags: str | bool | None,
) -> ServeConfig:
    """The config with the flags that were given put over it, checked again."""
    changes: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    syncing = {"interval": sync_interval, "lease": lease}
    if given := {key: value for key, value in syncing.items() if value is not None}:
        changes["sync"] = msgspec.structs.replace(config.sync, **given)
    if key_file or key_command:
        changes["encryption"] = EncryptionConfig(key_file=key_file, key_command=key_command)
    if incoming is not None:
        changes["incoming"] = msgspec.structs.replace(config.incoming, directory=incoming)
    if given := {key: value for key, value in (nbd or {}).items() if value is not None}:
        changes["nbd"] = _convert_nbd({**msgspec.structs.asdict(config.nbd), **given})
    if volumes and group is None:
        raise InvalidRequestError("--volume needs --group", hint="name the group that the volume belongs to")
    if group is not None:
        old = config.groups.get(group)
        parsed = dict(parse_volume_flag(text) for text in volumes) or (old.volumes if old else {})
        changes["groups"] = {
            **config.groups,
            group: GroupConfig(
                volumes=parsed,
                listen=list(listen) or (old.listen if old else []),
                flush=old.flush if old else None,
                workload=old.workload if old else None,
            ),
        }
    elif listen:
        changes["listen"] = listen[0]
    return check_config(msgspec.structs.replace(config, **changes), "flags")
