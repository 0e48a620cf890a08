"""Who may run the guest: the tables of both sides of a handover.

Two rules of this file. Everything about the order of a handover is in these tables, and nothing else is: no
I/O, no time, no bytes. And the drivers (`silo.p2p.source`, `silo.p2p.target`) do what the tables say and decide
nothing about ownership themselves; ``tests/model`` walks every world that the tables allow, with messages lost,
repeated, late and out of order, with either process dying and coming back between any two effects, and with a
third claimant.

A *state* has *duties*: effects that are carried out in order, each of which may fail, and after each of which
the process may die. The duties end with an event (`DONE` unless the last effect says otherwise), messages from
the other side are events as well, and ``(state, event)`` gives the next state. A pair that is not in the table is
impossible: from ourselves it is a bug, from the peer a violation of the protocol.

The third party is the **arbiter**. With a store it is the register: both sides ask it for epoch + 1 by
compare-and-swap, each with a claim nonce of its own, and at most one gets it. Without a store the
arbiter is the target's state directory: the target claims by writing there, and the source gets its group back
only when the target says that it has not claimed and never will.

What keeps two guests from running, in terms of the tables:

* ``SEND_HANDOVER`` comes after ``WRITE_OFFER``, ``SUSPEND`` and ``CLOSE_GATE``; and from ``OFFERED`` on the only way
  to ``UNSUSPEND`` leads through ``RECLAIM``, even when the target says that it declines (safety rule 3).
* ``CLAIM`` comes after ``WRITE_HANDOVER``, and ``OPEN_GATE`` and ``RESUME`` after a ``CLAIM`` that was won (rule 2).
* A source that finds its offer on disk starts in ``RECLAIMING``, a target that finds the handover starts in
  ``CLAIMING``: both ask the arbiter again, and asking twice with the same nonce gives the same answer.
* Commits are held from before the offer until the claim is decided on one side, and from before the claim until
  every chunk has arrived on the other (rule 1). A hold dies with its process, so each restart takes it anew.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, Generic, TypeVar

import attrs

from silo.errors import InvariantError

__all__ = [
    "SOURCE",
    "TARGET",
    "Effect",
    "Event",
    "Machine",
    "Mark",
    "SourceState",
    "State",
    "Table",
    "TargetState",
]


class SourceState(enum.Enum):
    """Where the source of a migration stands."""

    COPYING = "copying"
    """Pre-copy: the guest runs here."""
    OFFERING = "offering"
    """About to stop the guest. From here on a restart asks the arbiter."""
    SUSPENDING = "suspending"
    OFFERED = "offered"
    """The handover may be on its way: only the arbiter knows who owns the group."""
    RECLAIMING = "reclaiming"
    """No answer, or a refusal: asking the arbiter to have the group back. The guest stays suspended."""
    RESUMING = "resuming"
    """The group is ours again, or was never given away."""
    SERVING = "serving"
    """The target owns the group; here is a chunk server with a closed gate."""
    RELEASING = "releasing"
    RELEASED = "released"
    """Final: nothing here is needed any more."""
    ABORTED = "aborted"
    """Final: the guest runs here as before."""
    FENCED = "fenced"
    """Final: somebody else owns the group. The data stays, and nothing serves it."""


class TargetState(enum.Enum):
    """Where the target of a migration stands."""

    RECEIVING = "receiving"
    """Pre-copy. Nothing here is durable, and a restart forgets it."""
    RECORDING = "recording"
    CLAIMING = "claiming"
    """The handover is on disk: asking the arbiter. A restart continues here."""
    RESUMING = "resuming"
    """The group is ours."""
    RUNNING = "running"
    """Post-copy: the guest runs here, some of its chunks are still at the source."""
    EVACUATING = "evacuating"
    """Every chunk is durable here; writing that down."""
    EVACUATED = "evacuated"
    """Telling the source, until it has understood."""
    FINISHED = "finished"
    """Final: an ordinary group."""
    DISCARDING = "discarding"
    DISCARDED = "discarded"
    """Final: there never was a migration."""
    FENCED = "fenced"
    """Final: somebody has taken the group away, perhaps after its guest ran here. What is here is kept, unserved."""


class Mark(enum.Enum):
    """What a side has on disk about a migration. It decides where a restarted process begins."""

    OFFERED = "offered"
    RELEASED = "released"
    HANDED = "handed"
    EVACUATED = "evacuated"


class Effect(enum.Enum):
    """What a side does. The drivers carry it out, the model says what it means."""

    # source
    COPY = "copy"
    HOLD_COMMITS = "hold commits"
    WRITE_OFFER = "write offer"
    SUSPEND = "suspend"
    CLOSE_GATE = "close gate"
    FLUSH = "flush"
    SEND_HANDOVER = "send handover"
    AWAIT_ANSWER = "await answer"
    RECLAIM = "reclaim"
    SERVE = "serve"
    WRITE_RELEASED = "write released"
    UNSUSPEND = "unsuspend"
    DROP_OFFER = "drop offer"
    # both
    OPEN_GATE = "open gate"
    FAIL_GATE = "fail gate"
    RELEASE_COMMITS = "release commits"
    # target
    INSTALL = "install"
    APPLY_HANDOVER = "apply handover"
    """Chunks whose newest content has not come become absent. Once: later the guest may have written them."""
    WRITE_HANDOVER = "write handover"
    SETTLE_MAPS = "settle maps"
    """What is absent is at the peer or in the store; what was not committed is dirty. Harmless when repeated."""
    CLAIM = "claim"
    RESUME = "resume"
    SEND_TAKEN = "send taken"
    PULL = "pull"
    FLUSH_INSTALLED = "flush installed"
    WRITE_EVACUATED = "write evacuated"
    SEND_EVACUATED = "send evacuated"
    DROP_HANDOVER = "drop handover"
    SEND_RELEASED = "send released"
    SEND_DECLINED = "send declined"
    SEND_WITHDRAW = "send withdraw"


class Event(enum.Enum):
    """What moves a machine on."""

    DONE = "done"
    """The duties of the state are carried out."""
    FAILED = "failed"
    """One of them could not be, or the embedder or an observer wants to stop."""
    # the arbiter's answers
    WON = "won"
    LOST = "lost"
    """The other side of this migration owns the group."""
    FENCED = "fenced"
    """A third party does."""
    # patience
    TIMEOUT = "timeout"
    # messages
    HANDOVER = "handover"
    TAKEN = "taken"
    DECLINED = "declined"
    WITHDRAW = "withdraw"
    EVACUATED = "evacuated"
    RELEASED = "released"


S, T, V, F = SourceState, TargetState, Event, Effect
State = TypeVar("State", SourceState, TargetState)


@attrs.frozen
class Table(Generic[State]):
    """One side: what each state does, and where each event leads."""

    duties: Mapping[State, tuple[Effect, ...]]
    steps: Mapping[tuple[State, Event], State]
    start: State
    restart: Mapping[Mark, State]
    """Where a process begins that finds this on disk. Without a mark there is no migration."""
    final: frozenset[State]


SOURCE: Final = Table(
    duties={
        S.COPYING: (F.COPY,),
        S.OFFERING: (F.HOLD_COMMITS, F.WRITE_OFFER),
        S.SUSPENDING: (F.SUSPEND, F.CLOSE_GATE, F.FLUSH),
        S.OFFERED: (F.SEND_HANDOVER, F.AWAIT_ANSWER),
        S.RECLAIMING: (F.HOLD_COMMITS, F.RECLAIM),
        S.RESUMING: (F.OPEN_GATE, F.UNSUSPEND, F.RELEASE_COMMITS, F.DROP_OFFER),
        S.SERVING: (F.SERVE,),
        S.RELEASING: (F.WRITE_RELEASED,),
        S.RELEASED: (F.SEND_RELEASED,),
        S.ABORTED: (F.SEND_WITHDRAW,),
        S.FENCED: (F.FAIL_GATE,),
    },
    steps={
        (S.COPYING, V.DONE): S.OFFERING,
        (S.COPYING, V.FAILED): S.ABORTED,
        (S.COPYING, V.DECLINED): S.ABORTED,
        (S.COPYING, V.FENCED): S.FENCED,
        (S.OFFERING, V.DONE): S.SUSPENDING,
        (S.OFFERING, V.FAILED): S.RESUMING,
        (S.OFFERING, V.DECLINED): S.RESUMING,
        (S.OFFERING, V.FENCED): S.FENCED,
        (S.SUSPENDING, V.DONE): S.OFFERED,
        (S.SUSPENDING, V.FAILED): S.RESUMING,
        (S.SUSPENDING, V.DECLINED): S.RESUMING,
        (S.OFFERED, V.TAKEN): S.SERVING,
        (S.OFFERED, V.EVACUATED): S.RELEASING,
        (S.OFFERED, V.DECLINED): S.RECLAIMING,
        (S.OFFERED, V.TIMEOUT): S.RECLAIMING,
        (S.OFFERED, V.FAILED): S.RECLAIMING,
        (S.RECLAIMING, V.WON): S.RESUMING,
        (S.RECLAIMING, V.LOST): S.SERVING,
        (S.RECLAIMING, V.FENCED): S.FENCED,
        (S.RECLAIMING, V.TAKEN): S.SERVING,
        (S.RECLAIMING, V.EVACUATED): S.RELEASING,
        (S.RECLAIMING, V.DECLINED): S.RECLAIMING,
        (S.RECLAIMING, V.FAILED): S.RECLAIMING,
        (S.RESUMING, V.DONE): S.ABORTED,
        (S.RESUMING, V.FAILED): S.RESUMING,
        (S.RESUMING, V.DECLINED): S.RESUMING,
        (S.SERVING, V.TAKEN): S.SERVING,
        (S.SERVING, V.EVACUATED): S.RELEASING,
        (S.SERVING, V.DECLINED): S.RECLAIMING,  # a third party took it from the target: find out
        (S.RELEASING, V.DONE): S.RELEASED,
        (S.RELEASING, V.FAILED): S.RELEASING,
        (S.RELEASING, V.TAKEN): S.RELEASING,
        (S.RELEASING, V.EVACUATED): S.RELEASING,
        (S.RELEASED, V.TAKEN): S.RELEASED,
        (S.RELEASED, V.EVACUATED): S.RELEASED,
        (S.ABORTED, V.DECLINED): S.ABORTED,
    },
    start=S.COPYING,
    restart={Mark.OFFERED: S.RECLAIMING, Mark.RELEASED: S.RELEASED},
    final=frozenset({S.RELEASED, S.ABORTED, S.FENCED}),
)

TARGET: Final = Table(
    duties={
        T.RECEIVING: (F.INSTALL,),
        T.RECORDING: (F.APPLY_HANDOVER, F.WRITE_HANDOVER),
        T.CLAIMING: (F.HOLD_COMMITS, F.SETTLE_MAPS, F.CLAIM),
        T.RESUMING: (F.OPEN_GATE, F.RESUME),
        T.RUNNING: (F.SEND_TAKEN, F.PULL, F.FLUSH_INSTALLED),
        T.EVACUATING: (F.WRITE_EVACUATED, F.RELEASE_COMMITS),
        T.EVACUATED: (F.SEND_EVACUATED,),
        T.FINISHED: (F.DROP_HANDOVER,),
        T.DISCARDING: (F.DROP_HANDOVER,),
        T.DISCARDED: (F.SEND_DECLINED,),
        T.FENCED: (F.FAIL_GATE,),
    },
    steps={
        (T.RECEIVING, V.HANDOVER): T.RECORDING,
        (T.RECEIVING, V.WITHDRAW): T.DISCARDING,
        (T.RECEIVING, V.FAILED): T.DISCARDING,
        (T.RECORDING, V.DONE): T.CLAIMING,
        (T.RECORDING, V.FAILED): T.DISCARDING,
        (T.RECORDING, V.HANDOVER): T.RECORDING,
        (T.RECORDING, V.WITHDRAW): T.RECORDING,
        (T.CLAIMING, V.WON): T.RESUMING,
        (T.CLAIMING, V.LOST): T.DISCARDING,
        (T.CLAIMING, V.FENCED): T.FENCED,
        (T.CLAIMING, V.HANDOVER): T.CLAIMING,
        (T.CLAIMING, V.WITHDRAW): T.CLAIMING,
        (T.RESUMING, V.DONE): T.RUNNING,
        (T.RESUMING, V.FAILED): T.RESUMING,
        (T.RESUMING, V.HANDOVER): T.RESUMING,
        (T.RESUMING, V.WITHDRAW): T.RESUMING,
        (T.RUNNING, V.DONE): T.EVACUATING,
        (T.RUNNING, V.FAILED): T.RUNNING,
        (T.RUNNING, V.HANDOVER): T.RUNNING,
        (T.RUNNING, V.WITHDRAW): T.RUNNING,
        (T.EVACUATING, V.DONE): T.EVACUATED,
        (T.EVACUATING, V.FAILED): T.EVACUATING,
        (T.EVACUATING, V.HANDOVER): T.EVACUATING,
        (T.EVACUATING, V.WITHDRAW): T.EVACUATING,
        (T.EVACUATING, V.RELEASED): T.EVACUATING,  # the source has seen our first commit already
        (T.EVACUATED, V.RELEASED): T.FINISHED,
        (T.EVACUATED, V.HANDOVER): T.EVACUATED,
        (T.EVACUATED, V.WITHDRAW): T.EVACUATED,
        (T.FINISHED, V.RELEASED): T.FINISHED,
        (T.DISCARDING, V.DONE): T.DISCARDED,
        (T.DISCARDING, V.FAILED): T.DISCARDING,
        (T.DISCARDING, V.HANDOVER): T.DISCARDING,
        (T.DISCARDING, V.WITHDRAW): T.DISCARDING,
        (T.DISCARDED, V.HANDOVER): T.DISCARDED,
        (T.DISCARDED, V.WITHDRAW): T.DISCARDED,
    },
    start=T.RECEIVING,
    restart={Mark.HANDED: T.CLAIMING, Mark.EVACUATED: T.EVACUATED},
    final=frozenset({T.FINISHED, T.DISCARDED, T.FENCED}),
)


class Machine(Generic[State]):
    """One side of one migration. Pure: `step` is all it can do."""

    def __init__(self, table: Table[State], state: State | None = None) -> None:
        self.table: Table[State] = table
        self.state: State = table.start if state is None else state

    @property
    def is_final(self) -> bool:
        """Nothing can change any more."""
        return self.state in self.table.final

    @property
    def duties(self) -> tuple[Effect, ...]:
        """What the present state does."""
        return self.table.duties[self.state]

    def accepts(self, event: Event) -> bool:
        """Whether the event is possible now."""
        return (self.state, event) in self.table.steps

    def step(self, event: Event) -> State:
        """Move on and return the new state. `InvariantError` when the event is impossible here."""
        following: State | None = self.table.steps.get((self.state, event))
        if following is None:
            raise InvariantError(
                f"{event.name} cannot happen in {type(self.state).__name__}.{self.state.name}"
            )
        self.state = following
        return following
