"""The register: the compare-and-swap cell that says who owns a group and what its newest generation is.

A `Register` is one writable opening of one group: it draws an incarnation when it is made. `claim` makes it the
owner; from then on `commit` replaces the head by a newer one, until somebody with a higher epoch has claimed and
`FencedError` says so. What may replace what is decided in `silo.sync.claim`; here is the sending, and the
patience.

An attempt whose outcome is not known stays ``outstanding``: the same bytes are sent, for as long as it takes,
until the store has said one way or the other. Nothing else is tried meanwhile. There is no deadline inside: the
caller brings one, and when it passes (or the caller is cancelled) the attempt remains outstanding and the next
call goes on with it. ``trouble`` shows why it takes so long.

With a lease (`silo.sync.lease`) every request that shows our epoch prolongs it, and `renew` is such a request for
times without commits. A claim that expects an owner's lease to end announces itself in the head and waits.

The store's own retries must be off for ``put_if``; see `silo.abc.ObjectStore`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import attrs
import msgspec

from silo.abc import Clock, ObjectStore
from silo.errors import FencedError, InvalidRequestError, InvariantError, SiloError, UnavailableError
from silo.sync.cipher import KeyRing
from silo.sync.claim import (
    Expectation,
    Owner,
    Verdict,
    build_claim,
    check_successor,
    judge_claim,
    judge_commit,
    judge_other,
    owner_of,
    refusal,
)
from silo.sync.head import Head, Intent, PartRef, VolumeInfo, WriterState, encode_head, parse_head
from silo.sync.layout import head_key, parse_segment_key, proof_key
from silo.sync.lease import Lease, wait_s
from silo.sync.retry import STORE_TROUBLE, Backoff, Trouble, bounded
from silo.sync.settings import RetrySettings

__all__ = ["Prepare", "Register"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

Prepare = Callable[[Owner, str], Awaitable[None]]
"""Called with the owner that is about to be claimed, and the claim's nonce, before the claim may take effect."""


@attrs.frozen
class _Found:
    head: Head
    etag: str
    started: float
    """`Clock.boottime` when it was asked for."""


@attrs.frozen
class _Attempt:
    head: Head
    body: bytes
    match: str | None
    defends: bool = False
    """It only takes an intent out of the head."""


