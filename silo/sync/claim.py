"""Who may replace which head: the decisions of the register, as functions.

A head names its *owner*: an epoch and the incarnation that claimed it. Two things replace a head. A *claim*
makes a new owner, with a higher epoch; it is allowed only over a head that the claimant expected to see (see
`Expectation`). A *commit* is made by the owner itself. Both are attempts: compare-and-swap against the ETag of
the head that they were built on, with a body whose nonce occurs nowhere else.

An attempt may end without anybody knowing whether it was applied. So after every refusal the head is read, and
`judge_commit` or `judge_claim` says what to do next. The rules behind them:

* only another owner fences; a commit of ours that we find there is adopted, however it got there;
* a head older than what was seen before was put back by somebody: nothing is built on it, not even by force;
* as long as the head is still the one that an attempt was built on, that attempt may yet be applied, so the
  same bytes are sent again and nothing else is tried;
* once the head is another one, the attempt can never be applied: its ETag will not come back.

Pure: no I/O, no clock, no randomness.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

import attrs
import msgspec

from silo.errors import CorruptionError, FencedError, InvalidRequestError, InvariantError
from silo.sync.cipher import KeyRing, check_keys
from silo.sync.head import ClaimRecord, Head, VolumeInfo, WriterState
from silo.sync.layout import FEATURE_ENCRYPTED, FORMAT_VERSION

__all__ = [
    "Expectation",
    "Expected",
    "Owner",
    "Seen",
    "Verdict",
    "build_claim",
    "check_successor",
    "check_volumes",
    "judge_claim",
    "judge_commit",
    "judge_other",
    "owner_of",
    "refusal",
]


@attrs.frozen
class Owner:
    """Who writes a group: one incarnation during one epoch."""

    epoch: int
    incarnation: str


def owner_of(head: Head) -> Owner:
    """The owner that a head names."""
    return Owner(head.epoch, head.incarnation)


@attrs.frozen
class Expected:
    """An owner over whose head a claim may go; with ``generations``, only while the head shows one of these."""

    owner: Owner
    generations: frozenset[int] | None = None


@attrs.frozen
class Seen:
    """The newest head that a host has seen: what it wrote down, so perhaps not the very last one."""

    epoch: int = 0
    generation: int = 0
    """Within that epoch."""

    def is_newer_than(self, head: Head) -> bool:
        """Whether ``head`` shows less."""
        return (head.epoch, head.generation) < (
            self.epoch,
            self.generation if head.epoch == self.epoch else 0,
        )


@attrs.frozen(kw_only=True)
class Expectation:
    """Which heads a claim may replace: those that match any of the following.

    The constructors below name the situations in which a group is claimed.
    """

    owned: tuple[Expected, ...] = ()
    """The head names one of these owners."""
    nonces: frozenset[str] = frozenset()
    """The head was claimed under one of these nonces, perhaps by this very host before it restarted."""
    absent: bool = False
    """There is no head: the group is new."""
    released: bool = False
    """The owner stored everything and let go."""
    forced: bool = False
    """Whatever the head says. Somebody asserts that its owner is dead, or that the loss of its writes is meant."""
    after_lease: bool = False
    """An owner with a lease, once that has certainly ended (`silo.sync.lease`)."""
    epoch_floor: int = 0
    """The highest epoch seen anywhere else; the claim goes above it."""
    seen: Seen = Seen()
    """The newest head that was seen for certain. An older one was put back by somebody."""

    @classmethod
    def opening(cls, *owners: Owner, nonces: Iterable[str] = ()) -> Expectation:
        """Opening a group on this host: the owners that its state directory remembers, claims that it only
        attempted among them, and the nonces of such claims. Without any owner, the group must be new or released.
        """
        return cls(
            owned=tuple(Expected(owner) for owner in owners),
            nonces=frozenset(nonces),
            absent=not owners,
            released=not owners,
            epoch_floor=max((owner.epoch for owner in owners), default=0),
        )

    @classmethod
    def restoring(
        cls, owners: Iterable[Owner], seen: Seen, *, forced: bool = False, after_lease: bool = False
    ) -> Expectation:
        """Opening a group of which nothing is on this host, whatever was attempted here before: it must be new,
        released, or ours, unless ``forced``; or ``after_lease``, once the owner's lease has ended."""
        known = tuple(owners)
        return cls(
            owned=tuple(Expected(owner) for owner in known),
            absent=not seen.epoch,
            released=True,
            forced=forced,
            after_lease=after_lease,
            epoch_floor=max((owner.epoch for owner in known), default=0),
            seen=seen,
        )

    @classmethod
    def handover(cls, source: Owner, generations: Iterable[int], nonce: str) -> Expectation:
        """The target of a migration: the source still owns the group, and the head shows a generation that the
        handover named, be it the committed one or the one whose commit was outstanding. Or this target has
        claimed it already, under the ``nonce`` of the same handover, and asks again after a restart."""
        return cls(
            owned=(Expected(source, frozenset(generations)),),
            nonces=frozenset((nonce,)),
            epoch_floor=source.epoch,
            seen=Seen(source.epoch),
        )

    @classmethod
    def force(cls, epoch_floor: int = 0) -> Expectation:
        """Take the group from an owner that is asserted to be dead, or create it."""
        return cls(absent=True, forced=True, epoch_floor=epoch_floor)


