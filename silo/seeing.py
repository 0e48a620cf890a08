"""What can be seen of a group from outside, as plain values: for ``silo status`` and ``silo heat``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from silo.chunkmap import RESIDENCY_MASK, SYNC_DIRTY, SYNC_IN_CUT, Residency
from silo.errors import FencedError
from silo.events import Phase
from silo.exporting import Exporter
from silo.group import Group
from silo.hydrator import Hydrator
from silo.storelink import StoreLink
from silo.sync.status import SyncStatus
from silo.volume import Volume

__all__ = ["group_status", "heat_of"]


ABSENT = (Residency.ABSENT_STORE, Residency.ABSENT_PEER)


def group_status(
    group: Group,
    phase: str,
    moving: Phase | None,
    link: StoreLink | None,
    hydrator: Hydrator,
    exporter: Exporter,
) -> dict[str, Any]:
    """Everything that can be seen of a group; sizes in bytes. Reads every map once."""
    sync = link.status if link is not None else None
    return {
        "name": group.name,
        "state": _seen_phase(group, phase),
        "epoch": sync.epoch if sync else None,
        "hydrated": not group.absent_counts(ABSENT),
        "hydration_error": hydrator.error,
        "exposed_bytes": group.exposed_bytes,
        "migration": moving.value if moving else None,
        "bytes_store": link.fetched_bytes if link else 0,
        "store_requests": dict(link.store.requests) if link else {},
        "guest_limit_bps": group.throttle.rate_bps,
        "volumes": [_volume_status(v, exporter.uris(group.name, v.name)) for v in group.volumes.values()],
        "collector": link.tidying if link is not None else None,
        "sync": sync and _sync_status(sync),
    }


def _volume_status(volume: Volume, uris: Sequence[str]) -> dict[str, Any]:
    """Sizes in bytes. Reads the map once."""
    counts = volume.chunks.count_residency()
    chunk_size = volume.geometry.chunk_size
    return {
        "name": volume.name,
        "size": volume.geometry.size,
        "chunk_size": chunk_size,
        "read_only": volume.read_only,
        "present": counts[Residency.PRESENT] * chunk_size,
        "zero": (counts[Residency.ZERO] + counts[Residency.ZERO_UNPUNCHED]) * chunk_size,
        "absent_store": counts[Residency.ABSENT_STORE] * chunk_size,
        "absent_peer": counts[Residency.ABSENT_PEER] * chunk_size,
        "dirty": volume.chunks.count_dirty(SYNC_DIRTY | SYNC_IN_CUT) * chunk_size,
        "uris": uris,
    }


def heat_of(volume: Volume, cells: int) -> dict[str, Any]:
    """The heat in at most ``cells`` runs of chunks, relative to the hottest of them."""
    count = volume.chunks.count
    per_cell = -(-count // max(1, cells))
    starts = np.arange(0, count, per_cell)
    reads = np.add.reduceat(volume.heat.read_heat(), starts)
    writes = np.add.reduceat(volume.heat.write_heat(), starts)
    commonest = [
        Residency(
            int(np.bincount(volume.chunks.view[start : start + per_cell] & RESIDENCY_MASK).argmax())
        ).name
        for start in starts.tolist()
    ]
    return {
        "name": volume.name,
        "chunk_size": volume.geometry.chunk_size,
        "chunks_per_cell": per_cell,
        "reads": (reads / max(float(reads.max()), 1e-9)).round(4).tolist(),
        "writes": (writes / max(float(writes.max()), 1e-9)).round(4).tolist(),
        "residency": commonest,
    }


def _sync_status(sync: SyncStatus) -> dict[str, Any]:
    """How the store is kept up to date."""
    return {
        "phase": sync.phase.value,
        "generation": sync.generation,
        "cut_time": sync.cut_time,
        "rpo_s": sync.rpo_s if sync.generation else None,
        "holds": list(sync.holds),
        "last_error": sync.error,
        "attempts": sync.attempts,
        "failing_s": sync.failing_s,
        "alarms": list(sync.alarms),
        "target_s": sync.target_s,
        "backlog_bytes": sync.backlog_bytes,
        "rate_bps": sync.rate_bps,
        "window": sync.window,
        "elided_chunks": sync.elided_chunks,
        "cuts": sync.cuts,
        "abandoned_cuts": sync.abandoned_cuts,
        "sent_bytes": sync.sent_bytes,
        "sent_objects": sync.sent_objects,
    }


def _seen_phase(group: Group, phase: str) -> str:
    """What the group is doing, or what keeps its guest from its disks meanwhile."""
    gate = group.gate
    if isinstance(gate.error, FencedError):
        return "fenced"
    return phase if gate.is_open or gate.is_closed or gate.error else "waiting for its lease"
