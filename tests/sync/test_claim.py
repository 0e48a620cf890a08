"""The decisions of the register, as tables: every situation and what follows from it."""

from __future__ import annotations

import attrs
import msgspec
import pytest

from silo.errors import CorruptionError, FencedError, InvalidRequestError, InvariantError
from silo.sync.claim import (
    Expectation,
    Owner,
    Seen,
    Verdict,
    build_claim,
    check_successor,
    judge_claim,
    judge_commit,
    owner_of,
    refusal,
)
from silo.sync.head import ClaimRecord, Head, VolumeInfo, WriterState

A, B, C = "aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb", "cccccccccccccccc"
VOLUMES = (VolumeInfo("disk", 1 << 20, 65536, 512),)


def head(epoch: int = 5, incarnation: str = A, generation: int = 7, **changes: object) -> Head:
    made = Head(
        version=1,
        incompat=0,
        group="vm1",
        epoch=epoch,
        incarnation=incarnation,
        nonce=f"{epoch}-{generation}",
        generation=generation,
        seq=generation,
        cut_time=1.0,
        state=WriterState.OPEN,
        volumes=VOLUMES,
        segments=(),
        claim=ClaimRecord("offer-1", epoch - 1, 3),
    )
    return msgspec.structs.replace(made, **changes)


ATTEMPT = head(generation=8, nonce="mine")


@pytest.mark.parametrize(
    ("found", "unchanged", "verdict"),
    [
        (ATTEMPT, False, Verdict.APPLIED),
        (head(generation=7), True, Verdict.SEND),
        (head(generation=7), False, Verdict.FOREIGN),
        (head(generation=8, nonce="other"), False, Verdict.FOREIGN),
        (head(epoch=6, incarnation=B), False, Verdict.FENCED),
        (head(epoch=5, incarnation=B), False, Verdict.FENCED),
        (head(epoch=4, incarnation=A), False, Verdict.ROLLED_BACK),
        (head(epoch=6, incarnation=A), False, Verdict.FENCED),
        (None, False, Verdict.FOREIGN),
    ],
)
def test_after_a_refused_commit(found: Head | None, unchanged: bool, verdict: Verdict) -> None:
    """Fenced only by another owner; adopted by nonce; sent again only over the same object."""
    assert judge_commit(ATTEMPT, found, unchanged=unchanged) is verdict


OPEN_HERE = Expectation.opening(Owner(5, A), Owner(6, B))
OPEN_NEW = Expectation.opening()
HANDOVER = Expectation.handover(Owner(5, A), (7, 8), "offer-2")


@pytest.mark.parametrize(
    ("expectation", "found", "verdict"),
    [
        # a host that remembers: its own head, or the claim that it attempted before it died
        (OPEN_HERE, head(), Verdict.SEND),
        (OPEN_HERE, head(generation=99), Verdict.SEND),
        (OPEN_HERE, head(epoch=6, incarnation=B), Verdict.SEND),
        (OPEN_HERE, head(epoch=6, incarnation=A), Verdict.FENCED),
        (OPEN_HERE, head(epoch=6, incarnation=C), Verdict.FENCED),
        (OPEN_HERE, head(epoch=6, incarnation=C, state=WriterState.RELEASED), Verdict.FENCED),
        (OPEN_HERE, None, Verdict.FOREIGN),
        (Expectation.opening(Owner(5, A), nonces=["offer-1"]), head(epoch=9, incarnation=C), Verdict.SEND),
        # a host that remembers nothing
        (OPEN_NEW, None, Verdict.SEND),
        (OPEN_NEW, head(), Verdict.FENCED),
        (OPEN_NEW, head(state=WriterState.RELEASED), Verdict.SEND),
        # the target of a migration
        (HANDOVER, head(generation=7), Verdict.SEND),
        (HANDOVER, head(generation=8), Verdict.SEND),
        (HANDOVER, head(generation=6), Verdict.FOREIGN),
        (HANDOVER, head(generation=9), Verdict.FOREIGN),
        (HANDOVER, head(epoch=6, incarnation=A), Verdict.FENCED),
        (HANDOVER, head(epoch=6, incarnation=C), Verdict.FENCED),
        (HANDOVER, head(epoch=6, incarnation=C, claim=ClaimRecord("offer-2", 5, 7)), Verdict.SEND),
        (HANDOVER, head(epoch=6, incarnation=C, claim=None), Verdict.FENCED),
        (HANDOVER, None, Verdict.FOREIGN),
        # whoever has seen more than there is
        (attrs.evolve(OPEN_HERE, seen=Seen(5, 7)), head(), Verdict.SEND),
        (attrs.evolve(OPEN_HERE, seen=Seen(5, 8)), head(), Verdict.ROLLED_BACK),
        (attrs.evolve(OPEN_HERE, seen=Seen(5, 8)), head(epoch=6, incarnation=B, generation=1), Verdict.SEND),
        (attrs.evolve(OPEN_HERE, seen=Seen(6, 1)), head(generation=9), Verdict.ROLLED_BACK),
        (HANDOVER, head(epoch=4, incarnation=C), Verdict.ROLLED_BACK),
        (Expectation.restoring((), Seen(6), forced=True), head(), Verdict.ROLLED_BACK),
        (Expectation.restoring((), Seen(6), forced=True), None, Verdict.FOREIGN),
        # a host that has nothing of the group but perhaps the memory of an attempt
        (Expectation.restoring([Owner(6, B)], Seen()), None, Verdict.SEND),
        (Expectation.restoring([Owner(6, B)], Seen()), head(state=WriterState.RELEASED), Verdict.SEND),
        (Expectation.restoring([Owner(6, B)], Seen()), head(epoch=6, incarnation=B), Verdict.SEND),
        (Expectation.restoring([Owner(6, B)], Seen()), head(), Verdict.FENCED),
        (Expectation.restoring([Owner(6, B)], Seen(), forced=True), head(), Verdict.SEND),
        # by force
        (Expectation.force(), head(epoch=77, incarnation=C), Verdict.SEND),
        (Expectation.force(), None, Verdict.SEND),
    ],
)
def test_before_a_claim(expectation: Expectation, found: Head | None, verdict: Verdict) -> None:
    """A claim goes only over a head that the claimant expected."""
    assert judge_claim(expectation, None, found) is verdict


