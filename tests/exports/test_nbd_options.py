"""Option data: what one side encodes the other decodes, and nothing else decodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import RemoteProtocolError
from silo.exports import nbd_options as options
from silo.exports.nbd_options import BlockSizes
from silo.exports.nbd_wire import Info

NAMES = st.text(max_size=40).filter(lambda name: "\0" not in name)


@given(NAMES, st.lists(st.integers(0, 65535), max_size=5))
def test_info_requests_survive(name: str, infos: list[int]):
    """``INFO`` and ``GO`` carry any name and any kinds of information."""
    assert options.decode_info_request(options.encode_info_request(name, infos)) == (name, tuple(infos))


@given(NAMES, st.lists(NAMES, max_size=5))
def test_context_queries_survive(name: str, queries: list[str]):
    """Metadata queries carry any export and any list of names, in order."""
    assert options.decode_context_queries(options.encode_context_queries(name, queries)) == (name, queries)


def test_replies_survive():
    """What a server tells of an export and its contexts arrives as it was."""
    sizes = BlockSizes(512, 4096, 1 << 25)
    assert options.decode_info_export(options.encode_info_export(1 << 40, 0x1ED)) == (1 << 40, 0x1ED)
    assert options.decode_info_block_size(options.encode_info_block_size(sizes)) == sizes
    assert options.decode_server(options.encode_server("g/d", "a disk")) == ("g/d", "a disk")
    assert options.decode_context(options.encode_context(3, "base:allocation")) == (3, "base:allocation")
    assert options.encode_info_text(Info.NAME, "g/d") == b"\0\1g/d"


INFO = options.encode_info_request("disk", [1, 3])
QUERIES = options.encode_context_queries("disk", ["base:", "silo:heat"])


@pytest.mark.parametrize(
    ("decode", "data"),
    [(options.decode_info_request, INFO), (options.decode_context_queries, QUERIES)],
    ids=["info", "queries"],
)
def test_every_cut_and_every_surplus_byte_is_noticed(decode: Callable[[bytes], Any], data: bytes):
    """Data that ends anywhere early, or has a byte too many, is refused."""
    for length in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            decode(data[:length])
    with pytest.raises(RemoteProtocolError):
        decode(data + b"\0")


@pytest.mark.parametrize("name", [b"x" * 4097, b"a\0b", b"\xff\xfe"], ids=["long", "nul", "latin"])
def test_names_keep_to_the_protocol(name: bytes):
    """A name has at most 4096 bytes, no NUL, and is UTF-8."""
    with pytest.raises(RemoteProtocolError):
        options.decode_name(name)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\4disk\0\0\0\1\xff\xff\xff\xff",
        b"\0\0\0\4disk\xff\xff\xff\xff",
        b"\xff\xff\xff\xffdisk",
    ],
    ids=["query length", "query count", "name length"],
)
def test_huge_numbers_are_not_believed(data: bytes):
    """A length or a count that exceeds the option is refused before anything is allocated for it."""
    with pytest.raises(RemoteProtocolError):
        options.decode_context_queries(data)


@pytest.mark.parametrize(
    "sizes",
    [
        BlockSizes(0, 4096, 1 << 20),
        BlockSizes(3, 4096, 1 << 20),
        BlockSizes(1 << 17, 1 << 17, 1 << 20),
        BlockSizes(512, 256, 1 << 20),
        BlockSizes(512, 5000, 1 << 20),
        BlockSizes(512, 4096, 1024),
    ],
)
def test_impossible_block_sizes_are_refused(sizes: BlockSizes):
    """Constraints that the protocol forbids are noticed by the client."""
    with pytest.raises(RemoteProtocolError):
        options.decode_info_block_size(options.encode_info_block_size(sizes))


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (options.decode_info_export, bytes(11)),
        (options.decode_info_block_size, bytes(13)),
        (options.decode_server, b"\0\0"),
        (options.decode_context, b"\0\0\0\1"),
    ],
)
def test_replies_of_the_wrong_length_are_refused(decode: Callable[[bytes], Any], data: bytes):
    """A client notices information that is too short."""
    with pytest.raises(RemoteProtocolError):
        decode(data)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes):
    """Whatever a stranger sends, the only error is `RemoteProtocolError`."""
    for decode in (
        options.decode_info_request,
        options.decode_context_queries,
        options.decode_name,
        options.decode_server,
        options.decode_context,
        options.decode_info_export,
        options.decode_info_block_size,
    ):
        try:
            decode(data)
        except RemoteProtocolError as error:
            assert str(error)  # noqa: PT017


def test_unusual_sizes_are_those_that_a_client_would_not_assume():
    """Byte granularity and 32 MiB are what a client assumes without being told."""
    assert not BlockSizes(1, 4096, 32 << 20).is_unusual
    assert BlockSizes(512, 4096, 32 << 20).is_unusual
    assert BlockSizes(1, 4096, 1 << 20).is_unusual
