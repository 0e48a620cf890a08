"""Which frame may follow which: the peer protocol as a table.

The table does not know which side it is on. Both sides keep a `Conversation` per connection and tell it every frame,
sent or received; what the table does not have is an error of whoever sent it: `LocalProtocolError` for us,
`RemoteProtocolError` for the peer, and only the connection dies.

Bulk lane::

    HELLO ► GREETED ─◄ WELCOME──► NEW ──OFFER►── OFFERED ──◄ ACCEPT──► COPYING ──HANDOVER►── HANDED
                        │ the target's stage says where: ────────────────┴────────────────────┘
                        └ REFUSED ◄ ── closed (as after OFFER)

Demand lane: HELLO, WELCOME, then WANT one way and CHUNK or UNAVAILABLE the other. Push lanes: HELLO, WELCOME, then
CHUNK one way and ACK the other.

What may be said while COPYING and HANDED is not ordered further: every such message is idempotent, and what it
means in each state of a side is in `silo.p2p.handover`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Final

from silo.errors import LocalProtocolError, RemoteProtocolError
from silo.p2p.messages import Lane, Stage
from silo.p2p.wire import FrameType

__all__ = ["CONVERSATION", "Conversation", "Phase", "Side"]


class Side(enum.Enum):
    """Who sends. The source dials, the target listens."""

    SOURCE = "source"
    TARGET = "target"


class Phase(enum.Enum):
    """How far one connection has come."""

    OPENED = "opened"
    GREETED = "greeted"
    NEW = "new"
    OFFERED = "offered"
    COPYING = "copying"
    HANDED = "handed"
    DEMAND = "demand"
    PUSH = "push"
    CLOSED = "closed"


P, K = Phase, FrameType

_Step = tuple[Phase, Side, FrameType]


def _stay(phase: Phase, side: Side, types: Iterable[FrameType]) -> dict[_Step, Phase]:
    return {(phase, side, type_): phase for type_ in types}


CONVERSATION: Final[dict[_Step, Phase]] = {
    (P.OPENED, Side.SOURCE, K.HELLO): P.GREETED,
    (P.GREETED, Side.TARGET, K.WELCOME): P.NEW,  # or where its stage and lane say, see `welcomed`
    (P.GREETED, Side.TARGET, K.REFUSED): P.CLOSED,
    (P.NEW, Side.SOURCE, K.OFFER): P.OFFERED,
    (P.OFFERED, Side.TARGET, K.ACCEPT): P.COPYING,
    (P.OFFERED, Side.TARGET, K.REFUSED): P.CLOSED,
    (P.OFFERED, Side.SOURCE, K.WITHDRAW): P.OFFERED,
    (P.COPYING, Side.SOURCE, K.HANDOVER): P.HANDED,
    **_stay(
        P.COPYING, Side.SOURCE, (K.HEAT, K.INVALIDATE, K.ROUND, K.ZEROS, K.CHUNK, K.PART, K.WITHDRAW)
    ),
    **_stay(P.COPYING, Side.TARGET, (K.ACK, K.DECLINED)),
    **_stay(
        P.HANDED, Side.SOURCE, (K.ZEROS, K.CHUNK, K.WITHDRAW, K.DRAINED, K.RELEASED)
    ),
    **_stay(P.HANDED, Side.TARGET, (K.ACK, K.AT_WORK, K.DECLINED, K.TAKEN, K.NEED, K.NEED_END, K.EVACUATED)),
    **_stay(P.DEMAND, Side.SOURCE, (K.CHUNK, K.UNAVAILABLE)),
    **_stay(P.DEMAND, Side.TARGET, (K.WANT,)),
    **_stay(P.PUSH, Side.SOURCE, (K.CHUNK,)),
    **_stay(P.PUSH, Side.TARGET, (K.ACK,)),
    **{
        (phase, side, K.PING): phase
        for phase in (P.NEW, P.OFFERED, P.COPYING, P.HANDED, P.DEMAND, P.PUSH)
        for side in Side
    },
}  # fmt: skip

_LANES: Final = {Lane.DEMAND: P.DEMAND, Lane.PUSH: P.PUSH}
_STAGES: Final = {Stage.NEW: P.NEW, Stage.COPYING: P.COPYING, Stage.HANDED: P.HANDED}


class Conversation:
    """What has been said on one connection, as far as it decides what may be said next."""

    __slots__ = ("phase", "side")

    def __init__(self, side: Side) -> None:
        self.side = side
        """Ours."""
        self.phase = Phase.OPENED

    def sent(self, type_: FrameType) -> None:
        """We are about to send a frame. `LocalProtocolError` when we may not."""
        following = CONVERSATION.get((self.phase, self.side, type_))
        if following is None:
            raise LocalProtocolError(f"{type_.name} cannot be sent in phase {self.phase.name}")
        self.phase = following

    def rcvd(self, type_: FrameType) -> None:
        """The peer sent a frame. `RemoteProtocolError` when it may not have."""
        other = Side.TARGET if self.side is Side.SOURCE else Side.SOURCE
        following = CONVERSATION.get((self.phase, other, type_))
        if following is None:
            raise RemoteProtocolError(f"the peer sent {type_.name} in phase {self.phase.name}")
        self.phase = following

    def welcomed(self, lane: Lane, stage: Stage) -> None:
        """WELCOME was sent or received: go where its stage and the lane of HELLO lead."""
        if self.phase is not Phase.NEW:
            raise LocalProtocolError(f"the welcome was looked at in phase {self.phase.name}")
        self.phase = _LANES.get(lane) or _STAGES[stage]
