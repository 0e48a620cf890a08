"""One group's link to its store: who owns it, what is stored, and where absent chunks come from.

Puts the rooms of ``sync`` together for the host: the register claims, the syncer commits, the reader and the
source bring chunks back. The order of a life::

    open ──► claim_opening | claim (a handover) ──► start: the syncer runs, the source follows it ──► close

Before a claim, on the target of a migration, the source reads the generation that the head shows; from `start` on
it resolves every chunk through the syncer's own, current map (safety rule 17).

It is also what a migration sees of all this: `silo.p2p.ports.Ownership`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import attrs

from silo.abc import Buffer, ChunkSource, Clock, ObjectStore
from silo.chunkmap import RESIDENCY_MASK, ChunkMap, Indices, Residency, runs_of
from silo.errors import FencedError, InvariantError, SiloError, UnavailableError
from silo.group import Group
from silo.p2p.terms import Standing, Terms, Verdict
from silo.sync.caretaker import Caretaker
from silo.sync.cipher import KeyRing
from silo.sync.claim import Expectation, Owner
from silo.sync.counted_store import CountedStore
from silo.sync.head import Head, PartRef, VolumeInfo
from silo.sync.hotlist import parse_hot
from silo.sync.lease_keeper import LeaseKeeper
from silo.sync.manifest import Manifest
from silo.sync.probe import probe_store
from silo.sync.reader import StoreReader
from silo.sync.register import Prepare, Register
from silo.sync.restore import mark_absent
from silo.sync.savedstate import read_state
from silo.sync.settings import FetchSettings, SyncSettings
from silo.sync.status import SyncPhase, SyncStatus
from silo.sync.store_source import StoreSource
from silo.sync.syncer import Syncer

__all__ = ["StoreLink"]

MIGRATION_HOLD = "migration"


class CurrentSource(ChunkSource):
    """The store, but only while it is known which generation is the newest.

    A claim may find a newer generation than the one that was looked at before it; what the handover leaves to the
    store is as new as the claimed head. So from the claim until its map is open, fetches wait.
    """

    def __init__(self) -> None:
        self.inner: StoreSource | None = None
        self.is_current = asyncio.Event()

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        """As the port says. Waits without a deadline for the map, which is asked for until it is there."""
        await self.is_current.wait()
        if self.inner is None:
            raise InvariantError("a generation counts as known whose map was never opened")
        return await self.inner.fetch(volume, chunk, demand=demand)


class StoreLink:
    """See the module. Made by `open`; belongs to the group's event loop."""

    def __init__(
        self,
        name: str,
        store: ObjectStore,
        clock: Clock,
        *,
        prepare: Prepare,
        owns_store: bool,
        sync: SyncSettings | None,
        fetch: FetchSettings | None,
        directory: str | None,
        keys: KeyRing | None,
    ) -> None:
        self._keys = keys
        self.store = CountedStore(store)
        self.opened_at = clock.monotonic()
        self.reader = StoreReader(self.store, clock, fetch, keys=keys)
        self.register = Register(self.store, name, clock, lease_s=sync.lease_s if sync else None, keys=keys)
        self.syncer: Syncer | None = None
        self._group: Group | None = None
        self._clock = clock
        self._prepare = prepare
        self._owns_store = owns_store
        self._sync = sync or SyncSettings()
        self._directory = directory
        self._source = CurrentSource()
        self._early: Manifest | None = None
        self._holds: set[str] = set()
        self._run: asyncio.Task[None] | None = None
        self.caretaker: Caretaker | None = None
        self.may_tidy: Callable[[], bool] = lambda: True
        """Whether the group stays here, so that its store may be tidied."""
        self._caring: asyncio.Task[None] | None = None
        self._keeper: LeaseKeeper | None = None
        self._keeping: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        name: str,
        store: ObjectStore,
        clock: Clock,
        *,
        prepare: Prepare,
        owns_store: bool,
        sync: SyncSettings | None = None,
        fetch: FetchSettings | None = None,
        directory: str | None = None,
        keys: KeyRing | None = None,
    ) -> Self:
        """Look whether the store is fit to be written to. `InvalidRequestError` when it is not.

        ``prepare`` writes down durably whom a claim is about to make the owner; it is awaited before every claim.
        ``owns_store``: `close` closes the store, and so does this when it raises. ``directory`` takes temporary
        files. ``keys`` encrypt a new group, and are needed for one that is encrypted.
        """
        link = cls(
            name,
            store,
            clock,
            prepare=prepare,
            owns_store=owns_store,
            sync=sync,
            fetch=fetch,
            directory=directory,
            keys=keys,
        )
        try:
            await probe_store(store, clock, prefix=f"{name}/")
        except BaseException:
            await link.close(drain=False)
            raise
        return link

    # ---- opening ------------------------------------------------------------------------------------------

    async def claim_opening(self, expectation: Expectation, volumes: Sequence[VolumeInfo]) -> Head:
        """Become the owner of a group whose head is as expected. As `Register.claim`."""
        return await self.register.claim(expectation, volumes=volumes, prepare=self._prepare)

    async def look(self) -> Head | None:
        """The head as it is now, without claiming; its generation becomes readable through `attach`."""
        head = await self.register.read()
        if head is not None and head.generation:
            await self._forget_early()
            self._early = await Manifest.open(head, self.reader, directory=self._directory)
        return head

    def mark_absent(self, name: str, chunks: ChunkMap, *, device_is_zero: bool) -> None:
        """Set the residency of every chunk from the generation that `look` found."""
        if self._early is None:
            raise InvariantError("a generation was used before it was looked at")
        mark_absent(self._early, name, chunks, device_is_zero=device_is_zero)

    def attach(self, group: Group) -> None:
        """Let absent chunks of the group come from the store: from the generation that `look` found, if it found one,
        else from the one that is claimed. With a lease, nobody is served from now on without it."""
        if self._keeper is None and self.register.lease is not None:
            self._keeper = LeaseKeeper(
                group.name, self.register.lease, self.register, group.gate, self._clock
            )
        for volume in group.volumes.values():
            volume.set_source(Residency.ABSENT_STORE, self._source)
        if self._early is not None:
            self._resolve_through(self._early)

    def _resolve_through(self, manifest: Manifest) -> None:
        """From now on this is the newest generation."""
        if self._source.inner is None:
            self._source.inner = StoreSource(manifest, self.reader)
        self._source.inner.manifest = manifest
        self._source.is_current.set()

    def fill_known_zeros(self, group: Group) -> None:
        """What is absent, and known to be zero in the store, need not be asked for chunk by chunk."""
        manifest = self.syncer.manifest if self.syncer is not None else self._early
        if manifest is None:
            return
        for volume in group.volumes.values():
            if manifest.head.volume(volume.name) is None:
                continue
            for first, limit, stored in manifest.volume(volume.name).runs():
                if stored:
                    continue
                absent = volume.chunks.select(RESIDENCY_MASK, Residency.ABSENT_STORE, first, limit)
                for run in runs_of(absent):
                    volume.fill_zeros_nowait(*run)

    async def start(self, group: Group, tasks: asyncio.TaskGroup) -> None:
        """After a claim: keep the store up to date, until `close`. Commits start held while a migration holds."""
        if self.syncer is not None:
            return
        self._group = group
        if self._keeper is not None and self._keeping is None:
            self._keeping = tasks.create_task(self._keeper.run())
        syncer = await Syncer.open(
            group,
            self.register,
            self.store,
            self._clock,
            self._sync,
            reader=self.reader,
            directory=self._directory,
            keys=self._keys,
        )
        for reason in self._holds:
            syncer.hold(reason)
        self.syncer = syncer
        self.attach(group)
        self._resolve_through(syncer.manifest)
        await self._forget_early()
        self._run = tasks.create_task(syncer.run())
        self.caretaker = Caretaker(
            group, syncer, self.store, self.reader, self._clock, may_work=lambda: self.may_tidy()
        )
        self._caring = tasks.create_task(self.caretaker.run())

    async def _forget_early(self) -> None:
        early, self._early = self._early, None
        if early is not None:
            early.close()

    async def save_state(self, state: bytes) -> PartRef:
        """Store the state of a workload that stands still, for `close`."""
        if self.syncer is None:
            raise UnavailableError(
                "nothing is kept in the store yet", hint="try again when the group is running"
            )
        return await self.syncer.save_state(state)

    async def read_state(self, head: Head) -> bytes:
        """The state of a workload that this head names, verified."""
        return await read_state(self.reader, head)

    async def close(self, *, drain: bool = True, release: bool = True, resume: PartRef | None = None) -> None:
        """Store what is dirty and let go, as `Syncer.close`; then give everything back. Twice is harmless.

        ``resume``: everything is stored, and the head shall name this state as it lets go. That is tried for as long
        as the store does not answer, because nobody else can end it.
        """
        try:
            if self._caring is not None:
                self._caring.cancel()
                await asyncio.wait((self._caring,))
            if self.syncer is not None:
                try:
                    await self.syncer.close(drain=drain, release=release and resume is None)
                except UnavailableError:
                    if resume is None:
                        raise
                if self._run is not None:
                    await asyncio.wait((self._run,))
                if resume is not None:
                    await self.register.release(resume)
        finally:
            if self._keeping is not None:
                self._keeping.cancel()
            self.syncer = self.caretaker = None
            await self._forget_early()
            inner, self._source.inner = self._source.inner, None
            if inner is not None:
                await inner.aclose()
            if self._owns_store:
                await self.store.aclose()

    # ---- seeing -------------------------------------------------------------------------------------------

    @property
    def status(self) -> SyncStatus | None:
        """As `Syncer.status`; ``None`` while nothing is synced."""
        return self.syncer.status if self.syncer is not None else None

    @property
    def tidying(self) -> dict[str, Any] | None:
        """What the collector has done, and saw last, as plain values; ``None`` while nothing is synced."""
        if self.caretaker is None:
            return None
        report = self.caretaker.report
        return {
            "error": self.caretaker.error,
            **attrs.asdict(self.caretaker.totals),
            "last_pass": attrs.asdict(report) if report is not None else None,
        }

    async def first_reads(self) -> Mapping[str, Indices]:
        """The chunks that were read first after an earlier start, as far as is known. Raises as `Manifest.open`."""
        manifest = self.syncer.manifest if self.syncer is not None else self._early
        hot = manifest.head.hot if manifest is not None else None
        if hot is None:
            return {}
        data = await self.reader.read(hot.key, hot.offset, hot.length, demand=False)
        if data is None:
            return {}
        opened, digest = self.reader.unseal(data, hot)
        return parse_hot(opened, digest=digest)

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came from the store."""
        return self._source.inner.fetched_bytes if self._source.inner is not None else 0

    # ---- what a migration asks (silo.p2p.ports.Ownership) -------------------------------------------------

    def standing(self) -> Standing:
        """Who we are, and which generations the head may show."""
        head = self.register.head
        if head is None:
            raise InvariantError("a group that was never claimed was about to be offered")
        outstanding = self.register.outstanding
        generations = (head.generation, outstanding.generation) if outstanding else (head.generation,)
        return Standing(head.epoch, head.incarnation, generations)

    async def hold_commits(self) -> None:
        """No commit is begun any more."""
        self.hold(MIGRATION_HOLD)

    @property
    def flush_timeout_s(self) -> float:
        """As `SyncSettings.flush_timeout_s`."""
        return self._sync.flush_timeout_s

    @property
    def holds_commits(self) -> bool:
        """Whether a migration or an import keeps commits back."""
        return bool(self._holds)

    async def release_commits(self) -> None:
        """Commits may be made again."""
        self.release_hold(MIGRATION_HOLD)

    def hold(self, reason: str) -> None:
        """No commit is begun, now or after `start`, until `release_hold` for the same reason. Twice is harmless."""
        if reason not in self._holds:
            self._holds.add(reason)
            if self.syncer is not None:
                self.syncer.hold(reason)

    def release_hold(self, reason: str) -> None:
        """The reason is gone; harmless when there was none."""
        if reason in self._holds:
            self._holds.discard(reason)
            if self.syncer is not None:
                self.syncer.release_hold(reason)

    async def store_all(self) -> None:
        """Commit what is dirty now. A hold of ours is lifted for as long as that takes."""
        if self.syncer is None:
            raise UnavailableError(
                "nothing is kept in the store yet", hint="try again when the group is running"
            )
        was_held = MIGRATION_HOLD in self._holds
        await self.release_commits()
        try:
            await self.syncer.sync_now()
        finally:
            if was_held:
                await self.hold_commits()

    def uploaded(self) -> tuple[int, bool]:
        """Bytes uploaded so far, and whether an upload is under way."""
        status = self.status
        return (status.sent_bytes, status.phase is SyncPhase.UPLOADING) if status else (0, False)

    async def write_proof(self) -> str:
        """A token that only a host with the same store can find."""
        return await self.register.write_proof()

    async def check_proof(self, token: str) -> None:
        """Raise `InvalidRequestError` unless the token is in our store."""
        await self.register.check_proof(token)

    async def erase_proof(self, token: str) -> None:
        """The token has served."""
        await self.register.erase_proof(token)

    async def claim(self, terms: Terms) -> int:
        """Target: take the group over under ``terms.nonce``. Returns the new epoch."""
        source = Owner(terms.epoch, terms.incarnation)
        expectation = Expectation.handover(source, terms.generations, terms.nonce)
        self._source.is_current.clear()
        head = await self.register.claim(expectation, nonce=terms.nonce, prepare=self._prepare)
        if self._early is not None and self._early.head.generation == head.generation:
            self._source.is_current.set()
        return head.epoch

    async def may_have_won(self, terms: Terms) -> bool:
        """Target: whether the owner that the head names came after anybody but the source."""
        try:
            head = await self.register.read()
        except SiloError:
            return True
        return head is None or head.claim is None or head.claim.previous_epoch != terms.epoch

    async def reclaim(self, terms: Terms, nonce: str) -> Verdict:
        """Source: have the group back, unless somebody has claimed it."""
        own = Owner(terms.epoch, terms.incarnation)
        owners = {own} | ({self.register.owner} if self.register.owner else set())
        expectation = Expectation.opening(*owners, nonces=(nonce,))
        try:
            await self.register.claim(expectation, nonce=nonce, prepare=self._prepare)
        except FencedError:
            head = await self.register.read()
            claimed = head is not None and head.claim is not None and head.claim.nonce == terms.nonce
            return Verdict.LOST if claimed else Verdict.FENCED
        return Verdict.WON

    async def has_committed(self, terms: Terms) -> bool:
        """Source: whether the target has committed after its claim."""
        head = await self.register.read()
        if head is None or head.claim is None or head.claim.nonce != terms.nonce:
            return False
        return head.generation > max(terms.generations)


def without_secrets(url: str) -> str:
    """A store's URL as it may be written down: the place, and nothing that could carry a secret."""
    return url.partition("?")[0]
