"""Extended headers: what no packaged client speaks yet, so ours does, against our server."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from silo.errors import InvalidRequestError
from silo.exports.nbd_chunks import encode_status_filter
from silo.exports.nbd_client import NbdClient
from silo.exports.nbd_client_dial import list_contexts
from silo.exports.nbd_options import encode_context_queries, encode_info_request
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import Command, NbdError, Option, OptionReply
from tests.interop.conftest import StartServer
from tests.support.nbd import NbdServerProcess

pytestmark = pytest.mark.interop

KIB, TIB = 1 << 10, 1 << 40
PAYLOAD_LEN = 1 << 5
CONTEXTS = ["base:allocation", "silo:residency"]


@asynccontextmanager
async def connected(server: NbdServerProcess) -> AsyncIterator[NbdClient]:
    async with await NbdClient.connect(server.uri("disk"), contexts=CONTEXTS) as client:
        assert client.export.style is HeaderStyle.EXTENDED
        yield client


async def test_reads_writes_and_zeros(served: NbdServerProcess) -> None:
    content = os.urandom(300_000)
    async with connected(served) as client:
        await client.write(1000, content, fua=True)
        assert await client.read(1000, len(content)) == content
        assert await client.write_zeroes(2000, 100_000)
        await client.flush()
        expected = content[:1000] + bytes(100_000) + content[101_000:]
        assert await client.read(1000, len(content)) == expected
        await client.trim(0, 1 << 20)
        await client.cache(0, 1 << 20)


async def test_64_bit_lengths(start_server: StartServer) -> None:
    """A disk of 2 TiB is zeroed, trimmed and described by one request each, and the ends are where they should be."""
    server = start_server("--memory", "2T")
    async with connected(server) as client:
        for offset in (0, TIB, 2 * TIB - 4096):
            await client.write(offset, b"x" * 4096)
        assert await _runs(client, 2 * TIB) == [
            (64 * KIB, 0),
            (TIB - 64 * KIB, 3),
            (64 * KIB, 0),
            (TIB - 128 * KIB, 3),
            (64 * KIB, 0),
        ]
        assert await client.write_zeroes(0, 2 * TIB - 4096)
        assert await client.read(0, 4096) == bytes(4096)
        assert await client.read(TIB, 4096) == bytes(4096)
        assert await client.read(2 * TIB - 4096, 4096) == b"x" * 4096
        await client.trim(0, 2 * TIB, fua=True)
        assert await client.read(2 * TIB - 4096, 4096) == bytes(4096)


async def _runs(client: NbdClient, size: int) -> list[tuple[int, int]]:
    """The allocation of a whole disk; a server may answer for a part of it at a time."""
    runs: list[tuple[int, int]] = []
    offset = 0
    while offset < size:
        for length, flags in (await client.block_status(offset, size - offset))["base:allocation"]:
            offset += length
            if runs and runs[-1][1] == flags:
                length += runs.pop()[0]
            runs.append((length, flags))
    return runs


async def test_status_of_chosen_contexts(served: NbdServerProcess) -> None:
    async with connected(served) as client:
        await client.write(0, b"x" * 64 * KIB)
        await client.write_zeroes(64 * KIB, 64 * KIB)
        both = await client.block_status(0, 128 * KIB)
        assert both["base:allocation"][0] == (64 * KIB, 0)
        assert both["silo:residency"][0] == (64 * KIB, 1)
        only = await client.block_status(0, 128 * KIB, contexts=["silo:residency"])
        assert list(only) == ["silo:residency"]
        one = await client.block_status(4 * KIB, 4 * KIB, one=True)
        assert one == {"base:allocation": [(4 * KIB, 0)], "silo:residency": [(4 * KIB, 1)]}


async def test_contexts_are_listed(served: NbdServerProcess) -> None:
    listed = await list_contexts(served.uri("disk"))
    assert set(CONTEXTS) <= set(listed)
    assert await list_contexts(served.uri("disk"), queries=["base:", "nobody:"]) == ["base:allocation"]


async def test_a_context_that_was_not_agreed_upon(served: NbdServerProcess) -> None:
    async with connected(served) as client:
        with pytest.raises(InvalidRequestError, match="agreed upon"):
            await client.block_status(0, 4096, contexts=["x:y"])


def test_negotiation_order_and_precedence(served: NbdServerProcess) -> None:
    """Extended headers beat structured ones, whichever comes first; EXPORT_NAME is closed afterwards."""
    with served.raw() as client:
        client.greet()
        assert client.option(Option.STRUCTURED_REPLY)[-1][0] == OptionReply.ACK
        assert client.option(Option.EXTENDED_HEADERS)[-1][0] == OptionReply.ACK
        assert client.option(Option.STRUCTURED_REPLY)[-1][0] == OptionReply.ERR_EXT_HEADER_REQD
        queries = encode_context_queries("disk", ["base:allocation"])
        assert client.option(Option.SET_META_CONTEXT, queries)[-1][0] == OptionReply.ACK
        assert client.option(Option.GO, encode_info_request("disk"))[-1][0] == OptionReply.ACK
        client.extended = True
        assert client.ask(Command.READ, 0, 512).code == 0


def test_payloads_are_consumed_even_where_they_do_not_belong(served: NbdServerProcess) -> None:
    """A request with a payload that it must not have, or without one that it must: refused, and in step."""
    with served.raw() as client:
        client.go(style=Option.EXTENDED_HEADERS)
        for command in (Command.READ, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES, Command.CACHE, 99):
            assert client.ask(command, 0, 512, b"p" * 512, flags=PAYLOAD_LEN).code == NbdError.EINVAL
        assert client.ask(Command.WRITE, 0, 512).code == NbdError.EINVAL
        assert client.ask(Command.FLUSH).code == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"short",
        struct.pack(">QI", 4096, 0)[:-1],
        encode_status_filter(4096, [77]),
        encode_status_filter(4096, [0, 0]),
        encode_status_filter(4096, [1, 1]),
        encode_status_filter(1 << 62, [0]),
    ],
    ids=["empty", "short", "odd", "unknown", "twice 0", "twice 1", "too long"],
)
def test_status_filters_that_make_no_sense(served: NbdServerProcess, payload: bytes) -> None:
    with served.raw() as client:
        client.greet()
        assert client.option(Option.EXTENDED_HEADERS)[-1][0] == OptionReply.ACK
        queries = encode_context_queries("disk", ["base:allocation"])
        assert client.option(Option.SET_META_CONTEXT, queries)[-1][0] == OptionReply.ACK
        assert client.option(Option.GO, encode_info_request("disk"))[-1][0] == OptionReply.ACK
        client.extended = True
        flags = PAYLOAD_LEN if payload else 0
        reply = client.ask(Command.BLOCK_STATUS, 0, len(payload), payload, flags=flags)
        assert reply.code == NbdError.EINVAL
        assert client.ask(Command.READ, 0, 512).code == 0
