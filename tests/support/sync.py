"""A group that syncs to a store, in a few lines, and what a restorer finds there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import attrs
import numpy as np

from silo.abc import Clock, ObjectStore
from silo.chunkmap import SYNC_DIRTY
from silo.devices.memory import MemoryDevice
from silo.geometry import CHUNK_SIZE_MIN, Geometry
from silo.group import CopyLimits, Group
from silo.sync.claim import Expectation
from silo.sync.committer import volume_infos
from silo.sync.head import Head
from silo.sync.manifest import Manifest
from silo.sync.reader import StoreReader
from silo.sync.register import Register
from silo.sync.restore import open_newest, restore_volume
from silo.sync.settings import FetchSettings, RetrySettings, SyncSettings
from silo.sync.syncer import Syncer
from silo.tasks import task_group
from silo.volume import Volume

CHUNK = CHUNK_SIZE_MIN
RETRY = RetrySettings(delay_min_s=0.05, delay_max_s=2.0, request_timeout_s=30.0)
SETTINGS = SyncSettings(rpo_s=5.0, segment_size=1 << 20, window=4 << 20, drain_timeout_s=20.0, retry=RETRY)
FETCH = FetchSettings(patience_s=10.0, retry=RETRY)


def make_group(
    clock: Clock,
    sizes: Mapping[str, int] | None = None,
    *,
    name: str = "vm1",
    copies: CopyLimits | None = None,
) -> Group:
    """A group of memory devices, all zeros and clean, in chunks of 4 KiB."""
    group = Group(name, clock, copies=copies)
    for volume, size in (sizes or {"disk": 64 * CHUNK}).items():
        group.add(volume, MemoryDevice(size), Geometry(size, chunk_size=CHUNK))
    return group


@attrs.define
class Syncing:
    """A group with its syncer, running."""

    group: Group
    register: Register
    syncer: Syncer
    store: ObjectStore

    @property
    def disk(self) -> Volume:
        """The first volume."""
        return next(iter(self.group.volumes.values()))

    @property
    def head(self) -> Head:
        """As this owner knows it."""
        assert self.register.head is not None
        return self.register.head

    async def write(self, chunk: int, content: bytes, name: str | None = None) -> None:
        """Write ``content``, repeated to a whole chunk."""
        volume = self.group.volumes[name] if name else self.disk
        await volume.write(chunk * CHUNK, (content * CHUNK)[:CHUNK])

    def image(self) -> dict[str, bytes]:
        """What the guest would read."""
        found = {}
        for name, volume in self.group.volumes.items():
            content = volume.read_nowait(0, volume.geometry.size)
            assert content is not None
            found[name] = bytes(content)
        return found


@asynccontextmanager
async def syncing(
    store: ObjectStore,
    clock: Clock,
    *,
    group: Group | None = None,
    expectation: Expectation | None = None,
    settings: SyncSettings = SETTINGS,
    drain: bool = True,
    run: bool = True,
) -> AsyncIterator[Syncing]:
    """Claim the group, sync it, and at the end store what is left (unless ``drain`` is false)."""
    group = group or make_group(clock)
    register = Register(store, group.name, clock, settings.retry)
    await register.claim(expectation or Expectation.opening(), volumes=volume_infos(group))
    syncer = await Syncer.open(group, register, store, clock, settings, fetch=FETCH)
    async with task_group() as tasks:
        if run:
            tasks.create_task(syncer.run())
        try:
            yield Syncing(group, register, syncer, store)
        except BaseException:
            drain = False
            raise
        finally:
            await syncer.close(drain=drain)


async def restored(
    store: ObjectStore, clock: Clock, group: str = "vm1", *, body: Head | None = None
) -> dict[str, bytes]:
    """The image of every volume that a restorer with nothing but the store gets; of the generation of ``body``."""
    reader = StoreReader(store, clock, FETCH)
    manifest = await (Manifest.open(body, reader) if body else open_newest(reader, group))
    try:
        found = {}
        for info in manifest.head.volumes:
            device = MemoryDevice(info.size)
            await restore_volume(manifest, reader, info.name, device)
            found[info.name] = bytes(await device.read(0, info.size))
        return found
    finally:
        manifest.close()


def mark_all_dirty(group: Group) -> None:
    """As after opening disks that the store has never seen."""
    for volume in group.volumes.values():
        volume.chunks.mark_many(np.arange(volume.chunks.count), SYNC_DIRTY)
