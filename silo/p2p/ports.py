"""What a migration needs of the rest of Silo, to be plugged in by the host.

The rooms do not know one another, so none of this names the register, the syncer, the state directory or the
hooks; their drivers fit, directly or through a few lines in the host.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import attrs

from silo.abc import Clock, Transport
from silo.events import MigrationEvent
from silo.p2p.settings import MigrationSettings
from silo.p2p.terms import Standing, Terms, Verdict

__all__ = ["Consent", "Emit", "Guest", "Ownership", "Plugs", "Records", "Site"]

Emit = Callable[[MigrationEvent], None]
"""Takes an event; must not raise or wait."""
Consent = Callable[[MigrationEvent], Awaitable[None]]
"""Asked before a step that observers may veto; raises `SiloError` to do so."""


class Ownership(Protocol):
    """The register and the syncer of one group, as a migration sees them. Without a store there is none."""

    def standing(self) -> Standing:
        """Source: who we are, and which generations the head may show. Synchronous; no network."""

    async def hold_commits(self) -> None:
        """No commit is *begun* any more, until `release_commits`; uploading may go on. Idempotent and quick:
        it need not wait for a commit that is under way, which `standing` then lists."""

    async def release_commits(self) -> None:
        """Commits may be made again, under the epoch that was claimed last. Idempotent."""

    async def store_all(self) -> None:
        """Source: return once everything that is dirty now is committed, even while commits are held otherwise.

        No deadline of its own; `FencedError` when another host owns the group. Cancelled, a commit may be outstanding.
        """

    def uploaded(self) -> tuple[int, bool]:
        """Bytes that have been uploaded so far, and whether there is more under way. For measuring the store."""

    async def write_proof(self) -> str:
        """Source: write a token that only a host with the same store can find. `UnavailableError`."""

    async def check_proof(self, token: str) -> None:
        """Target: raise `InvalidRequestError` unless that token is in the store that we see."""

    async def erase_proof(self, token: str) -> None:
        """Source: the token has served."""

    async def claim(self, terms: Terms) -> int:
        """Target: become the owner under ``terms.nonce``, on the generation that head shows, and return the epoch.

        Repeats until the store has answered; after a cancellation or a restart it may be asked again with the
        same terms, and a claim that was won before is won again. `FencedError` when it cannot be won any more,
        `CorruptionError` when head shows a generation that the terms do not name.
        """

    async def may_have_won(self, terms: Terms) -> bool:
        """Target, when a `claim` was refused: whether an earlier one under the same terms may have been won, by a
        process that died. Asks once, and is true when in doubt.
        """

    async def reclaim(self, terms: Terms, nonce: str) -> Verdict:
        """Source: become the owner again, with an epoch above that of the terms, under our own ``nonce``.

        Repeats until the store has answered; may be asked again after a cancellation or a restart.
        """

    async def has_committed(self, terms: Terms) -> bool:
        """Source: whether whoever claimed under these terms has committed since, which nobody may before everything
        has arrived there (safety rule 1). Asks once; `UnavailableError` when the store does not answer.
        """


class Records(Protocol):
    """Small things that survive a restart, per group. See `silo.statedir.GroupState`."""

    async def read_record(self, name: str) -> bytes | None:
        """The content; ``None`` when there is none. `CorruptionError` when it is damaged."""

    async def write_record(self, name: str, content: bytes) -> None:
        """Durable when this returns. When it raises, either content may be there."""

    async def delete_record(self, name: str) -> None:
        """Durable when this returns; none there is fine."""


class Guest(Protocol):
    """The workload with its deadlines: `silo.hooks.runner.WorkloadRunner`.

    Each call ends with the hook, or with `UnavailableError` when it failed or was overdue; then it may be called
    again. ``spent_s`` is the time that hooks have taken so far.
    """

    spent_s: float

    async def prepare(self) -> None: ...

    async def quiesce(self) -> None: ...

    async def suspend(self) -> None: ...

    async def flush(self) -> None: ...

    async def capture(self) -> bytes: ...

    async def resume(self, state: bytes) -> None: ...

    async def unquiesce(self) -> None: ...

    async def unsuspend(self) -> None: ...

    async def fence(self) -> None: ...


def _tell_nobody(event: MigrationEvent) -> None:
    """Without observers."""


async def _object_never(event: MigrationEvent) -> None:
    """Without observers."""


@attrs.frozen(kw_only=True)
class Site:
    """What a host brings to all of its migrations."""

    host: str
    """A name of this host that its state directory keeps: the other side must meet the same host again."""
    transport: Transport
    clock: Clock
    settings: MigrationSettings = attrs.field(factory=MigrationSettings)


@attrs.frozen(kw_only=True)
class Plugs:
    """What a group brings to one migration."""

    records: Records
    guest: Guest
    ownership: Ownership | None = None
    """``None`` without a store: then the target's state directory decides who owns the group."""
    emit: Emit = _tell_nobody
    consent: Consent = _object_never
    bytes_store: Callable[[], int] = int
    """Target: content pulled from the store so far, for the report."""
