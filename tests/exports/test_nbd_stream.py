"""The socket's driver: what leaves at once, what waits, and that waiting bytes are stable."""

from __future__ import annotations

import asyncio
import socket

import pytest

from silo.exports.nbd_stream import Stream
from tests.support.nbd_peer import Peer, condition

MIB = 1 << 20


def pair() -> tuple[Stream, Peer]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return Stream(ours), Peer(sock=theirs)


async def test_parts_leave_in_order_and_at_once():
    """Headers and memory side by side, more of them than one system call takes."""
    stream, peer = pair()
    parts = [bytes([index % 251]) for index in range(3000)]
    stream.post([*parts])
    assert stream.queued == 0
    assert await peer.receive(3000) == b"".join(parts)
    stream.close()
    peer.close()


async def test_what_the_socket_does_not_take_waits_as_a_copy():
    """Order is kept, live memory may change at once, and the end of the queue is announced."""
    stream, peer = pair()
    drained: list[int] = []
    stream.start(lambda: None, lambda: drained.append(stream.queued))
    memory = bytearray(b"a" * 8 * MIB)
    stream.post([b"head", memoryview(memory)])
    assert stream.queued > 0
    memory[:] = b"b" * 8 * MIB
    stream.post([memoryview(memory)[:5]])
    memory[:5] = b"ccccc"
    assert await peer.receive(4 + 8 * MIB + 5) == b"head" + b"a" * 8 * MIB + b"bbbbb"
    await condition(lambda: drained == [0])
    stream.close()
    peer.close()


async def test_reading_can_be_paused():
    """Bytes are announced only while they are wanted."""
    stream, peer = pair()
    seen = asyncio.Event()
    stream.start(seen.set, lambda: None)
    await peer.send(b"hello")
    for _ in range(5):
        await asyncio.sleep(0)
    assert not seen.is_set()
    assert stream.unread() == 5
    stream.resume()
    await seen.wait()
    stream.pause()
    buffer = bytearray(10)
    assert stream.receive_into(memoryview(buffer)) == 5
    assert stream.unread() == 0
    with pytest.raises(BlockingIOError):
        stream.receive_into(memoryview(buffer))
    peer.close()
    assert stream.receive_into(memoryview(buffer)) == 0
    stream.close()


async def test_a_client_that_is_gone_is_an_error_or_the_end():
    """Posting to it raises; a queue for it is dropped, and whoever waits for the end of the queue is told."""
    stream, peer = pair()
    drained = asyncio.Event()
    stream.start(lambda: None, drained.set)
    stream.post([bytes(8 * MIB)])
    peer.close()
    await drained.wait()
    assert stream.queued == 0
    with pytest.raises(OSError):
        stream.post([b"x"])
    stream.close()


async def test_closing_twice_is_harmless_and_drops_the_queue():
    """Nothing stays registered with the loop."""
    stream, peer = pair()
    stream.start(lambda: None, lambda: None)
    stream.resume()
    stream.post([bytes(8 * MIB)])
    stream.close()
    stream.close()
    assert stream.queued == 0
    stream.resume()
    peer.close()


async def test_a_released_socket_lives_on():
    """Another stream can take over where this one stopped."""
    stream, peer = pair()
    other = Stream(stream.release())
    stream.close()
    await other.send(b"still here")
    assert await peer.receive(10) == b"still here"
    await peer.send(b"me too")
    assert await other.receive() == b"me too"
    other.close()
    peer.close()
