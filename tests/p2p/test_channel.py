"""Channels: greeting, parts, signs of life, and what silence and nonsense lead to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from silo.errors import LocalProtocolError, RemoteProtocolError, UnavailableError
from silo.p2p.channel import Channel, LinkRefused, common_version, dial, greet
from silo.p2p.conversation import Phase, Side
from silo.p2p.messages import (
    Ack,
    Handover,
    Hello,
    Lane,
    Offer,
    Reason,
    Refused,
    Stage,
    Welcome,
    Withdraw,
    decode,
    encode,
)
from silo.p2p.wire import FrameType, frame_header
from silo.tasks import task_group
from silo.testing.loop import SimulatedClock, run_simulated
from silo.testing.network import MemoryNetwork
from tests.support.migration import QUICK

URL = "tcp:b:1"
HELLO = Hello(
    oldest=1, newest=1, host="a", group="vm1", migration=bytes(16), link=1, lane=Lane.BULK, stage=Stage.COPYING
)  # fmt: skip
WELCOME = Welcome(version=1, host="b", stage=Stage.COPYING, window=1)


@asynccontextmanager
async def channels(
    clock: SimulatedClock, network: MemoryNetwork | None = None, *, phase: Phase = Phase.COPYING
) -> AsyncIterator[tuple[Channel, Channel]]:
    """Source and target, joined, in a phase."""
    ends = (network or MemoryNetwork()).join("a", "b")
    source, target = (
        Channel(end, side, clock, QUICK) for end, side in zip(ends, (Side.SOURCE, Side.TARGET), strict=True)
    )
    source.conversation.phase = target.conversation.phase = phase
    try:
        yield source, target
    finally:
        await source.aclose()
        await target.aclose()


def simulate(scenario: Callable[[SimulatedClock], Coroutine[Any, Any, None]]) -> bool:
    run_simulated(scenario, seed=1)
    return True


def test_messages_parts_and_raw_frames_travel():
    """Each kind of send arrives as frames, in order."""

    async def scenario(clock: SimulatedClock) -> None:
        content = bytes(range(256)) * 20_000
        async with channels(clock) as (source, target), task_group() as tasks:
            tasks.create_task(source.send_parts(content, Handover(length=len(content), digest=bytes(32))))
            frames = []
            while not frames or frames[-1][0] is not FrameType.HANDOVER:
                frames += [(frame.type, bytes(frame.payload)) for frame in await target.receive()]
            parts = b"".join(payload for type_, payload in frames if type_ is FrameType.PART)
            assert parts == content
            await target.send(Ack(pushes=1), Ack(pushes=2), Ack(pushes=3))
            assert await source.receive_message() == Ack(pushes=1)
            assert [decode(frame) for frame in await source.receive()] == [Ack(pushes=2), Ack(pushes=3)]

    assert simulate(scenario)


def test_what_may_not_be_said_is_refused_on_both_ends():
    """Our side does not send it; the other side's frame ends the connection."""

    async def scenario(clock: SimulatedClock) -> None:
        async with channels(clock) as (source, target):
            with pytest.raises(LocalProtocolError):
                await source.send(Offer(volumes=[], generation=0))
            await source.connection.send([encode(HELLO)])
            with pytest.raises(RemoteProtocolError, match="sent HELLO"):
                await target.receive()

    assert simulate(scenario)


def test_an_idle_link_stays_alive_and_a_silent_one_does_not():
    """Signs of life are not shown to the reader; without them a link is given up after a while."""

    async def scenario(clock: SimulatedClock) -> None:
        network = MemoryNetwork()
        async with channels(clock, network) as (source, target), task_group() as tasks:
            alive = tasks.create_task(source.keep_alive())
            reading = tasks.create_task(outcome(target))
            await asyncio.sleep(60)
            assert not reading.done()
            network.partition("a", "b")
            started = clock.monotonic()
            assert "nothing was heard" in str(await reading)
            assert clock.monotonic() - started <= QUICK.silence_s + QUICK.keepalive_s
            alive.cancel()

    async def outcome(channel: Channel) -> Exception | None:
        try:
            await channel.receive()
        except UnavailableError as error:
            return error
        return None

    assert simulate(scenario)


