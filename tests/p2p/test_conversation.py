"""Which frame may follow which, and whose fault it is when one may not."""

from __future__ import annotations

import pytest

from silo.errors import LocalProtocolError, RemoteProtocolError
from silo.p2p.conversation import CONVERSATION, Conversation, Phase, Side
from silo.p2p.messages import Lane, Stage
from silo.p2p.wire import FrameType

K = FrameType


class Pair:
    """Two conversations back to back: every send is also a receipt."""

    def __init__(self) -> None:
        self.ends = {side: Conversation(side) for side in Side}

    def say(self, side: Side, *types: FrameType) -> Phase:
        for type_ in types:
            self.ends[side].sent(type_)
            (other,) = (end for end in self.ends.values() if end.side is not side)
            other.rcvd(type_)
        assert self.ends[Side.SOURCE].phase is self.ends[Side.TARGET].phase
        return self.ends[side].phase

    def welcome(self, lane: Lane, stage: Stage) -> None:
        self.say(Side.SOURCE, K.HELLO)
        self.say(Side.TARGET, K.WELCOME)
        for end in self.ends.values():
            end.welcomed(lane, stage)


def test_a_whole_migration_on_one_connection():
    """Greeting, offer, rounds, handover, the rest, and the end."""
    pair = Pair()
    pair.welcome(Lane.BULK, Stage.NEW)
    assert pair.say(Side.SOURCE, K.OFFER, K.PING) is Phase.OFFERED
    assert pair.say(Side.TARGET, K.PING, K.ACCEPT) is Phase.COPYING
    pair.say(Side.SOURCE, K.HEAT, K.INVALIDATE, K.ZEROS, K.CHUNK)
    pair.say(Side.TARGET, K.ACK)
    assert pair.say(Side.SOURCE, K.PART, K.HANDOVER) is Phase.HANDED
    pair.say(Side.SOURCE, K.CHUNK, K.ZEROS, K.DRAINED)
    pair.say(Side.TARGET, K.ACK, K.AT_WORK, K.TAKEN, K.NEED, K.NEED_END, K.EVACUATED)
    assert pair.say(Side.SOURCE, K.RELEASED) is Phase.HANDED


@pytest.mark.parametrize("stage", list(Stage))
def test_a_connection_goes_on_where_the_target_is(stage):
    """The welcome says how far the target is; a demand lane is only for demands."""
    pair = Pair()
    pair.welcome(Lane.BULK, stage)
    assert pair.ends[Side.SOURCE].phase.value == stage.value
    pair = Pair()
    pair.welcome(Lane.DEMAND, stage)
    assert pair.say(Side.TARGET, K.WANT) is Phase.DEMAND
    assert pair.say(Side.SOURCE, K.CHUNK, K.UNAVAILABLE) is Phase.DEMAND


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("side", list(Side))
def test_whatever_is_not_in_the_table_is_somebodys_fault(phase, side):
    """For each frame in each phase: allowed on both ends, or our bug when sent and the peer's when received."""
    allowed = {type_ for type_ in FrameType if (phase, side, type_) in CONVERSATION}
    for type_ in FrameType:
        sender = Conversation(side)
        receiver = Conversation(Side.TARGET if side is Side.SOURCE else Side.SOURCE)
        sender.phase = receiver.phase = phase
        if type_ in allowed:
            sender.sent(type_)
            receiver.rcvd(type_)
            assert sender.phase is receiver.phase
        else:
            with pytest.raises(LocalProtocolError):
                sender.sent(type_)
            with pytest.raises(RemoteProtocolError):
                receiver.rcvd(type_)
            assert sender.phase is receiver.phase is phase


def test_after_a_refusal_nothing_is_said():
    """A closed connection has no frames."""
    pair = Pair()
    pair.say(Side.SOURCE, K.HELLO)
    assert pair.say(Side.TARGET, K.REFUSED) is Phase.CLOSED
    assert not any(phase is Phase.CLOSED for phase, _, _ in CONVERSATION)


def test_a_welcome_is_looked_at_once():
    """The stage may not be changed later."""
    pair = Pair()
    pair.welcome(Lane.BULK, Stage.COPYING)
    with pytest.raises(LocalProtocolError):
        pair.ends[Side.SOURCE].welcomed(Lane.BULK, Stage.HANDED)
