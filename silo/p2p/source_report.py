"""How a migration goes and went, as the source sees it: progress while it runs, and the report."""

from __future__ import annotations

import asyncio
from typing import Never

from silo.abc import Clock
from silo.events import MigrationReport, Outcome, Phase, Progress, SwitchedOver
from silo.p2p.handover import SourceState
from silo.p2p.messages import Evacuated, Taken
from silo.p2p.pusher import Pusher
from silo.p2p.rounds import Rounds
from silo.p2p.signal import Signal
from silo.p2p.watch import Watch

__all__ = ["SourceReport"]

_OUTCOMES = {
    SourceState.RELEASED: Outcome.RELEASED,
    SourceState.ABORTED: Outcome.ABORTED,
    SourceState.FENCED: Outcome.FENCED,
}


class SourceReport:
    """Collects what the report says."""

    def __init__(
        self, migration: bytes, watch: Watch, clock: Clock, rounds: Rounds, pusher: Pusher, progress_s: float
    ) -> None:
        self._migration = migration
        self._watch = watch
        self._clock = clock
        self._rounds = rounds
        self._pusher = pusher
        self._progress_s = progress_s
        self._stopped_at: float | None = None
        self._spent_before = 0.0
        self._downtime_s: float | None = None
        self._workload_s: float | None = None
        self._evacuated_at: float | None = None
        self._bytes_store = 0

    def stopping(self, spent_s: float) -> None:
        """The guest is about to be suspended; its hooks have taken so long up to now."""
        self._stopped_at, self._spent_before = self._clock.monotonic(), spent_s

    def taken(self, message: Taken, spent_s: float) -> None:
        """TAKEN arrived. Only the first one counts, and only in the process that stopped the guest."""
        if self._stopped_at is not None and self._downtime_s is None:
            self._workload_s = spent_s - self._spent_before + message.workload_s
            self._downtime_s = self._clock.monotonic() - self._stopped_at - self._workload_s
            self._watch.tell(
                SwitchedOver,
                downtime_ms=self._downtime_s * 1e3,
                workload_ms=self._workload_s * 1e3,
                bytes_peer=self._pusher.meter.total,
            )

    def evacuated(self, message: Evacuated) -> None:
        """EVACUATED arrived."""
        if self._evacuated_at is None:
            self._evacuated_at = self._clock.monotonic()
            self._bytes_store = message.bytes_store

    async def tell_progress(self, changed: Signal) -> Never:
        """Emit `Progress` while chunks move, and make everybody who waits for time look again."""
        while True:
            await asyncio.sleep(self._progress_s)
            if self._watch.phase in (Phase.PRE_COPY, Phase.FOLLOWING, Phase.STORING, Phase.POST_COPY):
                self._watch.tell(Progress, **self._progress(self._watch.phase))
            changed.notify()

    def _progress(self, phase: Phase) -> dict[str, object]:
        planner = self._rounds.planner
        dirty = self._rounds.dirty_bytes() if phase is not Phase.POST_COPY else 0
        rate = self._pusher.meter.rate_bps(self._clock.monotonic())
        remaining = planner.wanted_bytes + planner.flying_bytes
        return {
            "phase": phase,
            "bytes_peer": self._pusher.meter.total,
            "rate_bps": rate,
            "exposed_bytes": planner.unique_bytes + dirty,
            "remaining_bytes": remaining,
            "eta_s": remaining / rate if rate else None,
        }

    def make(self, state: SourceState, reason: str) -> MigrationReport:
        """The report as of now."""
        phases = self._watch.timings
        evacuated_s = None if self._evacuated_at is None else self._evacuated_at - self._watch.started
        return MigrationReport(
            group=self._watch.group,
            migration=self._migration.hex(),
            outcome=_OUTCOMES.get(state),
            reason="" if state is SourceState.RELEASED else reason,
            phases=phases,
            duration_s=sum(timing.duration_s for timing in phases),
            rounds=self._rounds.count,
            bytes_peer=self._pusher.meter.total,
            bytes_store=self._bytes_store,
            downtime_ms=_ms(self._downtime_s),
            workload_ms=_ms(self._workload_s),
            evacuated_ms=_ms(evacuated_s),
        )


def _ms(duration_s: float | None) -> float | None:
    return None if duration_s is None else duration_s * 1e3
