"""Two volumes of a group against bytearrays, through everything that can happen to them one after the other.

Guests write and zero at both speeds, chunks come from the store and from a peer, cuts are taken and decided, a
migration copies round after round; processes die and machines lose power. The model knows of every block what it
holds, and what it may hold after a power loss: any value since the last flush. What happens *at the same time*
is the matter of ``tests/sim``.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from silo.abc import ChunkSource
from silo.checkpoint import kept_of, states_after_power_loss
from silo.chunkmap import SYNC_DIRTY, ChunkMap, Residency, after_restart
from silo.clock import SystemClock
from silo.devices.volatile import VolatileDevice
from silo.errors import CapacityError
from silo.frozen import Cut
from silo.geometry import CHUNK_SIZE_MIN, Geometry
from silo.group import CopyLimits, Group
from silo.volume import Volume
from tests.support.held import HeldDevice
from tests.support.volumes import KeptMaps

BLOCK = 512
CHUNK = CHUNK_SIZE_MIN
CHUNKS = 5
SIZE = CHUNKS * CHUNK - 3 * BLOCK
BLOCKS = SIZE // BLOCK
NAMES = ("disk", "memory")
GEOMETRY = Geometry(SIZE, chunk_size=CHUNK)

names = st.sampled_from(NAMES)
chunk_numbers = st.integers(0, CHUNKS - 1)
extents = st.one_of(
    st.tuples(st.integers(0, BLOCKS - 1), st.sampled_from([1, 2, 8, 12, 24])),
    chunk_numbers.map(lambda chunk: (chunk * (CHUNK // BLOCK), CHUNK // BLOCK)),
).map(lambda extent: (extent[0] * BLOCK, min(BLOCKS - extent[0], extent[1]) * BLOCK))
slowness = st.sets(st.sampled_from(["read", "write", "zero"]))


def part_of(image: bytes | bytearray, chunk: int) -> bytes:
    offset, length = GEOMETRY.extent_of(chunk)
    return bytes(image[offset : offset + length])


class ImageSource(ChunkSource):
    """Serves chunks of an image as it is at that moment."""

    def __init__(self, image: bytes | bytearray) -> None:
        self.image = image

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> bytes | None:
        content = part_of(self.image, chunk)
        return content if any(content) else None


@attrs.define(eq=False)
class Model:
    """One volume as it should be, and what outlives a process: disk, checkpoint, store and peer."""

    device: VolatileDevice
    states: bytearray
    image: bytearray
    store: bytearray
    """The last commit. Of chunks that only the peer has it may hold anything older."""
    peer: bytes
    kept: KeptMaps
    replica: bytearray
    since_flush: list[set[bytes]]
    """Per block, the values it had since the last flush: one of them is there after a power loss."""

    def block(self, number: int) -> bytes:
        return bytes(self.image[number * BLOCK : (number + 1) * BLOCK])

    def changed(self, offset: int, content: bytes) -> None:
        """The guest's write was acknowledged."""
        self.image[offset : offset + len(content)] = content
        for number in range(offset // BLOCK, (offset + len(content)) // BLOCK):
            self.since_flush[number].add(self.block(number))

    def flushed(self) -> None:
        """What is there now will be there."""
        self.since_flush = [{self.block(number)} for number in range(BLOCKS)]


@attrs.define(eq=False)
class TakenCut:
    """An undecided cut, the images at its instant, and what has been read of it."""

    cut: Cut
    images: dict[str, bytes]
    at_peer: dict[str, list[int]]
    uploaded: dict[str, dict[int, bytes]]


class VolumeMachine(RuleBasedStateMachine):
    """See the module. Every rule ends with nothing under way."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.models: dict[str, Model] = {}
        self.taken: TakenCut | None = None
        self.todo: dict[str, list[int]] | None = None
        self.stamp = 0

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        try:
            for name in self.models:
                self.read_everything(name)
        finally:
            self.runner.close()

    # ---- where it begins --------------------------------------------------------------------------------

    @initialize(
        residencies=st.tuples(*[st.lists(st.sampled_from(Residency), min_size=CHUNKS, max_size=CHUNKS)] * 2),
        room=st.integers(0, 3),
    )
    def begin(self, residencies: tuple[list[Residency], ...], room: int) -> None:
        """Each volume has chunks of every kind; of those at the peer the store has something older."""
        self.limits = CopyLimits(memory=room * CHUNK, spill=0)
        for name, kinds in zip(NAMES, residencies, strict=True):
            image = bytearray(self.next_content(BLOCKS))
            device = VolatileDevice(SIZE)
            states = bytearray(kinds)
            for chunk, kind in enumerate(kinds):
                offset, length = GEOMETRY.extent_of(chunk)
                if kind in (Residency.ZERO, Residency.ZERO_UNPUNCHED):
                    image[offset : offset + length] = bytes(length)
                if kind is not Residency.ZERO:
                    device.write_nowait(
                        offset, part_of(image, chunk) if kind is Residency.PRESENT else b"?" * length
                    )
                if kind is Residency.ABSENT_PEER:
                    states[chunk] |= SYNC_DIRTY
            self.run(device.flush())
            store = bytearray(image)
            for chunk, kind in enumerate(kinds):
                if kind is Residency.ABSENT_PEER:
                    offset, length = GEOMETRY.extent_of(chunk)
                    store[offset : offset + length] = b"<" * length
            kept = KeptMaps()
            kept.states = bytes(states)
            self.models[name] = Model(device, states, image, store, bytes(image), kept, bytearray(SIZE), [])
            self.models[name].flushed()
        self.start()

    def start(self) -> None:
        """A process starts: a group on what is there."""
        self.taken = self.todo = None
        self.group = Group("group", SystemClock(), copies=self.limits)
        for name, model in self.models.items():
            device = HeldDevice(SIZE, inner=model.device)
            chunks = ChunkMap(model.states, CHUNKS)
            volume = self.group.add(name, device, GEOMETRY, chunks=chunks, keeper=model.kept)
            volume.set_source(Residency.ABSENT_STORE, ImageSource(model.store))
            volume.set_source(Residency.ABSENT_PEER, ImageSource(model.peer))

    def volume(self, name: str, slow: set[str] = frozenset()) -> Volume:  # type: ignore[assignment]
        volume = self.group.volumes[name]
        volume.device.slow = slow
        return volume

    def next_content(self, blocks: int) -> bytes:
        """Blocks unlike any before."""
        self.stamp += blocks
        return b"".join(
            number.to_bytes(8, "little") * 64 for number in range(self.stamp - blocks + 1, self.stamp + 1)
        )

    # ---- the guest --------------------------------------------------------------------------------------

    @rule(name=names, extent=extents, slow=slowness)
    def write(self, name: str, extent: tuple[int, int], slow: set[str]) -> None:
        volume, (offset, length) = self.volume(name, slow), extent
        content = self.next_content(length // BLOCK)
        if not volume.write_nowait(offset, content):
            self.run(volume.write(offset, content))
        self.models[name].changed(offset, content)

    @rule(name=names, extent=extents, slow=slowness)
    def zero(self, name: str, extent: tuple[int, int], slow: set[str]) -> None:
        volume = self.volume(name, slow)
        if not volume.zero_nowait(*extent):
            self.run(volume.zero(*extent))
        self.models[name].changed(extent[0], bytes(extent[1]))

    @rule(name=names, extent=extents, slow=slowness)
    def trim(self, name: str, extent: tuple[int, int], slow: set[str]) -> None:
        self.run(self.volume(name, slow).trim(*extent))
        first, limit = GEOMETRY.covered(*extent)
        for chunk in range(first, limit):
            offset, length = GEOMETRY.extent_of(chunk)
            self.models[name].changed(offset, bytes(length))

    @rule(name=names, extent=extents, slow=slowness)
    def read(self, name: str, extent: tuple[int, int], slow: set[str]) -> None:
        volume, (offset, length) = self.volume(name, slow), extent
        found = volume.read_nowait(offset, length)
        if found is None:
            found = self.run(volume.read(offset, length))
        assert bytes(found) == self.models[name].image[offset : offset + length]

    @rule(name=names, slow=slowness)
    def flush(self, name: str, slow: set[str]) -> None:
        self.run(self.volume(name, slow).flush())
        self.models[name].flushed()

    # ---- chunks from elsewhere --------------------------------------------------------------------------

    @rule(name=names, chunk=chunk_numbers, slow=slowness)
    def fill(self, name: str, chunk: int, slow: set[str]) -> None:
        """What arrives is what the source has; it counts only if the chunk is still absent."""
        volume, model = self.volume(name, slow), self.models[name]
        residency = volume.chunks.residency(chunk)
        remote = model.peer if residency is Residency.ABSENT_PEER else model.store
        filled = self.run(volume.fill(chunk, part_of(remote, chunk)))
        assert filled is (residency < Residency.ZERO)

    @rule(name=names, extent=extents)
    def prefetch(self, name: str, extent: tuple[int, int]) -> None:
        volume = self.volume(name)
        self.run(volume.prefetch(*extent))
        assert all(volume.chunks.residency(c) >= Residency.ZERO for c in range(*GEOMETRY.touched(*extent)))

    # ---- cuts -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.taken is None)
    @rule()
    def take(self) -> None:
        at_peer = {
            name: volume.chunks.select(0x07, Residency.ABSENT_PEER).tolist()
            for name, volume in self.group.volumes.items()
        }
        images = {name: bytes(model.image) for name, model in self.models.items()}
        self.taken = TakenCut(self.group.take(), images, at_peer, {name: {} for name in NAMES})

    @precondition(lambda self: self.taken is not None)
    @rule(name=names, choice=st.randoms(use_true_random=False), release=st.booleans(), slow=slowness)
    def upload(self, name: str, choice: random.Random, release: bool, slow: set[str]) -> None:
        """Read one of the chunks that are left, and perhaps let the guest have it."""
        taken = self.taken
        left = [c for c in taken.cut.volumes[name].data.tolist() if c not in taken.uploaded[name]]
        if left and not taken.cut.overflowed:
            self.volume(name, slow)
            self.upload_chunk(name, choice.choice(left), release)

    def upload_chunk(self, name: str, chunk: int, release: bool) -> None:
        part = self.taken.cut.volumes[name]
        content = bytes(self.run(part.read(chunk)))
        assert content == part_of(self.taken.images[name], chunk), "not the content of the instant of the cut"
        self.taken.uploaded[name][chunk] = content
        if release:
            part.release(chunk)

    @precondition(lambda self: self.taken is not None)
    @rule()
    def commit(self) -> None:
        """The store's image, with what was uploaded, is the image at the instant of the cut. Not if it overflowed."""
        taken, self.taken = self.taken, self.taken
        for name, part in taken.cut.volumes.items():
            for chunk in part.data.tolist():
                if chunk in taken.uploaded[name]:
                    continue
                try:
                    self.upload_chunk(name, chunk, release=False)
                except CapacityError:
                    return self.abandon()
        if taken.cut.overflowed:
            return self.abandon()
        taken.cut.commit()
        self.taken = None
        for name, part in taken.cut.volumes.items():
            store = self.models[name].store
            for chunk, content in taken.uploaded[name].items():
                store[chunk * CHUNK : chunk * CHUNK + len(content)] = content
            for first, limit in part.zeros:
                extent = slice(first * CHUNK, min(limit * CHUNK, SIZE))
                store[extent] = bytes(extent.stop - extent.start)
            for chunk in set(range(CHUNKS)) - set(taken.at_peer[name]):
                assert part_of(store, chunk) == part_of(taken.images[name], chunk), (
                    f"{name} {chunk} was not taken"
                )

    @precondition(lambda self: self.taken is not None)
    @rule()
    def abandon(self) -> None:
        self.taken.cut.abandon()
        self.taken = None

    # ---- migration --------------------------------------------------------------------------------------

    @precondition(lambda self: self.todo is None)
    @rule()
    def start_migration(self) -> None:
        self.group.record_migration(True)
        self.todo = {name: list(range(CHUNKS)) for name in NAMES}

    @precondition(lambda self: self.todo is not None)
    @rule(slow=slowness)
    def copy_round(self, slow: set[str]) -> None:
        """Copy what the last round has left, and ask what has changed meanwhile."""
        for name, chunks in self.todo.items():
            for chunk in chunks:
                content = self.run(self.volume(name, slow).read_chunk(chunk))
                offset, length = GEOMETRY.extent_of(chunk)
                self.models[name].replica[offset : offset + length] = content or bytes(length)
        self.todo = {name: found.tolist() for name, found in self.group.take_migration().items()}

    @precondition(lambda self: self.todo is not None)
    @rule()
    def finish_migration(self) -> None:
        """After the rounds behind the closed gate the replica is the volume."""
        self.run(self.group.gate.close_and_drain())
        self.copy_round(set())
        self.copy_round(set())
        for model in self.models.values():
            assert model.replica == model.image
        self.group.record_migration(False)
        self.group.gate.reopen()
        self.todo = None

    # ---- what goes wrong --------------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        """The process dies; the page cache and the mapped states survive."""
        for volume in self.group.volumes.values():
            after_restart(volume.chunks.view)
        self.start()

    @rule(seed=st.integers(0, 2**32))
    def lose_power(self, seed: int) -> None:
        """Every block holds a value that it had since the last flush, and what it holds now it keeps."""
        for model in self.models.values():
            model.device = self.run(model.device.power_loss(random.Random(seed).random))
            kept = states_after_power_loss(kept_of(model.kept.states))
            model.states = bytearray(kept.tobytes())
        self.start()
        for name, model in self.models.items():
            found = bytes(self.run(self.volume(name).read(0, SIZE)))
            for number in range(BLOCKS):
                block = found[number * BLOCK : (number + 1) * BLOCK]
                assert block in model.since_flush[number], (
                    f"block {number} of {name} is older than its last flush"
                )
            model.image[:] = found
            model.since_flush = [{model.block(number)} for number in range(BLOCKS)]

    # ---- always -----------------------------------------------------------------------------------------

    def read_everything(self, name: str) -> None:
        assert bytes(self.run(self.volume(name).read(0, SIZE))) == self.models[name].image

    @invariant()
    def zero_means_zero_on_the_device(self) -> None:
        """What the map says without looking is so."""
        for name, model in self.models.items():
            chunks = self.group.volumes[name].chunks
            for chunk in range(CHUNKS):
                extent = GEOMETRY.extent_of(chunk)
                residency = chunks.residency(chunk)
                if residency is Residency.ZERO:
                    assert not any(model.device.read_nowait(*extent))
                if residency is Residency.PRESENT:
                    assert bytes(model.device.read_nowait(*extent)) == part_of(model.image, chunk)
                if residency in (Residency.ZERO, Residency.ZERO_UNPUNCHED):
                    assert not any(part_of(model.image, chunk))


TestVolume = VolumeMachine.TestCase
TestVolume.settings = settings(stateful_step_count=40)