def test_a_closed_connection_is_an_unavailable_peer():
    """The end of the stream is an error here: who leaves says so before."""

    async def scenario(clock: SimulatedClock) -> None:
        async with channels(clock) as (source, target):
            await source.aclose()
            with pytest.raises(UnavailableError, match="closed"):
                await target.receive()

    assert simulate(scenario)


async def answered(
    clock: SimulatedClock, answer: Callable[[Channel, Hello], Coroutine[Any, Any, None]]
) -> Any:
    """Dial somebody who greets and then does as told."""
    network = MemoryNetwork()
    listener = await network.host("b").listen(URL)

    async def serve() -> None:
        connection = await listener.accept()
        channel = Channel(connection, Side.TARGET, clock, QUICK)
        try:
            await answer(channel, await greet(channel, "b", QUICK))
        except RemoteProtocolError:
            pass
        finally:
            await channel.aclose()

    async with task_group() as tasks:
        tasks.create_task(serve())
        try:
            channel, welcome = await dial(network.host("a"), URL, HELLO, clock, QUICK)
        finally:
            await listener.aclose()
        await channel.aclose()
        return channel.conversation.phase, welcome


def test_a_greeting_leads_to_where_the_target_is():
    """The dialler gets the welcome, and may go on from its stage."""

    async def welcome(channel: Channel, hello: Hello) -> None:
        assert hello == HELLO
        assert common_version(hello) == 1
        await channel.send(WELCOME)

    async def scenario(clock: SimulatedClock) -> None:
        assert await answered(clock, welcome) == (Phase.COPYING, WELCOME)

    assert simulate(scenario)


def test_a_refusal_says_why():
    """The dialler gets the reason."""

    async def refuse(channel: Channel, hello: Hello) -> None:
        await channel.send(Refused(reason=Reason.GONE, host="b", message="too late"))

    async def scenario(clock: SimulatedClock) -> None:
        with pytest.raises(LinkRefused, match="too late") as caught:
            await answered(clock, refuse)
        assert caught.value.refusal.reason is Reason.GONE

    assert simulate(scenario)


@pytest.mark.parametrize("what", ["silence", "close", "version", "nonsense"])
def test_a_bad_answer_is_an_error_in_time(what):
    """Whoever does not answer, hangs up, or answers something else is not a target."""

    async def answer(channel: Channel, hello: Hello) -> None:
        if what == "silence":
            await asyncio.sleep(100)
        elif what == "version":
            await channel.send(Welcome(version=2, host="b", stage=Stage.NEW, window=1))
        elif what == "nonsense":
            await channel.connection.send([b"HTTP/1.1 400 Bad Request\r\n\r\n"])

    async def scenario(clock: SimulatedClock) -> None:
        started = clock.monotonic()
        with pytest.raises((UnavailableError, RemoteProtocolError)):
            await answered(clock, answer)
        assert clock.monotonic() - started < 101

    assert simulate(scenario)


@pytest.mark.parametrize(
    "first",
    [encode(Withdraw(message="")), b"GET / HTTP/1.1\r\n\r\n", frame_header(FrameType.PING, 0), b""],
    ids=["withdraw", "http", "ping", "nothing"],
)
def test_a_target_wants_to_be_greeted(first):
    """Whatever does not begin with HELLO, in time, is turned away."""

    async def scenario(clock: SimulatedClock) -> None:
        ends = MemoryNetwork().join("a", "b")
        channel = Channel(ends[1], Side.TARGET, clock, QUICK)
        if first:
            await ends[0].send([first])
        with pytest.raises((RemoteProtocolError, UnavailableError)):
            await greet(channel, "b", QUICK)
        for end in ends:
            await end.aclose()

    assert simulate(scenario)


def test_versions_must_overlap():
    """A source that is too new or too old hears both sides' versions."""

    async def scenario(clock: SimulatedClock) -> None:
        ends = MemoryNetwork().join("a", "b")
        source, target = (
            Channel(ends[0], Side.SOURCE, clock, QUICK),
            Channel(ends[1], Side.TARGET, clock, QUICK),
        )
        await source.send(msgspec.structs.replace(HELLO, oldest=5, newest=9))
        with pytest.raises(RemoteProtocolError, match="versions 5 to 9"):
            await greet(target, "b", QUICK)
        answer = await source.receive_message()
        assert isinstance(answer, Refused)
        assert answer.reason is Reason.VERSION
        for end in ends:
            await end.aclose()

    assert simulate(scenario)
