"""Installing what comes: verified, never over the guest, and never an older version."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3

from silo.checkpoint import kept_of
from silo.chunkmap import SYNC_DIRTY, ChunkMap, Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.errors import RemoteProtocolError
from silo.geometry import Geometry
from silo.group import Group
from silo.p2p.handover import Mark
from silo.p2p.installer import Installer
from silo.p2p.messages import FINAL_ROUND, Heat, Invalidate, VolumeOffer, Zeros, set_messages
from silo.p2p.peer_source import PeerSource
from silo.p2p.precopy import quantise
from silo.p2p.records import HandoverBody, VolumeSets, pack_set
from silo.p2p.terms import Terms
from silo.p2p.wire import ChunkFrame, Encoding
from silo.volume import Volume
from tests.support.migration import KeptMap
from tests.support.volumes import CHUNK, chunks_with, make_volume, states

MIGRATION = b"m" * 16
STORE, PEER, ZERO, UNPUNCHED, PRESENT = Residency


def make_installer(chunks: int = 6, *, residency: Residency = STORE) -> tuple[Installer, Volume]:
    _, volume = make_volume(MemoryDevice(chunks * CHUNK), residency)
    return Installer(MIGRATION, [volume], PeerSource(["disk"]), SystemClock()), volume


def pushed(chunk: int, content: bytes, round_: int = 1, **changes: object) -> ChunkFrame:
    """A push as it comes off the wire."""
    frame = ChunkFrame(
        MIGRATION, round_, 0, chunk, CHUNK, blake3(content).digest(), Encoding.RAW, memoryview(content)
    )  # fmt: skip
    return frame._replace(**changes)


def content_of(volume: Volume, chunk: int) -> bytes:
    found = volume.read_nowait(chunk * CHUNK, CHUNK)
    assert found is not None
    return bytes(found)


async def invalidate(installer: Installer, round_: int, *chunks: int) -> None:
    for message in set_messages(Invalidate, round_, 0, np.array(chunks)):
        await installer.invalidate(message)


def handover(volume: Volume, *, missing: list[int], unsynced: list[int]) -> HandoverBody:
    shape = volume.geometry
    offer = VolumeOffer(
        name="disk", size=shape.size, chunk_size=shape.chunk_size, block_size=shape.block_size, used=0
    )
    sets = VolumeSets(
        volume=offer,
        missing=pack_set(np.array(missing, dtype=np.int64)),
        unsynced=pack_set(np.array(unsynced, dtype=np.int64)),
    )
    terms = Terms(epoch=1, incarnation="a", generations=(1,), nonce="n")
    return HandoverBody(
        migration=MIGRATION, group="group", source_host="a", terms=terms, volumes=(sets,), state=b""
    )


OLD, NEW = b"o" * CHUNK, b"n" * CHUNK


async def test_a_push_is_installed_once():
    """What is absent is filled; what is present stays, whatever comes."""
    installer, volume = make_installer()
    await installer.install(pushed(2, OLD))
    await installer.install(pushed(2, NEW))
    assert content_of(volume, 2) == OLD
    assert states(volume)[2] is PRESENT
    assert chunks_with(volume, SYNC_DIRTY) == []


async def test_zeros_need_no_bytes():
    """A zero chunk, and runs of them, are installed by their name."""
    installer, volume = make_installer()
    await installer.install(pushed(1, b"", encoding=Encoding.ZERO))
    for message in set_messages(Zeros, 1, 0, np.array([3, 4])):
        installer.install_zeros(message)
    assert states(volume) == [STORE, UNPUNCHED, STORE, UNPUNCHED, UNPUNCHED, STORE]


async def test_a_push_of_an_older_round_is_refused():
    """After an invalidation only content of that round or later counts, over whatever connection it comes."""
    installer, volume = make_installer()
    await installer.install(pushed(2, OLD, round_=1))
    await invalidate(installer, 2, 2)
    assert states(volume)[2] is PEER
    await installer.install(pushed(2, OLD, round_=1))
    for message in set_messages(Zeros, 1, 0, np.array([2])):
        installer.install_zeros(message)
    assert states(volume)[2] is PEER
    await installer.install(pushed(2, NEW, round_=2))
    assert content_of(volume, 2) == NEW


async def test_rounds_do_not_go_back():
    """An announcement of an older round is a breach of the protocol."""
    installer, _ = make_installer()
    await invalidate(installer, 3, 1)
    with pytest.raises(RemoteProtocolError):
        await invalidate(installer, 2, 1)
    with pytest.raises(RemoteProtocolError):
        await invalidate(installer, FINAL_ROUND, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"migration": b"x" * 16},
        {"volume": 1},
        {"chunk": 6},
        {"length": CHUNK - 512},
        {"digest": bytes(32)},
        {"round": FINAL_ROUND},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
async def test_what_is_not_what_it_says_is_refused(wrong):
    """Another migration, volume, chunk or length, other bytes, or final content before the handover."""
    installer, volume = make_installer()
    with pytest.raises(RemoteProtocolError):
        await installer.install(pushed(2, NEW)._replace(**wrong))
    assert states(volume) == [STORE] * 6


async def test_the_handover_makes_the_map_true():
    """Missing becomes absent; what is absent is at the peer if no commit has it; the unsynced is dirty."""
    installer, volume = make_installer()
    await invalidate(installer, 1, 0, 1, 2, 3)
    for chunk in (0, 1, 2):
        await installer.install(pushed(chunk, OLD))
    body = handover(volume, missing=[1, 2, 3], unsynced=[0, 1, 4])
    installer.check(body)
    await installer.apply(body)
    installer.settle(body)
    assert states(volume) == [PRESENT, PEER, STORE, STORE, PEER, STORE]
    assert chunks_with(volume, SYNC_DIRTY) == [0, 1, 4]
    assert [chunks.tolist() for chunks in installer.needed()] == [[1, 4]]


async def test_after_the_handover_only_final_content_counts():
    """Pushes from before it that are still under way are refused; the guest wins over all of them."""
    installer, volume = make_installer()
    body = handover(volume, missing=[1, 2], unsynced=[1, 2])
    await installer.apply(body)
    installer.settle(body)
    await volume.write(2 * CHUNK, NEW)
    await installer.install(pushed(1, OLD, round_=7))
    assert states(volume)[1] is PEER
    await installer.install(pushed(1, NEW, round_=FINAL_ROUND))
    await installer.install(pushed(2, OLD, round_=FINAL_ROUND))
    assert content_of(volume, 1) == content_of(volume, 2) == NEW
    with pytest.raises(RemoteProtocolError):
        await invalidate(installer, 8, 1)


async def test_settling_again_changes_nothing():
    """A restart settles once more: what the guest has written meanwhile stays, what is absent keeps its place."""
    installer, volume = make_installer()
    body = handover(volume, missing=[1, 2], unsynced=[1, 2])
    await installer.apply(body)
    installer.settle(body)
    await volume.write(2 * CHUNK, NEW)
    before = states(volume)
    installer.settle(body)
    assert states(volume) == before
    assert content_of(volume, 2) == NEW


async def test_settling_large_volumes():
    """Volumes of several windows, with nothing unsynced in the first and the last."""
    count = (3 << 20) + 5
    installer, volume = make_installer(count, residency=PEER)
    unsynced = [(1 << 20) + 7, (2 << 20) - 1]
    installer.settle(handover(volume, missing=[], unsynced=unsynced))
    assert volume.chunks.select(7, PEER).tolist() == unsynced
    assert volume.chunks.select_dirty(SYNC_DIRTY).tolist() == unsynced
    assert volume.chunks.count_residency()[STORE] == count - 2


@pytest.mark.parametrize("change", ["name", "size", "migration"])
def test_a_handover_of_something_else_is_refused(change):
    """It must be of this migration and of these volumes."""
    installer, volume = make_installer()
    body = handover(volume, missing=[], unsynced=[])
    other_installer, other = make_installer(7)
    wrong = handover(other, missing=[], unsynced=[]) if change == "size" else body
    if change == "migration":
        other_installer = Installer(b"x" * 16, [volume], PeerSource(["disk"]), SystemClock())
        with pytest.raises(RemoteProtocolError):
            other_installer.check(body)
        return
    if change == "name":
        volume.name = "tape"
    with pytest.raises(RemoteProtocolError):
        installer.check(wrong)


async def test_a_target_starts_with_nothing():
    """Whatever the device held before counts as absent, durably, before anything is accepted."""
    installer, volume = make_installer(residency=PRESENT)
    await installer.start_empty()
    assert states(volume) == [STORE] * 6


def test_heat_is_adopted():
    """Counts come back to within a few percent, and only for chunks that exist."""
    installer, volume = make_installer()
    ranks = quantise(np.array([0, 100, 5], dtype=np.float32)).tobytes()
    installer.adopt_heat(Heat(volume=0, first=2, reads=ranks, writes=bytes(3)))
    np.testing.assert_allclose(volume.heat.read_heat(), [0, 0, 0, 100, 5, 0], rtol=0.05)
    for wrong in (
        Heat(volume=0, first=4, reads=ranks, writes=bytes(3)),
        Heat(volume=0, first=0, reads=ranks, writes=b""),
    ):
        with pytest.raises(RemoteProtocolError):
            installer.adopt_heat(wrong)


def test_marks_are_for_the_disk():
    """Every mark is a word that can be read in a record."""
    assert {mark.value for mark in Mark} == {"offered", "released", "handed", "evacuated"}


async def test_no_flush_makes_the_map_durable_before_the_handover_is_settled() -> None:
    """What was pushed may still be taken back, and a map that does not know that must not survive a power loss."""
    states = bytearray([STORE] * 4)
    kept = KeptMap(states)
    group = Group("vm1", SystemClock(), is_open=False)
    shape = Geometry(4 * CHUNK, CHUNK)
    volume = group.add(
        "disk", MemoryDevice(4 * CHUNK), shape, chunks=ChunkMap(states, shape.chunk_count), keeper=kept
    )
    installer = Installer(MIGRATION, [volume], PeerSource(["disk"]), SystemClock())
    await installer.start_empty()
    await installer.install(pushed(0, OLD))
    await installer.install(pushed(1, NEW))
    await volume.flush()
    await invalidate(installer, 2, 0)
    assert set(kept_of(kept.states)) == set(kept_of(bytes([STORE])))
    await installer.apply(handover(volume, missing=[0], unsynced=[0, 1]))
    installer.settle(handover(volume, missing=[0], unsynced=[0, 1]))
    await volume.flush()
    assert kept_of(kept.states).tolist() == kept_of(bytes([PEER, PRESENT, STORE, STORE])).tolist()