class Register:
    """See the module. Calls may be made concurrently; those that write take turns."""

    def __init__(
        self,
        store: ObjectStore,
        group: str,
        clock: Clock,
        settings: RetrySettings | None = None,
        *,
        lease_s: float | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        self.group = group
        self.incarnation = clock.token(8).hex()
        self.head: Head | None = None
        """The head as this owner last claimed or committed it."""
        self.lease = Lease(lease_s) if lease_s is not None else None
        """What is known of our right to serve; ``None`` when it ends only with another claim."""
        self._keys = keys
        self._store = store
        self._clock = clock
        self._settings = settings or RetrySettings()
        self._key = head_key(group)
        self._etag = ""
        self._turn = asyncio.Lock()
        self._backoff = Backoff(clock, self._settings)
        self._outstanding: _Attempt | None = None
        self._claiming: _Attempt | None = None
        self._intent: _Attempt | None = None
        self._announced = self._outwaited = False
        self._fenced: FencedError | None = None

    # ---- what is known ----------------------------------------------------------------------------------

    @property
    def owner(self) -> Owner | None:
        """Who we are, once a claim was won."""
        return owner_of(self.head) if self.head else None

    @property
    def outstanding(self) -> Head | None:
        """The commit whose outcome is not known, if there is one."""
        return self._outstanding.head if self._outstanding else None

    @property
    def trouble(self) -> Trouble | None:
        """Why the attempt under way is being repeated."""
        return self._backoff.trouble

    async def read(self) -> Head | None:
        """The head as the store has it now; ``None`` when the group does not exist. Changes nothing here.

        One request: `UnavailableError` when it fails, `CorruptionError` when it is not a head of this group.
        """
        found = await self._get()
        return found.head if found else None

    async def confirm(self) -> Head:
        """Read the head and raise `FencedError` when it names another owner, `CorruptionError` when it is gone or an
        older one. One request, as `read`."""
        if self.head is None:
            raise InvariantError(f"group {self.group} was never claimed here")
        async with self._turn:
            found = await self._get()
            if found is None:
                raise self._refusal(Verdict.FOREIGN, found)
            if owner_of(found.head) != owner_of(self.head):
                raise self._refusal(judge_other(self.head, found.head), found)
            self._confirm_lease(found)
            return self.head

    async def renew(self) -> Head:
        """Look at the head, and take a claimant's intent out of it, so that the lease goes on.

        One read, unless a commit is outstanding or there is an intent; then as `commit`, and the caller brings the
        deadline. Raises as `confirm`.
        """
        async with self._turn:
            if self._outstanding is not None:
                return await self._settle()
            if self._fenced is not None:
                raise self._fenced
            if self.head is None:
                raise InvariantError(f"group {self.group} was never claimed here")
            found = await self._get()
            verdict = judge_commit(
                self.head, found.head if found else None, unchanged=False, over=self.head.owners_nonce
            )
            if found is None or verdict not in (Verdict.APPLIED, Verdict.REBASE):
                raise self._refusal(verdict, found)
            if found.head.intent is None:
                self._confirm_lease(found)
                return self.head
            self._begin_commit(self.head, over=found.etag, defends=True)
            return await self._settle()

    def _confirm_lease(self, found: _Found) -> None:
        """The head shows our epoch. It proves nothing any more when a claimant has announced itself meanwhile."""
        if self.lease is not None and found.head.intent is None:
            self.lease.confirmed(found.started)

    # ---- claiming ---------------------------------------------------------------------------------------

    async def claim(
        self,
        expectation: Expectation,
        *,
        volumes: Sequence[VolumeInfo] = (),
        nonce: str | None = None,
        prepare: Prepare | None = None,
    ) -> Head:
        """Become the owner, over a head that ``expectation`` allows, and return the head that says so.

        ``volumes`` are those that are here: a new group gets them, an old one must have no others or differently
        shaped ones (`InvalidRequestError`). ``nonce`` names the claim in the head for as long as the epoch
        lasts; a target uses the one of its handover again after a restart. ``prepare`` is awaited before each
        attempt under another epoch, so that the caller can make durable what a restart must know.

        `FencedError` when another owner is found, `CorruptionError` when the head is missing, older than one that was
        seen before, or shows another generation than expected; nothing was written then. Repeats as long as the store
        does not answer. After a cancellation the outcome may be unknown: call again, on this register, with the
        same arguments.
        Claiming again as the owner makes a new epoch, with the same incarnation.
        """
        async with self._turn:
            if self._fenced is not None:
                raise self._fenced
            if self._outstanding is not None:
                await self._settle()
            claim_nonce = nonce or self._clock.token(16).hex()
            while True:
                try:
                    head = await self._try_claim(expectation, volumes, claim_nonce, prepare)
                except UnavailableError as error:
                    await asyncio.sleep(self._backoff.failed(error))
                    continue
                if head is not None:
                    return head
                raced = UnavailableError(f"the head of {self.group} changed while it was being claimed")
                await asyncio.sleep(self._backoff.failed(raced))

    async def _try_claim(
        self,
        expectation: Expectation,
        volumes: Sequence[VolumeInfo],
        claim_nonce: str,
        prepare: Prepare | None,
    ) -> Head | None:
        """One look and one attempt; ``None`` when the head changed in between."""
        found = await self._get()
        attempted = owner_of(self._claiming.head) if self._claiming else None
        verdict = judge_claim(expectation, attempted, found.head if found else None)
        if verdict is Verdict.APPLIED and found is not None:
            return self._adopt(found)
        if verdict is Verdict.FENCED and expectation.after_lease and found is not None:
            found = await self._outwait(found)
            if found is None:
                return None
            verdict = Verdict.SEND
        if verdict is not Verdict.SEND:
            self._claiming = None
            raise refusal(verdict, self.group, found.head if found else None)
        attempt = self._claiming
        if attempt is None or attempt.match != (found.etag if found else None):
            # Either the first attempt, or the head that the last one was built on is gone, and with it every
            # chance of that attempt.
            head = build_claim(
                self.group,
                expectation,
                self.incarnation,
                found.head if found else None,
                nonce=self._clock.token(16).hex(),
                claim_nonce=claim_nonce,
                volumes=volumes,
                now=self._clock.wall(),
                lease_s=self.lease.lease_s if self.lease else None,
                keys=self._keys,
            )
            if prepare is not None and owner_of(head) != attempted:
                await prepare(owner_of(head), claim_nonce)
            attempt = self._claiming = _Attempt(head, encode_head(head), found.etag if found else None)
        started = self._clock.boottime()
        etag = await self._put(attempt)
        return None if etag is None else self._adopt(_Found(attempt.head, etag, started))

    async def _outwait(self, found: _Found) -> _Found | None:
        """Announce ourselves in the head that was found, and return it as it is then, after the lease of its owner has
        ended. ``None``: the head changed before we were in it. `FencedError` when the owner has answered."""
        lease_s = found.head.lease_s
        if lease_s is None:
            raise self._no_lease(found.head)
        intent = self._intent
        if intent is not None and found.head.nonce != intent.head.nonce and self._announced:
            self._intent = None
            self._announced = self._outwaited = False
            raise FencedError(
                f"group {self.group} belongs to a host that lives: it has renewed its lease",
                hint="move the group from there, or stop the daemon there",
            )
        if intent is None or (found.head.nonce != intent.head.nonce and intent.match != found.etag):
            announced = msgspec.structs.replace(
                found.head,
                nonce=self._clock.token(16).hex(),
                intent=Intent(self.incarnation, found.head.owners_nonce),
            )
            intent = self._intent = _Attempt(announced, encode_head(announced), found.etag)
        if found.head.nonce != intent.head.nonce:
            etag = await self._put(intent)
            if etag is None:
                return None
            found = _Found(intent.head, etag, found.started)
        self._announced = True
        if not self._outwaited:
            logger.info("group %s: waiting %g s for the lease of its owner", self.group, wait_s(lease_s))
            await asyncio.sleep(wait_s(lease_s))
            self._outwaited = True
        return found

    def _no_lease(self, head: Head) -> FencedError:
        return FencedError(
            f"group {self.group} belongs to another writer, which serves without a lease: epoch {head.epoch}, "
            f"incarnation {head.incarnation}",
            hint="only the assertion that its host is dead can take it: --host-is-dead, host_is_dead=True",
        )

    # ---- committing -------------------------------------------------------------------------------------

    async def commit(self, following: Head) -> Head:
        """Replace the head by ``following``, which gets a fresh nonce, and return what was committed.

        `FencedError` when another owner is found, now and for ever after; `CorruptionError` when the head was
        changed or removed by hand. Repeats as long as the store does not answer or refuses. After a cancellation the
        outcome may be unknown: ``outstanding`` shows it, and `settle` finds it out.
        """
        async with self._turn:
            if self._fenced is not None:
                raise self._fenced
            if self.head is None:
                raise InvariantError(f"group {self.group} was never claimed here")
            if self._outstanding is not None and self._outstanding.defends:
                await self._settle()  # it changes nothing that the commit was made from
            if self._outstanding is not None:
                raise InvariantError("a commit was tried while the outcome of another one is not known")
            check_successor(self.head, following)
            self._begin_commit(following, over=self._etag)
            return await self._settle()

    def _begin_commit(self, following: Head, *, over: str, defends: bool = False) -> None:
        head = msgspec.structs.replace(following, nonce=self._clock.token(16).hex(), intent=None)
        self._outstanding = _Attempt(head, encode_head(head), over, defends)

    async def settle(self) -> Head:
        """Find out what became of the outstanding commit, if there is one, and return the head as it is then.

        Raises as `commit`. A caller that knows the generation that it tried to commit sees in the returned head
        whether it was: only this owner can have raised it.
        """
        async with self._turn:
            if self._outstanding is not None:
                return await self._settle()
            if self._fenced is not None:
                raise self._fenced
            if self.head is None:
                raise InvariantError(f"group {self.group} was never claimed here")
            return self.head

    async def release(self, resume: PartRef | None = None) -> Head:
        """Commit that everything is stored and that anybody may open the group. As `commit`; twice is harmless.

        ``resume`` is the saved state of a workload that was stopped before the newest cut was taken. Without it the
        head keeps what it has, which is right as long as nothing was committed since.
        """
        head = await self.settle()
        if head.state is WriterState.RELEASED:
            return head
        seq = head.seq if resume is None else max(head.seq, parse_segment_key(resume.key).seq)
        released = msgspec.structs.replace(
            head, state=WriterState.RELEASED, resume=resume or head.resume, seq=seq
        )
        return await self.commit(released)

    async def _settle(self) -> Head:
        attempt = self._outstanding
        if attempt is None:
            raise InvariantError("there is no outstanding commit")
        while True:
            started = self._clock.boottime()
            try:
                etag = await self._put(attempt)
                if etag is not None:
                    return self._adopt(_Found(attempt.head, etag, started))
                found = await self._get()
            except STORE_TROUBLE as error:
                await asyncio.sleep(self._backoff.failed(error))
                continue
            unchanged = found is not None and found.etag == attempt.match
            over = self.head.owners_nonce if self.head else ""
            verdict = judge_commit(
                attempt.head, found.head if found else None, unchanged=unchanged, over=over
            )
            if verdict is Verdict.APPLIED and found is not None:
                return self._adopt(found)
            if verdict is Verdict.REBASE and found is not None:
                # What it was built on is gone for ever, so the same bytes cannot be applied twice.
                attempt = self._outstanding = attrs.evolve(attempt, match=found.etag)
                continue
            if verdict is Verdict.SEND:
                refusal = UnavailableError(
                    f"the store refused to replace the head of {self.group}, which is unchanged"
                )
                await asyncio.sleep(self._backoff.failed(refusal))
                continue
            self._outstanding = None
            raise self._refusal(verdict, found)

    def _refusal(self, verdict: Verdict, found: _Found | None) -> SiloError:
        error = refusal(verdict, self.group, found.head if found else None)
        if isinstance(error, FencedError):
            self._fenced = error
        return error

    def _adopt(self, found: _Found) -> Head:
        self.head, self._etag = found.head, found.etag
        self._outstanding = self._claiming = self._intent = None
        self._announced = self._outwaited = False
        self._backoff.succeeded()
        self._confirm_lease(found)
        return found.head

    # ---- proof that two hosts see one register ------------------------------------------------------------

    async def write_proof(self) -> str:
        """Write a token where only a host with the same store can read it, and return the token.

        `UnavailableError` when the store does not answer. The caller erases the proof after its use.
        """
        token = self._clock.token(16).hex()
        await self._bounded(lambda: self._store.put(proof_key(self.group, token), [token.encode()]))
        return token

    async def check_proof(self, token: str) -> None:
        """Raise `InvalidRequestError` unless another host has written this token to the store that we see."""
        key = proof_key(self.group, token)
        found = await self._bounded(lambda: self._store.get(key))
        if found is None or bytes(found.data) != token.encode():
            raise InvalidRequestError(
                f"the other host keeps group {self.group} in another store",
                hint="give both hosts the same store URL, bucket and prefix included",
            )

    async def erase_proof(self, token: str) -> None:
        """Delete a proof. One that is gone is no error."""
        await self._bounded(lambda: self._store.delete([proof_key(self.group, token)]))

    # ---- requests -----------------------------------------------------------------------------------------

    async def _get(self) -> _Found | None:
        started = self._clock.boottime()
        found = await self._bounded(lambda: self._store.get(self._key))
        return None if found is None else _Found(parse_head(found.data, self.group), found.etag, started)

    async def _put(self, attempt: _Attempt) -> str | None:
        return await self._bounded(lambda: self._store.put_if(self._key, [attempt.body], match=attempt.match))

    async def _bounded(self, call: Callable[[], Awaitable[T]]) -> T:
        return await bounded(call, self._settings.request_timeout_s)