class Verdict(enum.Enum):
    """What follows from the head that was found."""

    APPLIED = "applied"
    """The attempt is the head: adopt it."""
    SEND = "send"
    """The attempt may be sent (again); for a claim: build it on the head that was found."""
    FENCED = "fenced"
    """Somebody else owns the group: stop."""
    FOREIGN = "foreign"
    """The head was changed, by somebody who does not play by the rules: do not touch it."""
    REBASE = "rebase"
    """A claimant's intent lies over the head that a commit was built on: send the same bytes over that."""
    ROLLED_BACK = "rolled back"
    """The head is older than one that was seen before: do not touch it."""


def judge_commit(attempt: Head, found: Head | None, *, unchanged: bool, over: str = "") -> Verdict:
    """After a refused commit. ``unchanged``: what was found is the very object that the attempt was built on;
    ``over``: the nonce of our head in it."""
    if found is None:
        return Verdict.FOREIGN
    if found.owners_nonce == attempt.nonce:
        return Verdict.APPLIED
    if owner_of(found) != owner_of(attempt):
        return judge_other(attempt, found)
    if unchanged:
        return Verdict.SEND
    return Verdict.REBASE if found.intent is not None and found.owners_nonce == over else Verdict.FOREIGN


def judge_other(ours: Head, found: Head) -> Verdict:
    """What another owner in the head means for the owner of ``ours``."""
    return Verdict.ROLLED_BACK if found.epoch < ours.epoch else Verdict.FENCED


def judge_claim(expectation: Expectation, attempted: Owner | None, found: Head | None) -> Verdict:
    """Before a claim is sent, and after one whose outcome is not known (``attempted``)."""
    if found is None:
        return Verdict.SEND if expectation.absent else Verdict.FOREIGN
    owner = owner_of(found)
    if owner == attempted:
        return Verdict.APPLIED
    if expectation.seen.is_newer_than(found):
        return Verdict.ROLLED_BACK
    if expectation.forced or (expectation.released and found.state is WriterState.RELEASED):
        return Verdict.SEND
    if found.claim is not None and found.claim.nonce in expectation.nonces:
        return Verdict.SEND
    for expected in expectation.owned:
        if expected.owner == owner:
            fits = expected.generations is None or found.generation in expected.generations
            return Verdict.SEND if fits else Verdict.FOREIGN
    return Verdict.FENCED


