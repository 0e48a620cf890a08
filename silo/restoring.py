"""Restoring one volume into a file, from the store alone: what ``silo restore`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from silo.clock import SystemClock
from silo.devices.file import FileDevice
from silo.errors import InvalidRequestError
from silo.sync.cipher import KeyRing
from silo.sync.head import Head
from silo.sync.manifest import Manifest
from silo.sync.pins import Keeper
from silo.sync.reader import StoreReader
from silo.sync.restore import Progress
from silo.sync.restore import restore_volume as restore_onto
from silo.sync.store_url import open_store
from silo.threads import run_to_completion

__all__ = ["restore_volume"]


async def restore_volume(
    store: str,
    group: str,
    volume: str,
    to: Path,
    progress: Progress,
    keys: KeyRing | None = None,
    *,
    generation: int | None = None,
    at: float | None = None,
) -> dict[str, Any]:
    """Write a volume to a new file or a block device, verified and flushed: of the newest generation, or of a kept one
    by its number or the last before an instant (POSIX seconds).

    Returns generation, cut time, size and the bytes read from the store. When it raises or is cancelled, a file
    that it made is gone again.
    """
    made = _is_new(to)
    clock = SystemClock()
    objects = open_store(store, clock)
    try:
        reader = StoreReader(objects, clock, keys=keys)
        keeper = Keeper(objects, reader, clock)
        chosen = await keeper.find(group, generation=generation, at=at)
        async with keeper.reading(group, chosen) as head:
            size = await _restore(head, reader, volume, to, progress, made=made)
    finally:
        await objects.aclose()
    return {
        "generation": head.generation,
        "cut_time": head.cut_time,
        "size": size,
        "bytes_store": reader.bytes_read,
    }


async def _restore(
    head: Head, reader: StoreReader, volume: str, to: Path, progress: Progress, *, made: bool
) -> int:
    info = head.volume(volume)
    if info is None:
        names = ", ".join(known.name for known in head.volumes)
        raise InvalidRequestError(f"group {head.group} has no volume {volume}", hint=f"it has {names}")
    manifest = await Manifest.open(head, reader)
    try:
        device = FileDevice(to, info.size)
        try:
            await restore_onto(manifest, reader, volume, device, progress=progress)
        finally:
            await device.aclose()
    except BaseException:
        if made:
            await run_to_completion(None, lambda: to.unlink(missing_ok=True))
        raise
    finally:
        manifest.close()
    return info.size


def _is_new(path: Path) -> bool:
    return not path.exists()
