"""Random guests of the NBD server: they write, zero, trim, reconnect in the middle of it, and see the server killed.

Every example is a list of steps that hypothesis shrinks. The server serves a file with a state directory, in a
process of its own. What is held against it is `tests.support.disk_model`: an answered request has happened, an
unanswered one has happened block by block or not at all, and what was read once is never taken back.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silo.errors import ClosedError, UnavailableError
from silo.exports.nbd_client import NbdClient
from tests.support.disk_model import BLOCK, DiskModel
from tests.support.nbd import NbdServerProcess

SIZE = 2 << 20
LANES = 8
LANE = SIZE // LANES
CHUNK = "16K"


@attrs.frozen
class Request:
    """One request inside a lane; requests of one burst are in different lanes, and so never overlap."""

    kind: str
    first: int
    """In blocks, from the start of the lane."""
    count: int
    fua: bool


@attrs.frozen
class Burst:
    """Requests in flight together, one per lane, and what happens while they are."""

    requests: tuple[Request, ...]
    end: str
    """``answered``; ``dropped``: the connection is cut after some answers; ``killed``: the server is."""
    answers: int


REQUESTS = st.builds(
    lambda kind, first, count, fua: Request(kind, first, min(count, LANE // BLOCK - first), fua),
    st.sampled_from(["write", "write", "zero", "trim", "read"]),
    st.integers(0, LANE // BLOCK - 1),
    st.one_of(st.integers(1, 16), st.integers(1, LANE // BLOCK)),
    st.booleans(),
)
BURSTS = st.builds(
    lambda requests, end, answers: Burst(tuple(requests), end, answers),
    st.lists(REQUESTS, min_size=1, max_size=LANES),
    st.sampled_from(["answered", "answered", "answered", "dropped", "killed"]),
    st.integers(0, 4),
)
GUESTS = st.tuples(st.lists(BURSTS, min_size=1, max_size=12), st.integers(0, 1 << 32))


class Guest:
    """Plays the steps against a server that it starts, kills and starts again."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._chance = random.Random(seed)
        self._model = DiskModel(SIZE)
        self._starts = 0
        (directory / "disk.img").touch()
        with (directory / "disk.img").open("r+b") as file:
            file.truncate(SIZE)

    def start(self) -> NbdServerProcess:
        """Start the server on what its predecessors have left."""
        self._starts += 1
        place = self._directory / str(self._starts)
        place.mkdir()
        files = ("--file", str(self._directory / "disk.img"), "--state", str(self._directory / "state"))
        return NbdServerProcess(place, *files, "--chunk-size", CHUNK)

    async def play(self, bursts: list[Burst]) -> None:
        """All bursts, then two restarts, a hard and a soft one, with everything read after each."""
        server = self.start()
        try:
            client = await NbdClient.connect(server.uri("disk"))
            for burst in bursts:
                await self._burst(client, burst, server)
                if burst.end == "killed":
                    client.abort()
                    server = self.start()
                if burst.end != "answered":
                    client = await NbdClient.connect(server.uri("disk"))
            await self._verify(client)
            server.kill()
            client.abort()
            server = self.start()
            async with await NbdClient.connect(server.uri("disk")) as client:
                await self._verify(client)
            assert server.stop() == 0
            server = self.start()
            async with await NbdClient.connect(server.uri("disk")) as client:
                await self._verify(client)
        finally:
            server.stop()

    async def _burst(self, client: NbdClient, burst: Burst, server: NbdServerProcess) -> None:
        answers = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as tasks:
            for lane, request in enumerate(burst.requests):
                tasks.create_task(self._request(client, lane * LANE, request, answers))
            if burst.end == "answered":
                return
            for _ in range(min(burst.answers, len(burst.requests))):
                await answers.acquire()
            if burst.end == "killed":
                server.kill()
            else:
                client.abort()

    async def _request(
        self, client: NbdClient, lane: int, request: Request, answers: asyncio.Semaphore
    ) -> None:
        offset, length = lane + request.first * BLOCK, request.count * BLOCK
        try:
            if request.kind == "read":
                self._model.check(offset, await client.read(offset, length))
            elif request.kind == "write":
                data = self._chance.randbytes(length)
                self._model.begin(offset, data)
                await client.write(offset, data, fua=request.fua)
                self._model.acknowledge(offset, data)
            elif request.kind == "zero":
                self._model.begin(offset, bytes(length))
                await client.write_zeroes(offset, length, fua=request.fua)
                self._model.acknowledge(offset, bytes(length))
            else:
                self._model.begin(offset, bytes(length))  # and no answer makes it certain
                await client.trim(offset, length, fua=request.fua)
        except (UnavailableError, ClosedError):
            pass  # never answered: the model knows what that leaves open
        finally:
            answers.release()

    async def _verify(self, client: NbdClient) -> None:
        step = 256 * 1024
        for offset in range(0, SIZE, step):
            self._model.check(offset, await client.read(offset, step))


async def play(bursts: list[Burst], seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="silo-nbd-") as directory:
        await Guest(Path(directory), seed).play(bursts)


KILLING = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.mark.crash
@given(GUESTS)
@settings(max_examples=3, deadline=None, suppress_health_check=KILLING)
async def test_nothing_answered_is_lost(guest: tuple[list[Burst], int]) -> None:
    await play(*guest)


@pytest.mark.crash
@pytest.mark.slow
@given(GUESTS)
@settings(max_examples=25, deadline=None, suppress_health_check=KILLING)
async def test_nothing_answered_is_lost_at_length(guest: tuple[list[Burst], int]) -> None:
    await play(*guest)


@pytest.mark.crash
async def test_a_long_life() -> None:
    """One fixed and eventful guest: every kind of request, several cuts of the connection, several kills."""
    chance = random.Random(20)
    bursts = [
        Burst(
            tuple(
                Request(
                    chance.choice(["write", "zero", "trim", "read"]),
                    first,
                    min(64, LANE // BLOCK - first),
                    False,
                )
                for first in (chance.randrange(LANE // BLOCK) for _ in range(LANES))
            ),
            ("answered", "answered", "dropped", "answered", "killed")[turn % 5],
            chance.randrange(4),
        )
        for turn in range(20)
    ]
    await play(bursts, seed=20)


def test_the_model_can_say_no() -> None:
    """A lost write, a torn block, an old block after a new one, a resurrected one: each is noticed."""
    old, new = b"o" * BLOCK, b"n" * BLOCK
    model = DiskModel(4 * BLOCK)
    model.check(0, bytes(4 * BLOCK))
    model.begin(0, old + old)
    model.acknowledge(0, old + old)
    with pytest.raises(AssertionError):
        model.check(0, bytes(BLOCK))
    model.begin(0, new + new)
    model.check(0, new)
    with pytest.raises(AssertionError):
        model.check(0, old)
    model.check(BLOCK, old)
    with pytest.raises(AssertionError):
        model.check(BLOCK, new)
    with pytest.raises(AssertionError):
        model.check(0, new[:256] + old[:256])
    model.begin(2 * BLOCK, new)
    model.acknowledge(2 * BLOCK, new)
    model.begin(2 * BLOCK, bytes(BLOCK))
    model.check(2 * BLOCK, bytes(BLOCK))
    with pytest.raises(AssertionError):
        model.check(2 * BLOCK, new)
