"""A toy of one group's store with everybody who changes it, for walking through all interleavings.

Each step is what one request does to the store, or one request's answer; between any two of them anybody else may go
on. The decisions are the product's own (`silo.sync.collection`). A flaw breaks one of them, to see that the walk would
notice.

The owner of epoch 1 commits a fixed series of generations, among them a part that is stored before it is named. Its
collector makes passes. One pinner keeps what it read in the head, another one what the first one's record keeps, after
which the first lets go. A claimant of epoch 2 may take over at any step, commit, and collect, while the owner of
epoch 1, which does not know it yet, goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import attrs

from silo.sync.claim import Owner
from silo.sync.collection import Dead, Docket, Horizon, deletable, floor_for, keeps
from silo.sync.head import Head, VolumeInfo, WriterState
from silo.sync.layout import FORMAT_VERSION, SegmentName

INCARNATION = "0123456789abcdef"


@lru_cache
def key(epoch: int, seq: int) -> str:
    """The key of a segment."""
    return SegmentName("vm", epoch, seq, INCARNATION).key


S1, H2, S3, S4 = (key(1, seq) for seq in (1, 2, 3, 4))
T1 = key(2, 1)

COMMITS: tuple[tuple[str, frozenset[str]], ...] = (
    ("upload", frozenset({H2})),
    ("upload", frozenset({S3})),
    ("commit", frozenset({S3})),
    ("commit", frozenset({S3, H2})),
    ("upload", frozenset({S4})),
    ("commit", frozenset({S4, H2})),
)
"""What the owner of epoch 1 does, after generation 1 with S1."""


@attrs.frozen
class Register:
    """The head: who, which generation, what it reaches, and the floor."""

    epoch: int = 1
    generation: int = 1
    reach: frozenset[str] = frozenset({S1})
    floor: int = 0
    seq: int = 1


@attrs.frozen
class Collector:
    """Where a collector is in its pass, and what it knows."""

    at: str = "look"
    passes: int = 0
    dead: frozenset[tuple[str, int]] = frozenset()
    pinned: frozenset[str] = frozenset()
    doomed: tuple[str, ...] = ()


@attrs.frozen
class Pinner:
    """Where somebody who makes a record is. ``holds`` when it relies on it."""

    at: str = "read"
    generation: int = 0
    reach: frozenset[str] = frozenset()
    holds: bool = False


@attrs.frozen
class World:
    """Everything."""

    head: Register = Register()
    objects: frozenset[str] = frozenset({S1})
    records: frozenset[tuple[str, int, frozenset[str]]] = frozenset()
    committer: int = 0
    claimant: int = 0
    old: Collector = Collector()
    new: Collector = Collector()
    first: Pinner = Pinner()
    second: Pinner = Pinner()


@lru_cache
def _head(epoch: int, generation: int, floor: int) -> Head:
    return Head(
        version=FORMAT_VERSION, incompat=0, group="vm", epoch=epoch, incarnation=INCARNATION, nonce="n",
        generation=generation, seq=0, cut_time=0.0, state=WriterState.OPEN,
        volumes=(VolumeInfo("disk", 4096, 4096, 512),), segments=(), gc_floor=floor,
    )  # fmt: skip


def broken(world: World) -> str:
    """What is wrong, or nothing."""
    if missing := world.head.reach - world.objects:
        return f"generation {world.head.generation} lost {missing}"
    for name, pinner in (("first", world.first), ("second", world.second)):
        if pinner.holds and (missing := pinner.reach - world.objects):
            return f"the {name} pinner of generation {pinner.generation} lost {missing}"
    return ""


@attrs.frozen
class Scenario:
    """Who takes part. All of them at once would make too many worlds to walk through in a test."""

    claimant: bool = False
    second: bool = False
    passes: int = 1
    flaw: str = ""


def steps(world: World, it: Scenario) -> Iterator[World]:
    """Every world that one more step can lead to."""
    yield from _commit(world)
    yield from _collect(world, 1, world.old, it)
    yield from _pin_head(world, it.flaw)
    if it.claimant:
        yield from _claim(world)
    if world.claimant > 0:
        yield from _collect(world, 2, world.new, it)
    if it.second:
        yield from _pin_record(world, it.flaw)


def _commit(world: World) -> Iterator[World]:
    if world.committer == len(COMMITS):
        return
    what, keys = COMMITS[world.committer]
    after = attrs.evolve(world, committer=world.committer + 1)
    if what == "upload":
        yield attrs.evolve(after, objects=world.objects | keys)
    elif world.head.epoch == 1:  # else it is fenced
        seq = max(int(name.rsplit("-", 2)[1]) for name in keys)
        head = attrs.evolve(
            world.head, generation=world.head.generation + 1, reach=keys, seq=max(seq, world.head.seq)
        )
        yield attrs.evolve(after, head=head)


def _claim(world: World) -> Iterator[World]:
    after = attrs.evolve(world, claimant=world.claimant + 1)
    if world.claimant == 0:
        yield attrs.evolve(after, head=attrs.evolve(world.head, epoch=2, seq=0))
    elif world.claimant == 1:
        yield attrs.evolve(after, objects=world.objects | {T1})
    elif world.claimant == 2:
        reach = frozenset(sorted(world.head.reach)[1:]) | {T1}
        head = attrs.evolve(world.head, generation=world.head.generation + 1, reach=reach, seq=1)
        yield attrs.evolve(after, head=head)


def _collect(world: World, epoch: int, it: Collector, scenario: Scenario) -> Iterator[World]:
    flaw = scenario.flaw

    def to(collector: Collector, **changes: object) -> World:
        return attrs.evolve(world, **{"old" if epoch == 1 else "new": collector}, **changes)  # type: ignore[arg-type]

    pinned = frozenset().union(*(reach for _, _, reach in world.records))
    dead = {name: Dead(generation, 0.0) for name, generation in it.dead}
    if it.at == "look" and it.passes < scenario.passes and world.head.epoch == epoch:
        early = pinned if flaw == "lists too early" else frozenset()
        yield to(attrs.evolve(it, at="floor", dead=_judged(world, epoch, dead, flaw), pinned=early))
    elif it.at == "floor":
        if flaw == "no floor":
            yield to(attrs.evolve(it, at="list"))
        elif world.head.epoch == epoch:  # else it is fenced
            head = attrs.evolve(world.head, floor=max(world.head.floor, floor_for(dead)))
            yield to(attrs.evolve(it, at="list"), head=head)
    elif it.at == "list":
        seen = it.pinned if flaw == "lists too early" else pinned
        doomed = tuple(sorted(deletable(dead, floor_for(dead), seen)))
        yield to(attrs.evolve(it, at="delete", doomed=doomed, pinned=frozenset()))
    elif it.at == "delete":
        if it.doomed:
            gone = it.doomed[0]
            left = frozenset((name, generation) for name, generation in it.dead if name != gone)
            yield to(attrs.evolve(it, doomed=it.doomed[1:], dead=left), objects=world.objects - {gone})
        else:
            yield to(Collector(passes=it.passes + 1, dead=it.dead))


def _judged(world: World, epoch: int, dead: dict[str, Dead], flaw: str) -> frozenset[tuple[str, int]]:
    under_way = frozenset({H2}) if world.committer in (1, 2, 3) else frozenset()
    if epoch == 2 or flaw == "forgets what is under way":
        under_way = frozenset()
    seq = 99 if flaw == "judges what is not committed" else world.head.seq
    docket = Docket()
    docket.dead = dict(dead)
    horizon = Horizon("vm", Owner(epoch, INCARNATION), seq, under_way)
    docket.judge(dict.fromkeys(world.objects, 1), world.head.reach, horizon, world.head.generation, 0.0)
    return frozenset((name, found.generation) for name, found in docket.dead.items())


def _pin_head(world: World, flaw: str) -> Iterator[World]:
    it = world.first
    record = ("first", it.generation, it.reach)
    if it.at == "read":
        seen = attrs.evolve(it, at="write", generation=world.head.generation, reach=world.head.reach)
        yield attrs.evolve(world, first=seen)
    elif it.at == "write":
        yield attrs.evolve(world, first=attrs.evolve(it, at="check"), records=world.records | {record})
    elif it.at == "check":
        now = _head(world.head.epoch, world.head.generation, world.head.floor)
        if flaw == "does not look again" or keeps(_head(1, it.generation, 0), now):
            yield attrs.evolve(world, first=attrs.evolve(it, at="kept", holds=True))
        else:
            yield attrs.evolve(world, first=Pinner(), records=world.records - {record})
    elif it.at == "kept":  # it lets go, sooner or later
        gone = attrs.evolve(it, at="gone", holds=False)
        yield attrs.evolve(world, first=gone, records=world.records - {record})


def _pin_record(world: World, flaw: str) -> Iterator[World]:
    """On the authority of the first one's record, once that is relied on."""
    it = world.second
    record = ("second", it.generation, it.reach)
    if it.at == "read" and world.first.at == "kept":
        seen = attrs.evolve(it, at="write", generation=world.first.generation, reach=world.first.reach)
        yield attrs.evolve(world, second=seen)
    elif it.at == "write":
        yield attrs.evolve(world, second=attrs.evolve(it, at="check"), records=world.records | {record})
    elif it.at == "check":
        if flaw == "trusts the other record" or world.first.at == "kept":
            yield attrs.evolve(world, second=attrs.evolve(it, at="kept", holds=True))
        else:
            gone = attrs.evolve(it, at="gone")
            yield attrs.evolve(world, second=gone, records=world.records - {record})