def build_claim(
    group: str,
    expectation: Expectation,
    incarnation: str,
    found: Head | None,
    *,
    nonce: str,
    claim_nonce: str,
    volumes: Sequence[VolumeInfo],
    now: float,
    lease_s: float | None = None,
    keys: KeyRing | None = None,
) -> Head:
    """The head with which ``incarnation`` becomes the owner. Only the ownership changes, nothing that is stored.

    ``volumes`` are those that the claimant has: they make a new group, and must fit the head of an old one, which
    keeps its own until the next commit. Without any there is nothing to check.
    """
    if found is not None:
        check_keys(group, found.keys, keys)
        if volumes:
            check_volumes(found, volumes)
    names = _with_current(found.keys if found else (), keys)
    record = ClaimRecord(
        nonce=claim_nonce,
        previous_epoch=found.epoch if found else 0,
        previous_generation=found.generation if found else 0,
        forced=expectation.forced,
    )
    epoch = max(found.epoch if found else 0, expectation.epoch_floor) + 1
    if found is not None:
        return msgspec.structs.replace(
            found,
            epoch=epoch,
            incarnation=incarnation,
            nonce=nonce,
            seq=0,
            state=WriterState.OPEN,
            claim=record,
            lease_s=lease_s,
            intent=None,
            keys=names,
        )
    if not volumes:
        raise InvalidRequestError(f"group {group} does not exist and cannot be created without volumes")
    return Head(
        version=FORMAT_VERSION,
        incompat=FEATURE_ENCRYPTED if names else 0,
        group=group,
        epoch=epoch,
        incarnation=incarnation,
        nonce=nonce,
        generation=0,
        seq=0,
        cut_time=now,
        state=WriterState.OPEN,
        volumes=tuple(volumes),
        segments=(),
        claim=record,
        lease_s=lease_s,
        keys=names,
    )


def _with_current(named: tuple[int, ...], keys: KeyRing | None) -> tuple[int, ...]:
    """The keys that the head must name from now on: before anything is stored under a new one."""
    if keys is None or keys.current in named:
        return named
    return (*named, keys.current)


def check_volumes(head: Head, volumes: Sequence[VolumeInfo]) -> None:
    """Raise `InvalidRequestError` unless all volumes of ``head`` are here, each of the same shape. More may be."""
    here = {volume.name: volume for volume in volumes}
    for volume in head.volumes:
        own = here.get(volume.name)
        if own is None:
            raise InvalidRequestError(
                f"group {head.group} has a volume {volume.name} in the store and not here"
            )
        if own != volume:
            raise InvalidRequestError(
                f"volume {volume.name} has {own.size} bytes in chunks of {own.chunk_size} and blocks of "
                f"{own.block_size} here, but {volume.size}, {volume.chunk_size} and {volume.block_size} in the store"
            )


def check_successor(current: Head, following: Head) -> None:
    """Raise `InvariantError` unless the owner of ``current`` may commit ``following`` on top of it."""
    sound = (
        owner_of(following) == owner_of(current)
        and following.group == current.group
        and following.claim == current.claim
        and following.generation in (current.generation, current.generation + 1)
        and following.seq >= current.seq
        and following.gc_floor >= current.gc_floor
    )
    if not sound:
        raise InvariantError(
            f"generation {following.generation} of epoch {following.epoch} cannot follow "
            f"generation {current.generation} of epoch {current.epoch}"
        )


def refusal(verdict: Verdict, group: str, found: Head | None) -> FencedError | CorruptionError:
    """What to raise for a verdict that forbids writing."""
    if verdict is Verdict.FENCED and found is not None:
        return FencedError(
            f"group {group} belongs to another writer: epoch {found.epoch}, incarnation {found.incarnation}",
            hint="what this host had not stored stays on its disk",
        )
    if verdict is Verdict.ROLLED_BACK and found is not None:
        return CorruptionError(
            f"the head of group {group} was rolled back: it shows epoch {found.epoch}, generation "
            f"{found.generation}, and this host has seen a newer one",
            hint="nothing was overwritten; put the newest version of the head back, or find out whose store this is",
        )
    what = (
        "is gone" if found is None else f"shows generation {found.generation}, which was not expected there"
    )
    return CorruptionError(
        f"the head of group {group} {what}",
        hint="nothing was overwritten; was the store changed by hand, or is it another store than before?",
    )
