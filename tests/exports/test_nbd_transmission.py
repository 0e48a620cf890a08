"""Serving a connection: batches, misses, back-pressure, and every way in which it ends."""

from __future__ import annotations

import asyncio
import collections
import socket

import pytest

from silo.chunkmap import Residency
from silo.devices.memory import MemoryDevice
from silo.exports import nbd_transmission
from silo.exports.nbd_replies import replies_for
from silo.exports.nbd_service import NbdService
from silo.exports.nbd_session import HeaderStyle, RequestParser
from silo.exports.nbd_stream import Stream
from silo.exports.nbd_transmission import PayloadBudget, Transmission, TransmissionLimits
from silo.exports.nbd_wire import REQUEST, REQUEST_MAGIC, SIMPLE_REPLY, Command, CommandFlag, NbdError
from silo.volume import Volume
from tests.support.held import HeldDevice
from tests.support.nbd_peer import Peer, condition
from tests.support.volumes import CHUNK, DictSource, make_volume

READ, WRITE, FLUSH, DISC = Command.READ, Command.WRITE, Command.FLUSH, Command.DISC
MIB = 1 << 20


class Running:
    """A transmission over a socket pair: ``async with Running(volume) as peer``."""

    def __init__(self, volume: Volume, *, budget: int = 64 * MIB, **limits: int) -> None:
        theirs, ours = socket.socketpair()
        ours.setblocking(False)
        self.peer = Peer(sock=theirs)
        self.budget = PayloadBudget(budget)
        self.parser = RequestParser(HeaderStyle.SIMPLE)
        self.transmission = Transmission(
            Stream(ours),
            self.parser,
            NbdService(volume, replies_for(HeaderStyle.SIMPLE), payload_max=32 * MIB),
            self.budget,
            TransmissionLimits(**limits),
        )
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Peer:
        await self._tasks.__aenter__()
        self.task = self._tasks.create_task(self.transmission.run())
        return self.peer

    async def __aexit__(self, *error: object) -> None:
        self.peer.close()
        await self._tasks.__aexit__(*error)
        assert self.budget.used == 0


def memory(size: int = 16 * CHUNK) -> Volume:
    return make_volume(MemoryDevice(size))[1]


async def test_many_requests_are_answered_in_one_go():
    """Requests that arrive together are answered together, in order."""
    async with Running(memory()) as peer:
        for cookie in range(50):
            await peer.request(WRITE, cookie * 10, payload=bytes([cookie]) * 10, cookie=cookie)
            await peer.request(READ, cookie * 10, 10, cookie=100 + cookie)
        for cookie in range(50):
            assert await peer.reply() == (cookie, 0, b"")
            assert await peer.reply(10) == (100 + cookie, 0, bytes([cookie]) * 10)


async def test_a_flood_leaves_turns_to_others():
    """However many requests have arrived, the loop gets on with other things after some hundreds of them."""
    running = Running(memory())
    turn, served = 0, collections.Counter[int]()
    serve_nowait = running.transmission._service.serve_nowait

    def counted(requests, out):
        served[turn] += len(requests)
        return serve_nowait(requests, out)

    running.transmission._service.serve_nowait = counted
    flood = b"".join(REQUEST.pack(REQUEST_MAGIC, 0, READ, cookie, 0, 1) for cookie in range(5000))
    async with running as peer, asyncio.TaskGroup() as tasks:
        sent = tasks.create_task(peer.send(flood))
        received = tasks.create_task(peer.receive(5000 * 17))
        while not received.done():
            turn += 1
            await asyncio.sleep(0)
        await sent
    assert sum(served.values()) == 5000
    assert max(served.values()) <= 2000


