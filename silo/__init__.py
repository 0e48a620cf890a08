"""Silo: disks that survive the sudden death of their host, and machines that move before it.

What is listed in ``__all__`` is the public interface; everything else may change without notice. Names are
loaded when they are first used, so that ``import silo`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from silo.abc import (
        BlockDevice,
        Capabilities,
        ChunkSource,
        Clock,
        Health,
        ObjectStore,
        Role,
        Step,
        Transport,
        Workload,
    )
    from silo.devices.file import FileDevice
    from silo.devices.memory import MemoryDevice
    from silo.devices.overlay_open import open_overlay
    from silo.errors import (
        CapacityError,
        ClosedError,
        CorruptionError,
        FencedError,
        HandoverInDoubt,
        InvalidRequestError,
        InvariantError,
        LocalProtocolError,
        MigrationAborted,
        MigrationError,
        ProtocolError,
        RemoteProtocolError,
        SiloError,
        UnavailableError,
    )
    from silo.events import MigrationEvent, MigrationReport, Phase
    from silo.exports.nbd_server import NbdServerSettings
    from silo.exports.nbd_tls import NbdTls
    from silo.geometry import Geometry
    from silo.group import Group
    from silo.host import Host
    from silo.hosted import HostedGroup
    from silo.moving import Move
    from silo.opening import VolumeSpec
    from silo.p2p.settings import MigrationPolicy
    from silo.p2p.tls import HostTls
    from silo.p2p.transport import PlainTransport
    from silo.sync.settings import SyncSettings
    from silo.volume import Volume

__version__ = "0.1.0"

_HOMES = {
    "silo.abc": (
        "BlockDevice", "Capabilities", "ChunkSource", "Clock", "Health", "ObjectStore", "Role", "Step",
        "Transport", "Workload",
    ),
    "silo.devices.file": ("FileDevice",),
    "silo.devices.memory": ("MemoryDevice",),
    "silo.devices.overlay_open": ("open_overlay",),
    "silo.errors": (
        "CapacityError", "ClosedError", "CorruptionError", "FencedError", "HandoverInDoubt",
        "InvalidRequestError", "InvariantError", "LocalProtocolError", "MigrationAborted", "MigrationError",
        "ProtocolError", "RemoteProtocolError", "SiloError", "UnavailableError",
    ),
    "silo.events": ("MigrationEvent", "MigrationReport", "Phase"),
    "silo.exports.nbd_server": ("NbdServerSettings",),
    "silo.exports.nbd_tls": ("NbdTls",),
    "silo.geometry": ("Geometry",),
    "silo.group": ("Group",),
    "silo.host": ("Host",),
    "silo.hosted": ("HostedGroup",),
    "silo.moving": ("Move",),
    "silo.opening": ("VolumeSpec",),
    "silo.p2p.settings": ("MigrationPolicy",),
    "silo.p2p.tls": ("HostTls",),
    "silo.p2p.transport": ("PlainTransport",),
    "silo.sync.settings": ("SyncSettings",),
    "silo.volume": ("Volume",),
}  # fmt: skip

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BlockDevice",
    "Capabilities",
    "CapacityError",
    "ChunkSource",
    "Clock",
    "ClosedError",
    "CorruptionError",
    "FencedError",
    "FileDevice",
    "Geometry",
    "Group",
    "HandoverInDoubt",
    "Health",
    "Host",
    "HostTls",
    "HostedGroup",
    "InvalidRequestError",
    "InvariantError",
    "LocalProtocolError",
    "MemoryDevice",
    "MigrationAborted",
    "MigrationError",
    "MigrationEvent",
    "MigrationPolicy",
    "MigrationReport",
    "Move",
    "NbdServerSettings",
    "NbdTls",
    "ObjectStore",
    "Phase",
    "PlainTransport",
    "ProtocolError",
    "RemoteProtocolError",
    "Role",
    "SiloError",
    "Step",
    "SyncSettings",
    "Transport",
    "UnavailableError",
    "Volume",
    "VolumeSpec",
    "Workload",
    "__version__",
    "open_overlay",
]


def __getattr__(name: str) -> Any:
    if (home := _HOME_OF.get(name)) is None:
        raise AttributeError(f"module 'silo' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
