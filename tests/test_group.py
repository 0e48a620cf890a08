"""What volumes share: a gate, an instant, a flush, an end."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from silo.chunkmap import MIGRATION_DIRTY, Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.errors import ClosedError, InvalidRequestError
from silo.geometry import Geometry
from silo.group import Group
from silo.testing.loop import run_simulated
from tests.support.held import HeldDevice
from tests.support.volumes import CHUNK, KeptMaps, make_volume

DATA = b"d" * CHUNK


def test_a_name_is_taken_once():
    """Two volumes of one name would share an export and a key."""
    group, _ = make_volume(MemoryDevice(CHUNK))
    with pytest.raises(InvalidRequestError, match="already has"):
        group.add("disk", MemoryDevice(CHUNK))


def test_names_are_checked():
    """They become part of keys and file names."""
    with pytest.raises(InvalidRequestError):
        Group("../up", SystemClock())
    with pytest.raises(InvalidRequestError):
        Group("g", SystemClock()).add("../up", MemoryDevice(CHUNK))


def test_the_default_geometry_is_the_devices():
    """Without a geometry the whole device is the volume, in chunks of the default size, all present."""
    volume = Group("g", SystemClock()).add("disk", MemoryDevice(1 << 20))
    assert volume.geometry == Geometry(1 << 20)
    assert volume.chunks.count_residency()[Residency.PRESENT] == 16


async def test_a_migration_records_from_its_start():
    """Starting forgets older marks, taking hands over, stopping ends it."""
    group, volume = make_volume(MemoryDevice(4 * CHUNK))
    _, other = make_volume(MemoryDevice(CHUNK), group=group, name="other")
    volume.write_nowait(0, DATA)
    group.record_migration(True)
    volume.write_nowait(CHUNK, DATA)
    other.zero_nowait(0, CHUNK)
    assert {name: found.tolist() for name, found in group.take_migration().items()} == {
        "disk": [1],
        "other": [0],
    }
    volume.write_nowait(2 * CHUNK, DATA)
    group.record_migration(True)
    assert all(len(found) == 0 for found in group.take_migration().values())
    group.record_migration(False)
    volume.write_nowait(0, DATA)
    assert not np.any(volume.chunks.view & MIGRATION_DIRTY)


async def test_unsynced_is_dirty_or_taken():
    """Until a commit is known, what a cut took is exposed as much as what is dirty."""
    group, volume = make_volume(MemoryDevice(4 * CHUNK))
    volume.write_nowait(0, DATA)
    cut = group.take()
    volume.write_nowait(2 * CHUNK, DATA)
    assert group.unsynced()["disk"].tolist() == [0, 2]
    assert group.exposed_bytes == 2 * CHUNK
    cut.commit()
    assert group.unsynced()["disk"].tolist() == [2]
    assert group.exposed_bytes == CHUNK


async def test_absent_chunks_are_counted_over_all_volumes():
    """By residency, because the peer's and the store's absent chunks mean different things."""
    group, _ = make_volume(MemoryDevice(4 * CHUNK), Residency.ABSENT_PEER)
    make_volume(MemoryDevice(2 * CHUNK), Residency.ABSENT_STORE, group=group, name="other")
    assert group.absent_counts([Residency.ABSENT_PEER]) == 4
    assert group.absent_counts([Residency.ABSENT_PEER, Residency.ABSENT_STORE]) == 6
    assert group.absent_counts([Residency.PRESENT]) == 0


async def test_flush_and_checkpoint_reach_every_volume():
    """Each device is flushed; a checkpoint also writes maps in which nothing has changed."""
    keepers = [KeptMaps(), KeptMaps()]
    devices = [HeldDevice(CHUNK), HeldDevice(CHUNK)]
    group, _ = make_volume(devices[0], keeper=keepers[0])
    make_volume(devices[1], group=group, name="other", keeper=keepers[1])
    await group.flush()
    assert [device.log for device in devices] == [[("flush", 0)]] * 2
    await group.flush()
    assert [keeper.count for keeper in keepers] == [1, 1], "only what the process before us may have owed"
    await group.checkpoint()
    assert [keeper.count for keeper in keepers] == [2, 2]
    assert [keeper.states for keeper in keepers] == [bytes([Residency.PRESENT])] * 2


async def test_after_a_checkpoint_the_devices_read_as_the_volumes_do():
    """However many runs were zeroed: somebody may use the file without Silo next."""
    device = MemoryDevice(200 * CHUNK)
    group, volume = make_volume(device, keeper=KeptMaps())
    assert volume.write_nowait(0, DATA * 200)
    for chunk in range(0, 200, 2):
        assert volume.zero_nowait(chunk * CHUNK, CHUNK)
    await group.checkpoint()
    assert bytes(device.read_nowait(0, 200 * CHUNK)) == (bytes(CHUNK) + DATA) * 100


def test_heat_moves_with_the_groups_clock():
    """A cut advances it; so does the owner, once a second."""

    async def scenario(clock):
        group = Group("g", clock, half_life_s=10)
        volume = group.add("disk", MemoryDevice(CHUNK), Geometry(CHUNK, chunk_size=CHUNK))
        volume.write_nowait(0, DATA)
        await asyncio.sleep(10)
        group.advance_heat()
        half = volume.heat.write_heat().tolist()
        await asyncio.sleep(10)
        group.take().commit()
        return half, volume.heat.write_heat().tolist()

    assert run_simulated(scenario, seed=1) == ([0.5], [0.25])


async def test_closing_closes_every_device():
    """The first one fails to close; the second one is closed all the same."""

    async def stuck():
        raise ClosedError("stuck")

    first, second = MemoryDevice(CHUNK), MemoryDevice(CHUNK)
    first.aclose = stuck
    group, _ = make_volume(first)
    make_volume(second, group=group, name="other")
    with pytest.raises(ClosedError, match="stuck"):
        await group.aclose()
    with pytest.raises(ClosedError):
        second.read_nowait(0, 1)
