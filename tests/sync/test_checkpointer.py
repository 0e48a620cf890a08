"""Checkpoints: changed pages, objects of bounded size, roots in the head or beside the pages."""

from __future__ import annotations

from contextlib import closing

import msgspec
import pytest

from silo.sync import checkpointer
from silo.sync.checkpointer import changed_bytes, write_checkpoint
from silo.sync.claim import Expectation
from silo.sync.codec import Kind, digest_of
from silo.sync.committer import volume_infos
from silo.sync.head import Head
from silo.sync.manifest import Manifest
from silo.sync.memory_store import MemoryStore
from silo.sync.reader import StoreReader
from silo.sync.register import Register
from silo.sync.segment import SegmentBuilder, parse_index
from silo.sync.sender import ObjectSender
from silo.testing.loop import SimulatedClock, run_simulated
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, FETCH, RETRY, SETTINGS, make_group

PAGES = 5
CHUNKS = PAGES * 1024 - 100


class Checkpointing:
    """A group's map and what is needed to write it."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.store = MemoryStore(clock)
        self.reader = StoreReader(self.store.client(), clock, FETCH)
        self.register = Register(self.store.client(), "vm1", clock, RETRY)
        self.sender = ObjectSender(self.store.client(), "vm1", SETTINGS, clock)
        self.group = make_group(clock, {"disk": CHUNKS * CHUNK, "ram": 10 * CHUNK})

    async def open(self) -> Manifest:
        volumes = volume_infos(self.group)
        return await Manifest.open(
            await self.register.claim(Expectation.opening(), volumes=volumes), self.reader
        )

    def change(self, manifest: Manifest, *chunks: int) -> None:
        builder = SegmentBuilder("vm1", ["disk"])
        for chunk in chunks:
            builder.add("disk", chunk, Kind.RAW, b"x", digest_of(b"%d" % chunk))
        sealed = builder.seal()
        index = parse_index(sealed.index, index_offset=sealed.index_offset, digest=sealed.index_digest)
        assert self.register.owner is not None
        manifest.maps.apply(index, self.sender.name(self.register.owner).key)

    async def checkpoint(self, manifest: Manifest, size_max: int = 1 << 20) -> Head:
        assert self.register.owner is not None
        made = await write_checkpoint(manifest, self.sender, self.register.owner, size_max)
        made.adopted(manifest)
        manifest.head = msgspec.structs.replace(manifest.head, root=made.root, segments=())
        return manifest.head

    def pages(self) -> int:
        return sum(data.count(b"SILOPAG\n") for data in self.store.snapshot().values())


def digests(manifest: Manifest) -> dict[int, bytes]:
    found = {}
    volume = manifest.volume("disk")
    for chunk in range(volume.chunk_count):
        place = volume.locate(chunk)
        if place is not None and place.kind is not Kind.ZERO:
            found[chunk] = place.digest
    return found


@simulated
async def test_only_changed_pages_are_written(clock: SimulatedClock) -> None:
    """And reopening from the root gives the same map, page by page."""
    it = Checkpointing(clock)
    manifest = await it.open()
    with closing(manifest):
        it.change(manifest, 0, 1, 2000, CHUNKS - 1)
        assert changed_bytes(manifest) == 3 * 1024 * 56
        await it.checkpoint(manifest)
        assert it.pages() == 3
        assert changed_bytes(manifest) == 0
        it.change(manifest, 1)
        head = await it.checkpoint(manifest)
        assert it.pages() == 4
        expected = digests(manifest)
    with closing(await Manifest.open(head, it.reader)) as reopened:
        assert digests(reopened) == {}
        for page in (0, 1, 4):
            await reopened.load_page("disk", page, demand=True)
        assert digests(reopened) == expected


@simulated
async def test_a_page_that_only_the_store_has_is_read_before_it_is_written_again(
    clock: SimulatedClock,
) -> None:
    it = Checkpointing(clock)
    with closing(await it.open()) as manifest:
        it.change(manifest, 0, 1, 2000)
        head = await it.checkpoint(manifest)
    with closing(await Manifest.open(head, it.reader)) as manifest:
        it.change(manifest, 1)
        head = await it.checkpoint(manifest)
        assert it.pages() == 3
    with closing(await Manifest.open(head, it.reader)) as manifest:
        for page in (0, 1):
            await manifest.load_page("disk", page, demand=True)
        assert set(digests(manifest)) == {0, 1, 2000}


@simulated
async def test_objects_are_bounded(clock: SimulatedClock) -> None:
    """Many pages are spread over objects of at most the given size."""
    it = Checkpointing(clock)
    with closing(await it.open()) as manifest:
        it.change(manifest, *range(0, CHUNKS, 100))
        head = await it.checkpoint(manifest, size_max=130_000)
        objects = [data for data in it.store.snapshot().values() if data.startswith(b"SILOMAP\n")]
        assert len(objects) == 3
        assert all(len(data) <= 130_000 for data in objects)
        expected = digests(manifest)
    with closing(await Manifest.open(head, it.reader)) as manifest:
        for page in range(PAGES):
            await manifest.load_page("disk", page, demand=True)
        assert digests(manifest) == expected


def test_a_large_root_stands_beside_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read with one more request and verified like everything else."""
    monkeypatch.setattr(checkpointer, "INLINE_ROOT_MAX", 100)

    async def scenario(clock: SimulatedClock) -> None:
        it = Checkpointing(clock)
        with closing(await it.open()) as manifest:
            it.change(manifest, 0, 3000)
            head = await it.checkpoint(manifest)
            assert head.root is not None
            assert head.root.stored is not None
            expected = digests(manifest)
        with closing(await Manifest.open(head, it.reader)) as manifest:
            for page in (0, 2):
                await manifest.load_page("disk", page, demand=True)
            assert digests(manifest) == expected

    run_simulated(scenario, seed=1)


@simulated
async def test_an_empty_map_has_an_empty_root(clock: SimulatedClock) -> None:
    it = Checkpointing(clock)
    with closing(await it.open()) as manifest:
        head = await it.checkpoint(manifest)
        assert it.pages() == 0
    with closing(await Manifest.open(head, it.reader)) as manifest:
        assert manifest.volume("disk").is_zero(0, CHUNKS)
