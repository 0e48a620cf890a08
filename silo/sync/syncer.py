"""The syncer of one group: takes cuts, has them uploaded, commits them, at the pace that the RPO asks for.

One *cycle* is: when a lot is dirty, upload most of it ahead of the cut (`silo.sync.ahead`); take the cut; upload it;
wait until commits are not held; compare-and-swap the head. It ends with the cut committed or abandoned; abandoned,
all of its chunks are dirty again, so a failure never loses one. While the store does not answer, or refuses what it
took before, a cycle goes on trying, which the status shows. What ends it is something that trying on cannot mend: old
content was lost because room ran out, the local disk failed. Then the next cycle begins with a fresh cut, after a
delay that grows, and after the head has been seen to be still ours.

A *hold* keeps commits back while there must be none: at the source of a migration from the offer on, at the
target until everything has arrived (safety rule 1). While there is a hold no cut is taken either, because a
cut from before the last arrival is a state that never existed.

`FencedError` ends everything: the gate fails, so that the guest cannot go on writing what nobody will keep. An idle
group would never learn of it, so one that seems to have been stopped for a while (its process, or its machine) looks
at the head before it goes on.

`Syncer.run` is the one long call, in a task of whoever opened the syncer; the other calls may be made from any
task of the same loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter
from typing import Self

from silo.abc import Clock, ObjectStore
from silo.errors import (
    ClosedError,
    FencedError,
    InvariantError,
    SiloError,
    UnavailableError,
)
from silo.frozen import Cut
from silo.group import Group
from silo.sync.ahead import Forerunner
from silo.sync.amendments import Amendments
from silo.sync.cipher import KeyRing
from silo.sync.claim import check_volumes, owner_of
from silo.sync.committer import Committer, volume_infos
from silo.sync.head import PartRef
from silo.sync.manifest import Manifest
from silo.sync.planner import DrainRate, Pace, guest_limit
from silo.sync.reader import StoreReader
from silo.sync.register import Register
from silo.sync.retry import Backoff, Trouble
from silo.sync.savedstate import write_state
from silo.sync.settings import FetchSettings, SyncSettings
from silo.sync.status import SyncPhase, SyncStatus
from silo.sync.traffic import Traffic

__all__ = ["Syncer", "volume_infos"]

logger = logging.getLogger(__name__)

THROTTLE = "rpo"
"""Our name among those who may slow a guest down."""
PAUSE_S = 10.0
"""Whoever wakes so much too late was stopped, and may have been declared dead."""


class Syncer:
    """See the module. Made by `open`, ended by `close`; in between `run` must be running."""

    def __init__(
        self,
        group: Group,
        register: Register,
        store: ObjectStore,
        manifest: Manifest,
        clock: Clock,
        settings: SyncSettings,
        directory: str | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.manifest = manifest
        """The newest generation, kept up to date: what a `silo.sync.store_source` should read through."""
        self.settings = settings
        self._group = group
        self._register = register
        self._clock = clock
        self._committer = Committer(group, register, store, manifest, clock, settings, directory, traffic)
        self._drain = DrainRate()
        self._ahead = Forerunner(group, self._committer.upload_ahead, settings)
        self._pace = Pace(settings.rpo_s)
        self._backoff = Backoff(clock, settings.retry)
        age_s = max(0.0, clock.wall() - manifest.head.cut_time)
        self._covered_at = clock.monotonic() - age_s
        self._last_take = self._covered_at
        self._phase = SyncPhase.WAITING
        self._holds: Counter[str] = Counter()
        self._begun = self._done = self._wanted = 0
        self._abandoned = 0
        self._error: BaseException | None = None
        self._limit: asyncio.Timeout | None = None
        self._closing = self._ended = self._was_stopped = False
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()

    @classmethod
    async def open(
        cls,
        group: Group,
        register: Register,
        store: ObjectStore,
        clock: Clock,
        settings: SyncSettings | None = None,
        *,
        fetch: FetchSettings | None = None,
        reader: StoreReader | None = None,
        directory: str | None = None,
        keys: KeyRing | None = None,
    ) -> Self:
        """A syncer for a group that ``register`` has claimed.

        ``reader`` is the one that guests' reads go through, to which uploads give way; without it one is made.
        ``directory`` takes temporary files (the map of a large disk); on a tmpfs they count as memory. Raises
        `InvalidRequestError` when the volumes are not those that the store knows (new ones may be added), and as
        `Manifest.open`. Nothing is left behind then, or after a cancellation.
        """
        if register.head is None:
            raise InvariantError(f"group {group.name} was never claimed here")
        if register.head.seq:
            raise InvariantError(
                "a syncer needs a claim of its own", hint="it would use keys for a second time"
            )
        check_volumes(register.head, volume_infos(group))
        reader = reader or StoreReader(store, clock, fetch, keys=keys)
        manifest = await Manifest.open(register.head, reader, directory=directory)
        for info in volume_infos(group):
            if register.head.volume(info.name) is None:
                manifest.add(info)
        return cls(
            group, register, store, manifest, clock, settings or SyncSettings(), directory, reader.traffic
        )

    # ---- for everybody ------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """The newest committed generation."""
        return self.manifest.head.generation

    @property
    def amendments(self) -> Amendments:
        """What the next commit shall change beside the content. `sync_now` makes it come at once."""
        return self._committer.amendments

    @property
    def under_way(self) -> frozenset[str]:
        """Keys of objects that are stored, or being stored, and in no head yet."""
        return self._committer.under_way

    @property
    def sent_bytes(self) -> int:
        """Bytes that were uploaded since `open`."""
        return self._committer.sender.sent_bytes

    async def amend_hot(self, data: bytes) -> None:
        """Store a list of first reads (`silo.sync.hotlist`), which the next commit names."""
        self.amendments.hot = await self._committer.store_part(data)

    def retire(self, segments: frozenset[str]) -> None:
        """As `Committer.retire`: chunks in these segments are stored again when they are in a cut."""
        self._committer.retire(segments)

    @property
    def status(self) -> SyncStatus:
        """Everything that can be seen from outside. Cheap, but not free: it counts dirty chunks."""
        trouble = self._trouble()
        now = self._clock.monotonic()
        return SyncStatus(
            phase=self._phase,
            epoch=self.manifest.head.epoch,
            generation=self.generation,
            cut_time=self.manifest.head.cut_time,
            rpo_s=now - self._covered_at,
            target_s=self.settings.rpo_s,
            rate_bps=self._drain.rate_bps,
            exposed_bytes=self._group.exposed_bytes,
            backlog_bytes=self._group.backlog_bytes,
            copied_bytes=self._group.cut.copied_bytes if self._group.cut else 0,
            holds=tuple(self._holds),
            error=str(trouble.error) if trouble else "",
            attempts=trouble.attempts if trouble else 0,
            failing_s=now - trouble.since if trouble else 0.0,
            cuts=self._done,
            abandoned_cuts=self._abandoned,
            sent_bytes=self._committer.sender.sent_bytes,
            sent_objects=self._committer.sender.sent_objects,
            elided_chunks=self._committer.elided_chunks,
            window=self._committer.sender.window.limit,
        )

    def _trouble(self) -> Trouble | None:
        found = self._register.trouble or self._committer.sender.trouble or self._backoff.trouble
        error = self._error or self._committer.map_error
        if found is None and isinstance(error, SiloError):
            return Trouble(error, 1, self._clock.monotonic())
        return found

    def look(self) -> None:
        """Called about once a second: let the guest be slowed down, or go on, as the backlog demands."""
        limit = None
        if self.settings.throttle and self.generation and self._error is None:
            limit = guest_limit(
                exposed=self._group.exposed_bytes, rate_bps=self._drain.rate_bps, rpo_s=self.settings.rpo_s
            )
        self._group.throttle.limit(THROTTLE, limit)

    def hold(self, reason: str) -> None:
        """From now on nothing is committed, until each hold was released. A commit that is already being sent may
        still go through: `Register.outstanding` shows it."""
        self._holds[reason] += 1

    def release_hold(self, reason: str) -> None:
        """Take back one `hold` for the same reason."""
        if not self._holds[reason]:
            raise InvariantError(f"commits were not held for {reason!r}")
        self._holds -= Counter((reason,))
        self._notify()

    async def sync_now(self) -> int:
        """Take a cut now, and return the generation that holds it once it is committed.

        When nothing was dirty that is the present one. Waits as long as it takes, behind holds and failures too:
        the caller brings the deadline. `FencedError` or `ClosedError` when there will be no more commits.
        """
        ticket = self._wanted = self._begun + 1
        self._wake.set()
        return await self._wait_done(ticket)

    async def wait_stored(self) -> int:
        """Return once everything that was acknowledged before this call is committed, without hurrying the pace.

        Waits and raises as `sync_now`.
        """
        if self._group.exposed_bytes == 0:
            return self.generation
        return await self._wait_done(self._begun + 1)

    async def wait_cycle(self) -> int:
        """Return once a cut taken after this call is committed, or found to have nothing to commit, at its own pace.

        Waits and raises as `sync_now`.
        """
        return await self._wait_done(self._begun + 1)

    async def _wait_done(self, ticket: int) -> int:
        while self._done < ticket:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise ClosedError(f"the syncer of group {self._group.name} is closed")
            await self._progress.wait()
        return self.generation

    async def save_state(self, state: bytes) -> PartRef:
        """Store the state of a workload, for `Register.release`. As `silo.sync.savedstate.write_state`."""
        return await write_state(
            self._committer.sender, owner_of(self.manifest.head), state, self.manifest.keys
        )

    async def close(self, *, drain: bool = True, release: bool = True) -> None:
        """Store what is dirty, say in the head that anybody may open the group, and end `run`.

        Without ``drain`` it ends as it is; without ``release`` the group stays ours. The caller has stopped the
        guest before. `UnavailableError` with the number of exposed bytes when not everything could be stored in
        ``drain_timeout_s``; then, and after a cancellation, the syncer is closed all the same.
        """
        try:
            if drain and self._error is None and not self._ended:
                async with asyncio.timeout(self.settings.drain_timeout_s):
                    self._closing = True
                    await self.sync_now()
                    await self._wait_ended()
                    if release:
                        await self._register.release()
        except TimeoutError:
            raise UnavailableError(
                f"{self._group.exposed_bytes} bytes of group {self._group.name} are not stored",
                hint="they are on the local disk; open the group here again to store them",
            ) from None
        finally:
            self._closing = True
            if self._limit is not None and not self._ended:
                # Ends `run` wherever it waits, and leaves its task to whoever owns it.
                self._limit.reschedule(asyncio.get_running_loop().time())
                await self._wait_ended()
            self._committer.give_back()
            self._committer.close()
            self.manifest.close()

    async def _wait_ended(self) -> None:
        while not self._ended:
            await self._progress.wait()

    # ---- the cycle ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Sync until `close`. Returns after a `FencedError` too; every other failure of ours is raised."""
        if self._limit is not None:
            raise InvariantError("a syncer was run twice")
        try:
            async with asyncio.timeout(None) as self._limit:
                while await self._wait_due():
                    await self._try_cycle()
        except TimeoutError:
            if not self._closing:
                raise
        except FencedError as error:
            self._error = error
            self._phase = SyncPhase.FENCED
            self._group.gate.fail(error)
            logger.warning("group %s: %s", self._group.name, error)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._ended = True
            self._group.throttle.limit(THROTTLE, None)
            if self._error is None:
                self._phase = SyncPhase.CLOSED
            self._notify()

    async def _wait_due(self) -> bool:
        """Wait until the next cut is due. False when there is to be none."""
        while True:
            if self._closing and self._done >= self._wanted:
                return False
            wanted = self._wanted > self._begun or self._done < self._begun
            due = self._last_take if wanted else self._pace.next_cut(self._last_take)
            left_s = due - self._clock.monotonic()
            if not self._holds and left_s <= 0:
                return True
            self._phase = SyncPhase.HELD if self._holds else SyncPhase.WAITING
            self._wake.clear()
            expected = math.inf if self._holds else self._clock.boottime() + left_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self._holds else left_s):
                    await self._wake.wait()
            self._was_stopped |= self._clock.boottime() > expected + PAUSE_S

    async def _try_cycle(self) -> None:
        begun = self._begun
        try:
            await self._cycle()
        except (FencedError, InvariantError, ClosedError):
            raise
        except SiloError as error:
            self._committer.abandoned()
            self._phase = SyncPhase.FAILING
            if self._backoff.trouble is None:
                what = "a cut was abandoned" if self._begun > begun else "no cut could be taken"
                logger.warning("group %s: %s: %s", self._group.name, what, error)
            self._abandoned += self._begun - begun
            await asyncio.sleep(self._backoff.failed(error))

    async def _cycle(self) -> None:
        """One cut, committed; or abandoned, with the reason raised."""
        if self._backoff.trouble is not None or self._was_stopped:
            # Before old content is protected again: does the store answer, and is the group still ours?
            await self._register.confirm()
            self._was_stopped = False
        started, exposed = self._clock.monotonic(), self._group.exposed_bytes
        self._phase = SyncPhase.AHEAD
        await self._ahead.run(lambda: not self._holds)
        if self._holds:
            return
        self._committer.begin()
        cut = self._group.take()
        self._begun += 1
        self._last_take = cut.time_monotonic
        try:
            if self._committer.is_idle(cut):
                cut.commit()
            else:
                await self._store(cut)
                took_s = self._clock.monotonic() - started
                self._pace.took(took_s)
                self._drain.took(exposed, took_s)
        except BaseException:
            cut.abandon()
            raise
        self._covered_at = cut.time_monotonic
        self._backoff.succeeded()
        self._done = self._begun
        self._notify()

    async def _store(self, cut: Cut) -> None:
        self._phase = SyncPhase.UPLOADING
        checkpoint = await self._committer.upload(cut)
        while self._holds:
            # No deadline: whoever holds commits brings one. Every chunk is captured, so no guest waits for this.
            self._phase = SyncPhase.HELD
            self._wake.clear()
            await self._wake.wait()
        self._phase = SyncPhase.COMMITTING
        await self._committer.commit(cut, checkpoint)

    def _notify(self) -> None:
        self._wake.set()
        self._progress.set()
        self._progress = asyncio.Event()
