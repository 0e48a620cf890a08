"""One connection between two hosts, as frames: what was agreed on, kept alive, and closed when it is silent.

A channel sends one thing at a time, whoever asks; it receives for one reader. Its conversation refuses what may not be
said now, in both directions. Both sides say something at least every ``keepalive_s``, so that a host that is
frozen or cut off is noticed after ``silence_s``, however patient TCP is.

`dial` and `greet` are the two ends of the first exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Never

from silo.abc import Buffer, Clock, Connection, Transport
from silo.errors import ClosedError, RemoteProtocolError, UnavailableError
from silo.p2p.conversation import Conversation, Side
from silo.p2p.messages import (
    PROTOCOL_VERSIONS,
    Hello,
    Message,
    Reason,
    Refused,
    Welcome,
    decode,
    encode,
    frame_type,
)
from silo.p2p.settings import MigrationSettings
from silo.p2p.wire import Frame, FrameBuffer, FrameType, frame_header

__all__ = ["Channel", "LinkRefused", "dial", "greet"]


class LinkRefused(UnavailableError):
    """The target answered, and does not want this connection. ``refusal`` says why."""

    def __init__(self, refusal: Refused) -> None:
        super().__init__(f"the target refused the connection: {refusal.message}")
        self.refusal = refusal


class Channel:
    """See the module. Whoever made it closes it."""

    def __init__(self, connection: Connection, side: Side, clock: Clock, settings: MigrationSettings) -> None:
        self.connection = connection
        self.conversation = Conversation(side)
        self._clock = clock
        self._settings = settings
        self._buffer = FrameBuffer(2 * settings.batch)
        self._sending = asyncio.Lock()
        self._spoke_at = clock.monotonic()

    @property
    def peer(self) -> str:
        """Who is at the other end, for logs."""
        return self.connection.peer

    async def send(self, *messages: Message) -> None:
        """Send control messages, in order. Cancelled or failed, the channel is of no more use.

        `UnavailableError` or `ClosedError` when it broke, `LocalProtocolError` when they may not be sent now.
        """
        async with self._sending:
            for message in messages:
                self.conversation.sent(frame_type(message))
            await self._send([encode(message) for message in messages])

    async def send_raw(self, type_: FrameType, buffers: Sequence[Buffer]) -> None:
        """Send frames of one type that the caller has put together."""
        async with self._sending:
            self.conversation.sent(type_)
            await self._send(buffers)

    async def send_parts(self, content: bytes, message: Message) -> None:
        """Send something large in PART frames, and then the message that names its length and digest."""
        size = self._settings.batch
        async with self._sending:
            for start in range(0, len(content), size):
                part = memoryview(content)[start : start + size]
                self.conversation.sent(FrameType.PART)
                await self._send([frame_header(FrameType.PART, len(part)), part])
            self.conversation.sent(frame_type(message))
            await self._send([encode(message)])

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        self._spoke_at = self._clock.monotonic()
        await self.connection.send(buffers)

    async def receive(self) -> list[Frame]:
        """The next frames, at least one. Their payloads are valid until the next call. For one reader.

        `UnavailableError` when the peer closed, broke off or fell silent; `RemoteProtocolError` for nonsense.
        """
        while not (frames := list(self._frames())):
            await self._receive_more()
        return frames

    async def receive_message(self) -> Message:
        """The next control message, and no more: what it means decides what may follow. As `receive`."""
        while (frame := next(self._frames(), None)) is None:
            await self._receive_more()
        return decode(frame)

    def _frames(self) -> Iterator[Frame]:
        """What has been received whole, without the signs of life."""
        for frame in self._buffer.frames():
            self.conversation.rcvd(frame.type)
            if frame.type is not FrameType.PING:
                yield frame

    async def _receive_more(self) -> None:
        try:
            async with asyncio.timeout(self._settings.silence_s):
                count = await self.connection.receive_into(self._buffer.space())
        except TimeoutError as error:
            raise UnavailableError(
                f"nothing was heard from {self.peer} for {self._settings.silence_s:g} s"
            ) from error
        if count == 0:
            raise UnavailableError(f"{self.peer} closed the connection")
        self._buffer.received(count)

    async def keep_alive(self) -> Never:
        """Say something when nothing else is said. Runs until it is cancelled or the channel breaks."""
        pause = self._settings.keepalive_s
        while True:
            await asyncio.sleep(pause)
            if self._clock.monotonic() - self._spoke_at >= pause and not self._sending.locked():
                await self.send_raw(FrameType.PING, [frame_header(FrameType.PING, 0)])

    async def aclose(self) -> None:
        """Close the connection. Twice is harmless."""
        await self.connection.aclose()


async def dial(
    transport: Transport, url: str, hello: Hello, clock: Clock, settings: MigrationSettings
) -> tuple[Channel, Welcome]:
    """Source: connect, say HELLO, and return the channel and the answer.

    `UnavailableError` when that cannot be done in time, `LinkRefused` when the target says no. Cancelled or
    failed, nothing is left open.
    """
    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            channel = Channel(await transport.connect(url), Side.SOURCE, clock, settings)
            try:
                await channel.send(hello)
                answer = await channel.receive_message()
                if isinstance(answer, Refused):
                    raise LinkRefused(answer)
                if not isinstance(answer, Welcome) or not hello.oldest <= answer.version <= hello.newest:
                    raise RemoteProtocolError(f"{url} answered the greeting with something else")
                channel.conversation.welcomed(hello.lane, answer.stage)
            except BaseException:
                await channel.aclose()
                raise
            return channel, answer
    except TimeoutError as error:
        raise UnavailableError(
            f"{url} did not answer within {settings.connect_timeout_s:g} s", hint="is the other host serving?"
        ) from error
    except ClosedError as error:
        raise UnavailableError(f"{url} closed the connection during the greeting") from error


async def greet(channel: Channel, host: str, settings: MigrationSettings) -> Hello:
    """Target: receive HELLO and see whether we have a version in common.

    `UnavailableError` when it does not come in time; `RemoteProtocolError` when something else comes, or when no
    version fits, which the source has been told then.
    """
    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            hello = await channel.receive_message()
    except TimeoutError as error:
        raise UnavailableError(f"{channel.peer} connected and said nothing") from error
    if not isinstance(hello, Hello):
        raise RemoteProtocolError(f"{channel.peer} did not begin with a greeting")
    oldest, newest = PROTOCOL_VERSIONS
    if hello.newest < oldest or hello.oldest > newest:
        message = f"it speaks versions {hello.oldest} to {hello.newest}, this host {oldest} to {newest}"
        await channel.send(Refused(reason=Reason.VERSION, host=host, message=message))
        raise RemoteProtocolError(f"{channel.peer}: {message}", hint="update the older host")
    return hello


def common_version(hello: Hello) -> int:
    """The newest version that both sides speak. `greet` has seen that there is one."""
    return min(hello.newest, PROTOCOL_VERSIONS[1])