def test_a_claim_of_unknown_outcome_is_recognised() -> None:
    """What was attempted and is found was won, whatever else was expected."""
    for expectation in (OPEN_HERE, OPEN_NEW, HANDOVER, Expectation.force()):
        found = head(epoch=6, incarnation=C)
        assert judge_claim(expectation, Owner(6, C), found) is Verdict.APPLIED


def build(expectation: Expectation, found: Head | None, volumes: tuple[VolumeInfo, ...] = VOLUMES) -> Head:
    return build_claim(
        "vm1", expectation, C, found, nonce="n", claim_nonce="offer-2", volumes=volumes, now=12.0
    )


def test_a_claim_changes_only_the_ownership() -> None:
    """What is stored stays; the epoch goes above every epoch that was ever seen."""
    found = head(state=WriterState.RELEASED, gc_floor=4)
    claimed = build(HANDOVER, found)
    assert owner_of(claimed) == Owner(6, C)
    assert claimed == msgspec.structs.replace(
        found,
        epoch=6,
        incarnation=C,
        nonce="n",
        seq=0,
        state=WriterState.OPEN,
        claim=ClaimRecord("offer-2", 5, 7),
    )
    assert build(Expectation.force(epoch_floor=41), found).epoch == 42
    forced = build(Expectation.force(), found).claim
    assert forced is not None
    assert forced.forced


def test_a_claim_creates_a_group() -> None:
    created = build(OPEN_NEW, None)
    assert (created.epoch, created.generation, created.volumes, created.root) == (1, 0, VOLUMES, None)
    with pytest.raises(InvalidRequestError):
        build(OPEN_NEW, None, ())


@pytest.mark.parametrize(
    ("volumes", "fits"),
    [
        (VOLUMES, True),
        ((*VOLUMES, VolumeInfo("new", 512, 4096, 512)), True),
        ((), True),
        ((VolumeInfo("other", 1 << 20, 65536, 512),), False),
        ((VolumeInfo("disk", 1 << 21, 65536, 512),), False),
        ((VolumeInfo("disk", 1 << 20, 4096, 512),), False),
        ((VolumeInfo("disk", 1 << 20, 65536, 4096),), False),
    ],
)
def test_a_claim_needs_the_same_volumes(volumes: tuple[VolumeInfo, ...], fits: bool) -> None:
    """A host with other disks is refused before it takes the group from anybody."""
    if fits:
        assert build(HANDOVER, head(), volumes).volumes == VOLUMES
    else:
        with pytest.raises(InvalidRequestError):
            build(HANDOVER, head(), volumes)


@pytest.mark.parametrize(
    ("changes", "sound"),
    [
        ({"generation": 8}, True),
        ({"generation": 7, "state": WriterState.RELEASED}, True),
        ({"generation": 8, "seq": 12}, True),
        ({"generation": 9}, False),
        ({"generation": 6}, False),
        ({"generation": 8, "seq": 6}, False),
        ({"generation": 8, "epoch": 6}, False),
        ({"generation": 8, "incarnation": B}, False),
        ({"generation": 8, "group": "vm2"}, False),
        ({"generation": 8, "claim": None}, False),
        ({"generation": 8, "gc_floor": -1}, False),
    ],
)
def test_what_may_follow_a_head(changes: dict[str, object], sound: bool) -> None:
    """One generation at a time, by the same owner, and nothing goes backwards."""
    following = msgspec.structs.replace(head(), **changes)
    if sound:
        check_successor(head(), following)
    else:
        with pytest.raises(InvariantError):
            check_successor(head(), following)


def test_refusals_say_what_was_found() -> None:
    fenced = refusal(Verdict.FENCED, "vm1", head(epoch=6, incarnation=B))
    assert isinstance(fenced, FencedError)
    assert "epoch 6" in str(fenced)
    assert B in str(fenced)
    gone = refusal(Verdict.FOREIGN, "vm1", None)
    assert isinstance(gone, CorruptionError)
    assert "is gone" in str(gone)
    assert "generation 7" in str(refusal(Verdict.FOREIGN, "vm1", head()))
