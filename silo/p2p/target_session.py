"""What the target says and hears on its link: pushes, rounds, the handover, and demands.

The source dials, so links simply appear here; the newest one counts. Before it is welcomed, the one before is
closed, and everything that was read from it has been dealt with, so that nothing old can overtake anything new.

The session turns frames into what they mean for the installer, and messages that matter to the handover into events
of the driver; it decides nothing about ownership.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Never

from blake3 import blake3

from silo.abc import Clock
from silo.errors import (
    ClosedError,
    MigrationError,
    ProtocolError,
    RemoteProtocolError,
    SiloError,
    UnavailableError,
)
from silo.events import LinkChanged
from silo.p2p.channel import Channel, common_version
from silo.p2p.chunksets import encode_set
from silo.p2p.handover import Event, TargetState
from silo.p2p.installer import Installer
from silo.p2p.messages import (
    DEALT_MAX,
    FEATURES,
    Accept,
    Ack,
    AtWork,
    Drained,
    Handover,
    Heat,
    Hello,
    Invalidate,
    Lane,
    Message,
    Need,
    NeedEnd,
    Reason,
    Refused,
    Released,
    Round,
    Stage,
    Unavailable,
    Welcome,
    Withdraw,
    Zeros,
    decode,
)
from silo.p2p.peer_source import PeerSource
from silo.p2p.records import HANDOVER_SIZE_MAX, HandoverBody, decode_handover
from silo.p2p.settings import CONNECTIONS_MAX, MigrationSettings
from silo.p2p.signal import Signal
from silo.p2p.watch import Watch
from silo.p2p.wire import Frame, FrameType, parse_chunk
from silo.tasks import task_group

__all__ = ["TargetSession"]

_GONE = frozenset({TargetState.DISCARDING, TargetState.DISCARDED, TargetState.FENCED})
_AT_WORK = frozenset({TargetState.RECORDING, TargetState.CLAIMING, TargetState.RESUMING})
"""States in which the guest runs nowhere."""
_OURS = frozenset({TargetState.RESUMING, TargetState.RUNNING})
"""States in which the source may still have something that we need."""


class TargetSession:
    """See the module. `serve` and `serve_accepted` are called by the reception, one task per connection."""

    def __init__(
        self,
        host: str,
        installer: Installer,
        peer: PeerSource,
        watch: Watch,
        clock: Clock,
        settings: MigrationSettings,
        changed: Signal,
        *,
        state: Callable[[], TargetState],
        post: Callable[[Event, SiloError | None], None],
        standing: Callable[[], list[Message]],
    ) -> None:
        self.bulk: Channel | None = None
        """The bulk lane of the present link."""
        self.down_since: float | None = clock.monotonic()
        self.handover: tuple[HandoverBody, bytes] | None = None
        """What the source has handed over, and its bytes."""
        self.is_drained = False
        """The source has sent all that it meant to send, and we have dealt with it."""
        self._host = host
        self._installer = installer
        self._peer = peer
        self._watch = watch
        self._clock = clock
        self._settings = settings
        self._changed = changed
        self._state = state
        self._post = post
        self._standing = standing
        self._number = -1
        self._demand: Channel | None = None
        self._pushing: dict[int, Channel] = {}
        """The push lanes of the present link, by connection."""
        self._dealt: dict[int, int] = {}
        """How many pushes of each connection were dealt with; for the source, when it has to dial again."""
        self._ended = asyncio.Event()
        self._ended.set()
        self._takeover = asyncio.Lock()
        self._parts = bytearray()

    # ---- connections ------------------------------------------------------------------------------------

    async def serve_accepted(self, channel: Channel, hello: Hello) -> None:
        """The connection over which the offer came: accept it, and serve it until it breaks, which is raised."""
        await self._serve_bulk(channel, hello, None)

    async def serve(self, channel: Channel, hello: Hello) -> None:
        """Another connection of the same migration: welcome it, and serve it until it breaks, which is raised."""
        await self._changed.until(lambda: self._state() is not TargetState.RECORDING)
        if self._state() in _GONE:
            await self._refuse(channel, Reason.GONE, "this host has given the migration up")
        elif hello.lane is Lane.BULK:
            is_resumed = self._state() is not TargetState.RECEIVING
            await self._serve_bulk(channel, hello, Stage.HANDED if is_resumed else Stage.COPYING)
        elif self.bulk is None or hello.link != self._number:
            await self._refuse(channel, Reason.BUSY, f"the {hello.lane.value} lane belongs to another link")
        elif hello.lane is Lane.PUSH:
            await self._serve_push(channel, hello)
        else:
            await self._serve_demand(channel, hello)

    def _welcome(self, hello: Hello, stage: Stage) -> Welcome:
        welcome = Welcome(
            version=common_version(hello),
            features=FEATURES,
            host=self._host,
            stage=stage,
            window=self._settings.window,
            dealt=dict(self._dealt),
        )
        self._dealt.pop(hello.connection, None)
        while len(self._dealt) >= DEALT_MAX:
            del self._dealt[next(iter(self._dealt))]
        self._dealt[hello.connection] = 0
        return welcome

    async def _refuse(self, channel: Channel, reason: Reason, message: str) -> None:
        await channel.send(Refused(reason=reason, host=self._host, message=message))

    async def _serve_bulk(self, channel: Channel, hello: Hello, stage: Stage | None) -> None:
        """``stage`` is ``None`` for the connection that was greeted before its offer was accepted."""
        async with self._takeover:
            await self.close()
            await self._ended.wait()
            await self._changed.until(lambda: not self._pushing)
            self._ended = ended = asyncio.Event()
            self._number, self._parts = hello.link, bytearray()
            self.bulk, self.down_since, self.is_drained = channel, None, False
        try:
            welcome = self._welcome(hello, stage or Stage.NEW)
            if stage is None:
                await channel.send(Accept())
            else:
                await channel.send(welcome)
                channel.conversation.welcomed(Lane.BULK, stage)
            self._watch.tell(LinkChanged, up=True)
            self._changed.notify()
            async with task_group() as tasks:
                tasks.create_task(channel.keep_alive())
                tasks.create_task(self._tell_work(channel))
                if stage is Stage.HANDED:
                    tasks.create_task(self._tell_standing(channel))
                await self._read(channel, hello.connection)
        except SiloError as error:
            self._watch.tell(LinkChanged, up=False, reason=str(error))
            raise
        finally:
            self.bulk, self.down_since = None, self._clock.monotonic()
            ended.set()
            self._changed.notify()
            for other in (self._demand, *self._pushing.values()):
                if other is not None:
                    await other.aclose()

    async def _serve_push(self, channel: Channel, hello: Hello) -> None:
        number = hello.connection
        if number in self._pushing or len(self._pushing) >= CONNECTIONS_MAX:
            await self._refuse(channel, Reason.BUSY, "there are too many push lanes")
            return
        self._pushing[number] = channel
        try:
            welcome = self._welcome(hello, hello.stage)
            await channel.send(welcome)
            channel.conversation.welcomed(Lane.PUSH, welcome.stage)
            async with task_group() as tasks:
                tasks.create_task(channel.keep_alive())
                await self._read_pushed(channel, number)
        finally:
            del self._pushing[number]
            self._changed.notify()

    async def _serve_demand(self, channel: Channel, hello: Hello) -> None:
        self._demand = channel
        try:
            welcome = self._welcome(hello, hello.stage)
            await channel.send(welcome)
            channel.conversation.welcomed(Lane.DEMAND, welcome.stage)
            async with task_group() as tasks:
                tasks.create_task(channel.keep_alive())
                tasks.create_task(self._peer.demand(channel))
                await self._read_demanded(channel)
        finally:
            # The bulk lane may have something left to say; the source ends both, because a link is whole or broken.
            self._demand = None

    async def close(self) -> None:
        """End the present link, if there is one."""
        for channel in (self.bulk, *self._pushing.values()):
            if channel is not None:
                await channel.aclose()

    async def say(self, *messages: Message) -> None:
        """Say something on the present link. What is missed is said again on the next (`_tell_standing`)."""
        bulk = self.bulk
        if bulk is not None:
            try:
                await bulk.send(*messages)
            except (UnavailableError, ClosedError, ProtocolError):
                await bulk.aclose()  # its reader tells everybody

    async def _tell_standing(self, channel: Channel) -> None:
        """On a link after the first: what we need, and what we said before and the source may have missed."""
        await self._changed.until(lambda: self._state() is not TargetState.CLAIMING)
        if self._state() in _OURS:
            await channel.send(*self._need())
        await channel.send(*self._standing())

    async def _tell_work(self, channel: Channel) -> Never:
        """While the source waits for us with its guest stopped, it hears that we are at work."""
        while True:
            await self._changed.until(lambda: self._state() in _AT_WORK)
            await channel.send(AtWork(claimed=self._state() is TargetState.RESUMING))
            await asyncio.sleep(self._settings.keepalive_s)

    async def say_need(self) -> None:
        """Say on the present link everything that only the source has."""
        await self.say(*self._need())

    def _need(self) -> list[Message]:
        needs: list[Message] = [
            Need(volume=number, window=window, chunks=data)
            for number, chunks in enumerate(self._installer.needed())
            for window, data in encode_set(chunks)
        ]
        return [*needs, NeedEnd()]

    # ---- frames -----------------------------------------------------------------------------------------

    async def _read(self, channel: Channel, number: int) -> Never:
        while True:
            before = self._dealt[number]
            is_drained = False
            for frame in await channel.receive():
                if frame.type is FrameType.CHUNK:
                    await self._installing(frame)
                    self._dealt[number] += 1
                elif frame.type is FrameType.PART:
                    self._add_part(frame)
                else:
                    message = decode(frame)
                    is_drained |= isinstance(message, Drained)
                    await self._received(message)
                    self._dealt[number] += isinstance(message, Zeros)
            if self._dealt[number] != before:
                await channel.send(Ack(pushes=self._dealt[number]))
            if is_drained:
                self.is_drained = True
                self._changed.notify()
            await asyncio.sleep(0)  # receiving may not have given way to anybody

    async def _read_pushed(self, channel: Channel, number: int) -> Never:
        """Content whose round is announced on another connection, perhaps later."""
        while True:
            for frame in await channel.receive():
                await self._installer.until_announced(parse_chunk(frame.payload).round)
                await self._installing(frame)
                self._dealt[number] += 1
            await channel.send(Ack(pushes=self._dealt[number]))
            await asyncio.sleep(0)

    async def _installing(self, frame: Frame) -> None:
        """Install a chunk. When that fails here, and not at the peer, the migration fails."""
        try:
            await self._installer.install(parse_chunk(frame.payload))
        except ProtocolError:
            raise
        except SiloError as error:
            self._post(Event.FAILED, error)
            raise

    def _add_part(self, frame: Frame) -> None:
        if len(self._parts) + len(frame.payload) > HANDOVER_SIZE_MAX:
            raise RemoteProtocolError("the handover is larger than any can be")
        self._parts += frame.payload

    async def _received(self, message: Message) -> None:
        match message:
            case Invalidate():
                await self._installer.invalidate(message)
            case Round():
                self._installer.announce(message)
            case Zeros():
                self._installer.install_zeros(message)
            case Heat():
                self._installer.adopt_heat(message)
            case Handover():
                await self._take_handover(message)
            case Withdraw():
                self._post(Event.WITHDRAW, MigrationError(f"the source withdrew: {message.message}"))
            case Released():
                self._post(Event.RELEASED, None)
            case Drained():
                pass  # noted when everything before it has been dealt with
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} is not for the target")

    async def _take_handover(self, message: Handover) -> None:
        """Check the handover, give it to the driver, and listen on when it was applied."""
        encoded = bytes(self._parts)
        self._parts = bytearray()
        if len(encoded) != message.length or blake3(encoded).digest() != message.digest:
            raise RemoteProtocolError("the handover was damaged on its way")
        body = decode_handover(encoded)
        self._installer.check(body)
        self.handover = (body, encoded)
        self._post(Event.HANDOVER, None)
        # No deadline: what follows is our own work. Given up, the driver says so to the source and ends the link.
        await self._changed.until(lambda: self._installer.is_final)

    async def _read_demanded(self, channel: Channel) -> Never:
        while True:
            for frame in await channel.receive():
                if frame.type is FrameType.CHUNK:
                    await self._installing(frame)
                    continue
                message = decode(frame)
                if not isinstance(message, Unavailable):
                    raise RemoteProtocolError("the demand lane carried something else than a chunk")
                self._peer.unavailable(message.volume, message.chunk, message.message)
            await asyncio.sleep(0)
