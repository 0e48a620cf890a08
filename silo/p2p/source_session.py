"""What the source says and hears on its link: offer, rounds, acknowledgements, and the messages of a handover.

The session turns frames into what they mean for planner and pusher, and messages that matter to the handover into
events of the driver; it decides nothing about ownership. ``stage`` is how far the source has come, and goes
only forward: NEW until the target has accepted, COPYING until the handover is about to be sent, then HANDED.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from silo.chunkmap import Indices, join_indices
from silo.errors import MigrationError, RemoteProtocolError, SiloError, UnavailableError
from silo.events import LinkChanged
from silo.p2p.channel import Channel, LinkRefused
from silo.p2p.handover import Event
from silo.p2p.messages import (
    FEATURE_ZSTD,
    FEATURES,
    PROTOCOL_VERSIONS,
    Accept,
    Ack,
    AtWork,
    Declined,
    Evacuated,
    Hello,
    Lane,
    Message,
    Need,
    NeedEnd,
    Offer,
    Reason,
    Refused,
    Stage,
    Taken,
    Welcome,
    message_set,
)
from silo.p2p.pusher import BULK, Pusher
from silo.p2p.rounds import Rounds
from silo.p2p.watch import Watch

__all__ = ["SourceSession"]


@attrs.define
class _Lane:
    """A connection that is pushed over, or was last."""

    connection: int
    acknowledged: int = 0

    def acknowledged_now(self, pushes: int) -> int:
        """How many pushes are acknowledged by this that were not before."""
        fresh = pushes - self.acknowledged
        if fresh < 0:
            raise RemoteProtocolError("the peer took back an acknowledgement")
        self.acknowledged = pushes
        return fresh

    def fresh(self, welcome: Welcome) -> int:
        """The same, of a connection that broke: what the target says later that it had dealt with."""
        return self.acknowledged_now(welcome.dealt.get(self.connection, self.acknowledged))


class SourceSession:
    """See the module. A `silo.p2p.source_link.LinkUser`."""

    def __init__(
        self,
        host: str,
        group: str,
        migration: bytes,
        rounds: Rounds,
        pusher: Pusher,
        watch: Watch,
        post: Callable[[Event, SiloError | None], None],
        note: Callable[[Taken | Evacuated], None],
    ) -> None:
        self.stage = Stage.NEW
        self.target_host: str | None = None
        """The host that accepted; no other may answer for it."""
        self.generation: int | None = None
        self.proof = ""
        self.is_declined = False
        """The target has said that it never claimed and never will."""
        self.work: AtWork | None = None
        """The target's newest sign of life since the handover; whoever waits for one takes it away."""
        self._host = host
        self._group = group
        self._migration = migration
        self._rounds = rounds
        self._pusher = pusher
        self._window = pusher.window
        self._watch = watch
        self._post = post
        self._note = note
        self._lanes: dict[int, _Lane] = {}
        """The connection over which each lane was pushed on last."""
        self._connections = 0
        self._needed: list[list[Indices]] = []

    # ---- a link comes and goes --------------------------------------------------------------------------

    def hello(self, lane: Lane, link: int) -> Hello:
        """How we greet now."""
        oldest, newest = PROTOCOL_VERSIONS
        self._connections += 1
        return Hello(
            oldest=oldest,
            newest=newest,
            features=FEATURES,
            host=self._host,
            group=self._group,
            migration=self._migration,
            link=link,
            connection=self._connections,
            lane=lane,
            stage=self.stage,
        )

    async def connected(self, channel: Channel, hello: Hello, welcome: Welcome) -> None:
        """Bring the target up to date about where we are."""
        if self.target_host not in (None, welcome.host):
            raise RemoteProtocolError(f"host {welcome.host} answers where {self.target_host} was")
        self._rounds.link_resumed({number: lane.fresh(welcome) for number, lane in self._lanes.items()})
        self._lanes = {BULK: _Lane(hello.connection)}
        self._pusher.may_compress = bool(hello.features & welcome.features & FEATURE_ZSTD)
        self._pusher.window = min(self._window, max(welcome.window, 1))
        self._needed = [[] for _ in self._rounds.volumes]
        if welcome.stage is Stage.NEW:
            await self._offer(channel)
            self.target_host = welcome.host
        if self.stage is Stage.HANDED:
            if welcome.stage is Stage.COPYING:
                # The handover was lost, and the target has closed the connection that it might come over.
                self._post(Event.TIMEOUT, UnavailableError("the handover did not arrive"))
        elif welcome.stage is Stage.HANDED:
            raise RemoteProtocolError("the target has a handover that was not sent")
        else:
            self._rounds.begin_next()
            self._pusher.start()

    def helped(self, lane: int, hello: Hello, welcome: Welcome) -> None:
        """Another connection to push over. What the target has not had from the one before goes out again."""
        if (before := self._lanes.get(lane)) is not None:
            self._rounds.planner.landed(before.fresh(welcome), lane)
        self.unhelped(lane)
        self._lanes[lane] = _Lane(hello.connection)

    def unhelped(self, lane: int) -> None:
        """That connection does not return soon: what was under way goes out over others."""
        self._lanes.pop(lane, None)
        self._rounds.planner.lane_lost(lane)

    async def _offer(self, channel: Channel) -> None:
        """Offer the group and wait until the target has decided. No deadline: the effect that waits has one."""
        if self.stage is not Stage.NEW:
            raise RemoteProtocolError("the target wants to begin again")
        await channel.send(Offer(volumes=self._rounds.offers(), generation=self.generation, proof=self.proof))
        answer = await channel.receive_message()
        if isinstance(answer, Refused):
            raise LinkRefused(answer)
        if not isinstance(answer, Accept):
            raise RemoteProtocolError("the target answered the offer with something else")
        self.stage = Stage.COPYING
        for heat in self._rounds.heat():
            await channel.send(heat)

    def refused(self, refusal: Refused) -> None:
        """A target that has no trace of us will never claim, if it is the host that accepted."""
        gone = refusal.reason in (Reason.UNKNOWN, Reason.GONE)
        if self.stage is not Stage.NEW and gone and refusal.host == self.target_host:
            self._decline(refusal.message)

    def link_changed(self, *, up: bool, reason: str = "") -> None:
        """Tell observers."""
        self._watch.tell(LinkChanged, up=up, reason=reason)

    def disconnected(self) -> None:
        """What was under way is planned anew for the next link."""
        self._pusher.stop()
        self._rounds.link_lost()

    # ---- messages ---------------------------------------------------------------------------------------

    def received(self, message: Message, lane: int = BULK) -> None:
        """A control message of the target."""
        match message:
            case Ack():
                fresh = self._lanes[lane].acknowledged_now(message.pushes)
                self._rounds.planner.landed(fresh, lane)
            case AtWork():
                self.work = message
            case Taken():
                self._note(message)
                self._post(Event.TAKEN, None)
            case Declined():
                self._decline(message.message)
            case Evacuated():
                self._note(message)
                self._post(Event.EVACUATED, None)
            case Need():
                self._need(message)
            case NeedEnd():
                self._push_needed([join_indices(parts) for parts in self._needed])
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} is not for the source")

    def _decline(self, reason: str) -> None:
        self.is_declined = True
        self._post(Event.DECLINED, MigrationError(f"the target declined: {reason}"))

    def _need(self, message: Need) -> None:
        if message.volume >= len(self._needed):
            raise RemoteProtocolError(f"the target needs volume {message.volume}, which does not exist")
        parts = self._needed[message.volume]
        chunks = message_set(message, self._rounds.volumes[message.volume].chunks.count)
        if parts and chunks[0] <= parts[-1][-1]:
            raise RemoteProtocolError("what the target needs is out of order")
        parts.append(chunks)

    def _push_needed(self, needed: Sequence[Indices]) -> None:
        self._needed = [[] for _ in self._rounds.volumes]
        self._rounds.begin_final(needed)
        self._pusher.is_frozen = True
        self._pusher.start()
