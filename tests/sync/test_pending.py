"""Segments that no head lists yet: what they say of a chunk, and what they cost."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from silo.sync.claim import Expectation
from silo.sync.codec import Kind, digest_of
from silo.sync.committer import volume_infos
from silo.sync.head import SegmentRef
from silo.sync.layout import SegmentName
from silo.sync.manifest import Manifest
from silo.sync.memory_store import MemoryStore
from silo.sync.pending import Pending
from silo.sync.reader import StoreReader
from silo.sync.register import Register
from silo.sync.segment import Segment, SegmentBuilder
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, FETCH, RETRY, make_group

INCARNATION = "0123456789abcdef"


async def empty_manifest(clock: SimulatedClock) -> Manifest:
    store = MemoryStore(clock)
    register = Register(store.client(), "vm1", clock, RETRY)
    group = make_group(clock, {"disk": 2000 * CHUNK})
    head = await register.claim(Expectation.opening(), volumes=volume_infos(group))
    return await Manifest.open(head, StoreReader(store.client(), clock, FETCH))


def segment(chunks: dict[int, bytes], *runs: tuple[int, int]) -> Segment:
    builder = SegmentBuilder("vm1", ["disk"])
    for chunk, content in chunks.items():
        builder.add("disk", chunk, Kind.RAW, content, digest_of(content))
    for first, limit in runs:
        builder.add_run("disk", first, limit)
    return builder.seal()


def digest(pending: Pending, chunk: int) -> bytes | None:
    (found,) = pending.digests("disk", np.array([chunk]))
    return found


def name(seq: int) -> SegmentName:
    return SegmentName("vm1", 1, seq, INCARNATION)


@simulated
async def test_segments_are_listed_in_order_whenever_they_arrive(clock: SimulatedClock) -> None:
    manifest = await empty_manifest(clock)
    with closing(manifest), closing(Pending(manifest)) as pending:
        assert (pending.segments, pending.last_seq) == ((), 0)
        first, second = segment({1: b"one"}), segment({2: b"two"}, (5, 9))
        pending.add(name(2), second)
        pending.add(name(1), first)
        assert [part.key for part in pending.segments] == [name(1).key, name(2).key]
        assert pending.last_seq == 2
        assert pending.segments[0] == SegmentRef(
            name(1).key, first.size, first.index_offset, len(first.index), first.index_digest.hex()
        )
        assert [index.entries["chunk"].tolist() for _, index in pending.indexes()] == [[1], [2, 5]]
        pending.clear()
        assert (pending.segments, list(pending.indexes())) == ((), [])


@simulated
async def test_only_what_is_left_over_is_compared_with(clock: SimulatedClock) -> None:
    """Segments of the cut in progress say nothing yet; those of an abandoned one win over the committed map."""
    manifest = await empty_manifest(clock)
    with closing(manifest), closing(Pending(manifest)) as pending:
        committed = Pending(manifest)
        committed.add(name(1), segment({1: b"committed", 2: b"committed", 3: b"committed"}))
        await manifest.committed(manifest.head, committed.indexes())
        committed.close()
        pending.add(name(2), segment({1: b"newer"}, (2, 3)))
        assert digest(pending, 1) == digest_of(b"committed")
        assert pending.is_zero("disk", 500, 2000)
        pending.carry_over()
        assert digest(pending, 1) == digest_of(b"newer")
        assert digest(pending, 2) is None
        assert digest(pending, 3) == digest_of(b"committed")
        assert digest(pending, 4) is None
        assert not pending.is_zero("disk", 2, 3)
        pending.add(name(3), segment({1: b"newest"}))
        assert digest(pending, 1) == digest_of(b"newer")
        pending.carry_over()
        assert digest(pending, 1) == digest_of(b"newest")
        pending.clear()
        assert digest(pending, 1) == digest_of(b"committed")
        pending.carry_over()
        assert digest(pending, 1) == digest_of(b"committed")