async def test_a_miss_does_not_hold_up_the_rest():
    """A read that waits for its source is answered when it has come; what needs nothing overtakes it."""
    _, volume = make_volume(MemoryDevice(4 * CHUNK), Residency.ABSENT_STORE)
    volume.chunks.set_residency(1, Residency.PRESENT)
    arrived = asyncio.Event()

    class Slow(DictSource):
        async def before_answer(self, chunk: int, demand: bool) -> None:
            await arrived.wait()

    volume.set_source(Residency.ABSENT_STORE, Slow({0: b"a" * CHUNK}))
    async with Running(volume) as peer:
        await peer.request(READ, 0, 3, cookie=1)
        await peer.request(READ, CHUNK, 3, cookie=2)
        assert await peer.reply(3) == (2, 0, bytes(3))
        arrived.set()
        assert await peer.reply(3) == (1, 0, b"aaa")


async def test_half_a_write_is_never_applied():
    """A client that vanishes in the middle of a payload has changed nothing, however large it was."""
    volume = memory(4 * MIB)
    for length in (100, 300_000, 2 * MIB):
        async with Running(volume) as peer:
            await peer.write(0, b"whole")
            await peer.request(WRITE, 5, length, payload=b"half" * (length // 8))
        assert bytes(await volume.read(0, length)) == b"whole" + bytes(length - 5)


async def test_goodbye_waits_for_what_is_in_flight():
    """DISC ends the connection after the requests before it have been carried out and answered."""
    device = HeldDevice(16 * CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    async with Running(volume) as peer:
        await peer.request(WRITE, 0, payload=b"x" * CHUNK, cookie=9)
        held = await device.next("write")
        await peer.request(DISC)
        await peer.request(READ, 0, 1, cookie=10)
        held.release()
        assert await peer.reply() == (9, 0, b"")
        assert await peer.wait_closed() == b""
    assert bytes(await volume.read(0, 1)) == b"x"


async def test_a_client_that_closes_its_side_still_gets_its_replies():
    """The end of the stream is a goodbye without the word."""
    device = HeldDevice(16 * CHUNK, slow="read", hold="read")
    _, volume = make_volume(device)
    async with Running(volume) as peer:
        await peer.request(READ, 0, 3, cookie=9)
        held = await device.next("read")
        peer.sock.shutdown(socket.SHUT_WR)
        held.release()
        assert await peer.reply(3) == (9, 0, bytes(3))
        assert await peer.wait_closed() == b""


async def test_a_broken_connection_cancels_what_is_in_flight():
    """A write that was under way when the client was lost never happens afterwards."""
    device = HeldDevice(16 * CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    running = Running(volume)
    async with running as peer:
        await peer.request(WRITE, 0, payload=b"x" * CHUNK)
        await device.next("write")
        running.transmission.abort()
        await peer.wait_closed()
    assert device.log == []
    assert bytes(await volume.read(0, 1)) == b"\0"


async def test_cancelling_the_owner_cancels_the_requests():
    """Nothing of a connection outlives the coroutine that serves it."""
    device = HeldDevice(16 * CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    running = Running(volume)
    async with running as peer:
        await peer.request(WRITE, 0, payload=b"x" * CHUNK)
        await device.next("write")
        running.task.cancel()
        assert await peer.wait_closed() == b""
    assert device.log == []


async def test_nonsense_ends_the_connection_after_what_came_before_it():
    """Complete requests are served; then nobody knows where the next one starts."""
    volume = memory()
    running = Running(volume)
    async with running as peer:
        await peer.request(WRITE, 0, payload=b"kept")
        await peer.send(b"\xee" * 100)
        assert len(await peer.wait_closed()) == 16
    assert "0xeeeeeeee" in str(running.transmission.error)
    assert bytes(await volume.read(0, 4)) == b"kept"


async def test_a_client_that_does_not_listen_stops_itself():
    """Replies that nobody takes stop the reading of requests; all of them arrive once the client listens."""
    volume = memory(4 * MIB)
    volume.write_nowait(0, b"r" * 4 * MIB)
    running = Running(volume)
    async with running as peer:
        count = 64
        for cookie in range(count):
            await peer.request(READ, 0, MIB, cookie=cookie)
        await condition(lambda: running.budget.used > 0)
        assert running.budget.used <= 2 * MIB
        for cookie in range(count):
            assert await peer.reply(MIB) == (cookie, 0, b"r" * MIB)
        await condition(lambda: running.budget.used == 0)


async def test_replies_that_wait_are_not_changed_by_later_writes():
    """What could not be sent at once was copied: it shows what was there when the read was carried out."""
    volume = memory(4 * MIB)
    volume.write_nowait(0, b"o" * 4 * MIB)
    running = Running(volume)
    async with running as peer:
        await peer.request(READ, 0, 4 * MIB)
        await condition(lambda: running.budget.used > 0)
        volume.write_nowait(0, b"n" * 4 * MIB)
        assert await peer.reply(4 * MIB) == (1, 0, b"o" * 4 * MIB)


@pytest.mark.parametrize("limit", ["held_bytes", "budget", "requests_in_flight"])
async def test_requests_in_flight_are_bounded(limit: str):
    """Beyond the connection's bytes, the server's bytes or the number of requests, the rest stays in the socket."""
    device = HeldDevice(16 * CHUNK, slow="read", hold="read")
    _, volume = make_volume(device)
    allowed = 3
    bound = allowed if limit == "requests_in_flight" else allowed * CHUNK
    running = Running(volume, **{limit: bound})
    async with running as peer:
        for cookie in range(10):
            await peer.request(READ, cookie * CHUNK, CHUNK, cookie=cookie)
        held = [await device.next("read") for _ in range(allowed)]
        for done in range(10 - allowed):
            for _ in range(20):
                await asyncio.sleep(0)
            assert device._held.empty()
            held[done].release()
            assert await peer.reply(CHUNK) == (done, 0, bytes(CHUNK))
            held.append(await device.next("read"))
        for call in held:
            call.release()


async def test_a_request_larger_than_every_limit_is_served_alone():
    """Who holds nothing may always have one request, so that nobody starves."""
    device = HeldDevice(64 * CHUNK, slow="read write")
    _, volume = make_volume(device)
    async with Running(volume, held_bytes=CHUNK, budget=CHUNK) as peer:
        for _ in range(2):
            assert await peer.write(0, b"w" * 20 * CHUNK) == 0
            assert await peer.read(0, 20 * CHUNK) == b"w" * 20 * CHUNK


async def test_connections_that_share_a_budget_take_turns():
    """What one gives back wakes another that waits for it."""
    device = HeldDevice(16 * CHUNK, slow="read", hold="read")
    _, volume = make_volume(device)
    one, two = Running(volume), Running(volume)
    two.transmission._budget = two.budget = one.budget
    one.budget.limit = 2 * CHUNK
    async with one as first, two as second:
        for cookie in range(2):
            await first.request(READ, 0, CHUNK, cookie=cookie)
        held = [await device.next("read") for _ in range(2)]
        for cookie in range(2):
            await second.request(READ, 0, CHUNK, cookie=cookie)
        held.append(await device.next("read"))  # its one request; the other has to wait
        for _ in range(20):
            await asyncio.sleep(0)
        assert device._held.empty()
        for call in held[:2]:
            call.release()
        held.append(await device.next("read"))
        for call in held:
            call.release()
        assert [(await second.reply(CHUNK))[0] for _ in range(2)] == [0, 1]


async def test_draining_finishes_what_is_in_flight_and_refuses_the_rest():
    """Requests that come while a drain waits are answered with ESHUTDOWN; then the connection closes."""
    device = HeldDevice(16 * CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    running = Running(volume)
    async with running as peer:
        await peer.request(WRITE, 0, payload=b"x" * CHUNK, cookie=1)
        held = await device.next("write")
        running.transmission.drain()
        await peer.request(WRITE, CHUNK, payload=b"y" * CHUNK, cookie=2)
        assert await peer.reply() == (2, NbdError.ESHUTDOWN, b"")
        held.release()
        assert await peer.reply() == (1, 0, b"")
        assert await peer.wait_closed() == b""
    assert bytes(await volume.read(CHUNK - 1, 2)) == b"x\0"


async def test_a_client_that_asks_one_by_one_is_expected_to_go_on():
    """After a few single requests the loop is told to wait awake, and no longer once several come together."""
    running = Running(memory())
    expected = 0

    def expect_soon() -> None:
        nonlocal expected
        expected += 1

    running.transmission._expect_soon = expect_soon
    async with running as peer:
        for cookie in range(10):
            await peer.request(READ, 0, 1, cookie=cookie)
            assert await peer.reply(1) == (cookie, 0, bytes(1))
        assert expected == 10 - 4
        await peer.send(b"".join(REQUEST.pack(REQUEST_MAGIC, 0, READ, cookie, 0, 1) for cookie in range(8)))
        await peer.receive(8 * 17)
        assert expected == 10 - 4


async def test_the_rest_of_a_large_payload_is_expected():
    """Until it has come there is nothing to do, and it is on its way."""
    running = Running(memory(1 << 20))
    told = asyncio.Event()
    running.transmission._expect_soon = told.set
    payload = bytes(range(256)) * 1024
    message = REQUEST.pack(REQUEST_MAGIC, 0, WRITE, 7, 0, len(payload)) + payload
    async with running as peer:
        await peer.send(message[:100_000])
        await condition(told.is_set)
        await peer.send(message[100_000:])
        assert await peer.reply() == (7, 0, b"")


async def test_draining_an_idle_connection_answers_what_had_arrived():
    """Bytes that wait in the socket are not dropped without a word."""
    running = Running(memory())
    async with running as peer:
        await condition(lambda: running.transmission._stream.is_reading)
        await peer.request(READ, 0, 1, cookie=5)
        running.transmission.drain()
        assert await peer.reply() == (5, NbdError.ESHUTDOWN, b"")
        assert await peer.wait_closed() == b""


async def test_a_flush_covers_what_was_answered_before_it():
    """A write that was acknowledged on one connection is on the medium when another's flush is answered."""
    device = HeldDevice(16 * CHUNK, hold="flush")
    _, volume = make_volume(device)
    async with Running(volume) as one, Running(volume) as two:
        assert await one.write(0, b"x" * CHUNK) == 0
        await two.request(FLUSH, cookie=3)
        held = await device.next("flush")
        held.release()
        assert await two.reply() == (3, 0, b"")
        await one.request(WRITE, 0, payload=b"y", flags=CommandFlag.FUA, cookie=4)
        (await device.next("flush")).release()
        assert await one.reply() == (4, 0, b"")
    assert device.log.count(("flush", 0)) == 2


async def test_settling_serves_what_had_arrived_and_waits_for_its_changes():
    """After it no byte that the client sent before can change the volume."""
    device = HeldDevice(16 * CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    running = Running(volume)
    async with running as peer, asyncio.TaskGroup() as tasks:
        await condition(lambda: running.transmission._stream.is_reading)
        for cookie in range(3):
            await peer.request(WRITE, cookie * CHUNK, payload=b"x" * CHUNK, cookie=cookie)
        settled = tasks.create_task(running.transmission.settle())
        for left in (2, 1, 0):
            held = await device.next("write")
            assert not settled.done()
            held.release()
            await condition(lambda left=left: len(device.log) == 3 - left)
        await settled
    assert bytes(await volume.read(0, 3 * CHUNK)) == b"x" * 3 * CHUNK


async def test_settling_waits_for_room_too():
    """Bytes that back-pressure keeps in the socket are served before the call returns."""
    device = HeldDevice(16 * CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    running = Running(volume, requests_in_flight=1)
    async with running as peer, asyncio.TaskGroup() as tasks:
        for cookie in range(3):
            await peer.request(WRITE, cookie * CHUNK, payload=b"x" * CHUNK, cookie=cookie)
        await condition(lambda: len(running.transmission._flight) == 1)
        settled = tasks.create_task(running.transmission.settle())
        for _ in range(3):
            held = await device.next("write")
            assert not settled.done()
            held.release()
        await settled
    assert [offset for _, offset in device.log] == [0, CHUNK, 2 * CHUNK]


async def test_settling_does_not_wait_for_a_client_that_does_not_listen():
    """Its changes are carried out in spite of its unread replies; what it asked besides is answered when it listens."""
    volume = memory(4 * MIB)
    volume.write_nowait(0, b"r" * 4 * MIB)
    running = Running(volume)
    async with running as peer:
        for cookie in range(4):
            await peer.request(READ, 0, MIB, cookie=cookie)
        await condition(lambda: running.transmission._starved)
        for cookie in range(4, 8):
            await peer.request(WRITE, cookie * CHUNK, payload=b"w" * CHUNK, cookie=cookie)
            await peer.request(READ, 2 * MIB, 512, cookie=cookie + 4)
        await running.transmission.settle()
        assert bytes(volume.read_nowait(4 * CHUNK, 4 * CHUNK)) == b"w" * 4 * CHUNK
        lengths = {**dict.fromkeys(range(4), MIB), **dict.fromkeys(range(8, 12), 512)}
        answered = []
        for _ in range(12):
            _, code, cookie = SIMPLE_REPLY.unpack(await peer.receive(SIMPLE_REPLY.size))
            assert code == 0
            await peer.receive(lengths.get(cookie, 0))
            answered.append(cookie)
        assert sorted(answered) == list(range(12))
        await peer.request(READ, 0, 512, cookie=12)
        assert await peer.reply(512) == (12, 0, b"r" * 512)


async def test_settling_waits_for_changes_that_have_no_place_in_flight_yet():
    """A write behind a read that takes the only place is over before the call returns."""
    device = HeldDevice(16 * CHUNK, slow="read write", hold="read")
    _, volume = make_volume(device)
    running = Running(volume, requests_in_flight=1)
    async with running as peer, asyncio.TaskGroup() as tasks:
        await peer.request(READ, 0, CHUNK)
        held = await device.next("read")
        await peer.request(WRITE, CHUNK, payload=b"w" * CHUNK)
        settled = tasks.create_task(running.transmission.settle())
        await condition(lambda: running.transmission._waiting)
        assert not settled.done()
        held.release()
        await settled
        assert device.log == [("read", 0), ("write", CHUNK)]


async def test_settling_gives_up_on_a_flood(monkeypatch: pytest.MonkeyPatch):
    """What can be put aside is bounded: the connection ends, and nothing of it can happen any more."""
    monkeypatch.setattr(nbd_transmission, "_ASIDE_MAX", 10)
    volume = memory(4 * MIB)
    running = Running(volume)
    async with running as peer:
        for cookie in range(4):
            await peer.request(READ, 0, MIB, cookie=cookie)
        await condition(lambda: running.transmission._starved)
        for cookie in range(4, 20):
            await peer.request(READ, 0, 512, cookie=cookie)
        await running.transmission.settle()
    assert "does not listen" in str(running.transmission.error)


async def test_settling_an_ended_connection_returns():
    """There is nothing left that could happen."""
    running = Running(memory())
    async with running as peer:
        await peer.request(DISC)
        await peer.wait_closed()
    await running.transmission.settle()
    assert running.transmission.error is None


async def test_an_error_of_ours_ends_the_connection_and_reaches_its_owner():
    """A bug is not answered with a polite error: nobody knows what it has left behind."""
    device = HeldDevice(16 * CHUNK, slow="read")
    _, volume = make_volume(device)

    async def broken(offset: int, length: int) -> bytes:
        raise ZeroDivisionError

    device.inner.read = broken
    running = Running(volume)
    with pytest.raises(ExceptionGroup):
        async with running as peer:
            await peer.request(READ, 0, 1)
            await peer.wait_closed()
    assert running.task.done()
