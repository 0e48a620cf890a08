"""The attentive loop looks again before it sleeps, for a short time, and only while that pays."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from silo.clock import SystemClock
from silo.eventloop import ATTENTION_S, AttentiveLoop, AttentiveSelector, expects_soon

TICK_S = ATTENTION_S / 10


class TickingClock(SystemClock):
    """Every look at it takes a tenth of the time that attention lasts; ``on_look`` may do something meanwhile."""

    looks = 0
    on_look: Callable[[int], object] = staticmethod(lambda _: None)

    def monotonic(self) -> float:
        type(self).looks += 1
        type(self).on_look(type(self).looks)
        return type(self).looks * TICK_S


@pytest.fixture
def clock() -> Iterator[TickingClock]:
    TickingClock.looks = 0
    yield TickingClock()
    TickingClock.on_look = staticmethod(lambda _: None)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def selector(clock: TickingClock, pair: tuple[socket.socket, socket.socket]) -> Iterator[AttentiveSelector]:
    with AttentiveSelector(clock) as made:
        made.register(pair[0], selectors.EVENT_READ)
        yield made


def attention_of(selector: AttentiveSelector) -> bool:
    """Whether the selector looks more than once when told that something will come, and nothing comes."""
    before = TickingClock.looks
    selector.expect_soon()
    assert selector.select(0.001) == []
    return TickingClock.looks > before


def test_what_comes_during_attention_is_found_without_sleeping(selector, pair):
    """It comes at the third look; a select that slept would never return, because nobody is there to wake it."""
    TickingClock.on_look = staticmethod(lambda looks: looks == 3 and pair[1].send(b"x"))
    selector.expect_soon()
    ((key, events),) = selector.select(None)
    assert key.fileobj is pair[0]
    assert events == selectors.EVENT_READ
    assert TickingClock.looks == 3


def test_nobody_looks_unasked(selector):
    assert selector.select(0.001) == []
    assert TickingClock.looks == 0


@pytest.mark.parametrize("timeout", [0, ATTENTION_S / 2])
def test_work_and_timers_come_first(selector, timeout):
    """With other things to do at once, or soon, there is no time for attention."""
    selector.expect_soon()
    assert selector.select(timeout) == []
    assert TickingClock.looks == 0


def test_attention_ends(selector):
    assert attention_of(selector)
    assert TickingClock.looks == 1 + 10


def test_attention_for_nothing_makes_inattentive(selector):
    """After one failure one chance is let pass, after the next three, then seven."""
    assert [attention_of(selector) for _ in range(15)] == [
        *(True, False),
        *(True, False, False, False),
        *(True, *[False] * 7),
        True,
    ]


def test_attention_that_pays_is_forgiven(selector, pair):
    attention_of(selector)
    attention_of(selector)
    pair[1].send(b"x")
    selector.expect_soon()
    assert len(selector.select(None)) == 1
    pair[0].recv(1)
    assert [attention_of(selector) for _ in range(3)] == [True, False, True]


def test_a_loop_runs_as_any_other():
    async def work() -> bytes:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            expect_soon = expects_soon(loop)
            expect_soon()
            loop.call_later(0.001, theirs.send, b"later")
            return await loop.sock_recv(ours, 16)

    with asyncio.Runner(loop_factory=AttentiveLoop) as runner:
        assert runner.run(work()) == b"later"


def test_with_one_core_there_is_no_attention(monkeypatch, clock):
    """The client could not run meanwhile."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with closing(AttentiveLoop(clock)) as loop, closing(asyncio.SelectorEventLoop()) as other:
        assert expects_soon(loop) is expects_soon(other)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with closing(AttentiveLoop(clock)) as loop:
        assert expects_soon(loop) is not expects_soon(other)
