"""Arbitrary clients against a whole server: every one ends in answers, a clean error or a close, and costs only itself.

A script is a list of messages that are well formed, damaged, or not messages at all; it is sent in pieces of any
size, and the client then closes its side. What hypothesis finds is printed so that it can be replayed.
"""

from __future__ import annotations

import asyncio
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from silo.chunkmap import Residency
from silo.devices.memory import MemoryDevice
from silo.exports.nbd_options import encode_context_queries, encode_info_request
from silo.exports.nbd_server import NbdServerSettings
from silo.exports.nbd_transmission import TransmissionLimits
from tests.support.nbd_peer import Peer, condition, serving
from tests.support.volumes import CHUNK, DictSource, make_volume

COUNT = 8
SIZE = COUNT * CHUNK
BUDGET = 64 * CHUNK

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 511, 512, CHUNK, SIZE - 1, SIZE, SIZE + 1, 1 << 31, (1 << 32) - 1]),
    st.integers(0, SIZE),
)
OFFSETS = st.one_of(NUMBERS, st.sampled_from([1 << 63, (1 << 64) - 1]))
PAYLOADS = st.builds(bytes.__mul__, st.binary(min_size=1, max_size=3), st.integers(0, 2000))


def option(kind: int, data: bytes) -> bytes:
    return struct.pack(">QII", 0x49484156454F5054, kind, len(data)) + data


def request(extended: bool, flags: int, command: int, offset: int, length: int, payload: bytes) -> bytes:
    """A request whose length agrees with its payload if it has one."""
    length = len(payload) or length
    if extended:
        return (
            struct.pack(">IHHQQQ", 0x21E41C71, flags | 32 * bool(payload), command, 5, offset, length)
            + payload
        )
    return struct.pack(">IHHQQI", 0x25609513, flags, command, 5, offset, length & 0xFFFFFFFF) + payload


OPTIONS = st.one_of(
    st.builds(option, st.integers(0, 13), st.binary(max_size=30)),
    st.builds(option, st.sampled_from([8, 11]), st.just(b"")),
    st.builds(option, st.sampled_from([9, 10]), st.just(encode_context_queries("disk", ["base:allocation"]))),
    st.builds(option, st.just(6), st.just(encode_info_request("disk", [3]))),
)
GO = st.one_of(
    st.just(option(7, encode_info_request("disk", [3]))),
    st.just(option(1, b"disk")),
    st.builds(option, st.just(7), st.binary(max_size=20)),
)


@st.composite
def scripts(draw: st.DrawFn) -> bytes:
    """A conversation from the client's side: plausible as a whole, with damage here and there."""
    extended = draw(st.booleans())
    parts = [draw(st.sampled_from([b"\0\0\0\3", b"\0\0\0\3", b"\0\0\0\1", b"\0\0\1\0", b""]))]
    if extended:
        parts.append(option(11, b""))
    parts += draw(st.lists(OPTIONS, max_size=4))
    parts.append(draw(GO))
    requests = st.builds(
        request,
        st.just(extended),
        st.one_of(st.just(0), st.integers(0, 63), st.integers(0, 65535)),
        st.integers(0, 9),
        OFFSETS,
        NUMBERS,
        st.one_of(st.just(b""), PAYLOADS),
    )
    parts += draw(st.lists(st.one_of(requests, requests, requests, st.binary(max_size=40)), max_size=12))
    return b"".join(parts)


@settings(max_examples=150)
@given(st.one_of(scripts(), st.binary(max_size=300)), st.lists(st.integers(1, 5000), min_size=1, max_size=6))
async def test_no_client_costs_more_than_its_own_connection(script: bytes, pieces: list[int]):
    """Whatever is sent, the connection ends, its memory is given back, and the next client is served."""
    _, volume = make_volume(MemoryDevice(SIZE), Residency.PRESENT)
    volume.chunks.set_residency_run(4, COUNT, Residency.ABSENT_STORE)
    volume.set_source(Residency.ABSENT_STORE, DictSource(dict.fromkeys(range(COUNT), b"s" * CHUNK)))
    limits = NbdServerSettings(
        payload_bytes=BUDGET, limits=TransmissionLimits(held_bytes=BUDGET, requests_in_flight=4)
    )
    async with serving(volume, settings=limits, payload_max=4 * CHUNK) as server:
        async with Peer(server) as peer, asyncio.TaskGroup() as tasks:
            heard = tasks.create_task(peer.wait_closed())
            try:
                position = turn = 0
                while position < len(script):
                    piece = pieces[turn % len(pieces)]
                    await peer.send(script[position : position + piece])
                    assert server._budget.used <= BUDGET + SIZE + 4 * CHUNK
                    position += piece
                    turn += 1
                peer.sock.shutdown(1)
            except ConnectionError:
                assert server.connections <= 1  # the server has had enough of this client
            assert (await heard)[:8] == b"NBDMAGIC"
        await condition(lambda: server.connections == 0)
        assert server._budget.used == 0
        async with Peer(server) as peer:
            await peer.go("disk")
            assert len(await peer.read(0, CHUNK)) == CHUNK
