"""What libnbd makes of our server, with its own judgment switched off so that illegal requests are really sent.

libnbd 1.14 knows structured replies but not extended headers; those are for our own client (see
``test_nbd_extended``).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.interop.conftest import EXPORT_SIZE, StartServer
from tests.support.nbd import NbdServerProcess

pytestmark = pytest.mark.interop

Open = Callable[..., Any]
END = EXPORT_SIZE
KIB = 1024
UNKNOWN_FLAG = 1 << 15
READ, WRITE, ZERO, TRIM, CACHE, STATUS = ("pread", "pwrite", "zero", "trim", "cache", "block_status")


@pytest.fixture
def connect(libnbd: ModuleType) -> Iterator[Open]:
    """``connect(server, ...)``: a handle without strictness; closed at the end."""
    handles = []

    def connect(
        server: NbdServerProcess, *, structured: bool = True, handshake: int = 3, export: str = "disk"
    ) -> Any:
        handle = libnbd.NBD()
        handle.set_strict_mode(0)
        handle.set_handshake_flags(handshake)
        handle.set_request_structured_replies(structured)
        if structured:
            handle.add_meta_context(libnbd.CONTEXT_BASE_ALLOCATION)
        handle.connect_uri(server.uri(export))
        handles.append(handle)
        return handle

    yield connect
    for handle in handles:
        if handle.aio_is_ready():  # others have been hung up on
            handle.shutdown()
    handles.clear()


@pytest.fixture(params=[True, False], ids=["structured", "simple"])
def handle(request: pytest.FixtureRequest, connect: Open, served: NbdServerProcess) -> Any:
    """A connection with and without structured replies."""
    return connect(served, structured=request.param)


def refused(libnbd: ModuleType, call: Callable[[], object]) -> str:
    """The name of the error that a request is answered with; the connection must survive it."""
    with pytest.raises(libnbd.Error) as caught:
        call()
    return str(caught.value.errno)


def ask(handle: Any, command: str, offset: int, length: int, flags: int = 0) -> object:
    """Send any command with any extent."""
    if command == READ:
        return handle.pread(length, offset, flags)
    if command == WRITE:
        return handle.pwrite(b"x" * length, offset, flags)
    if command == STATUS:
        return handle.block_status(length, offset, lambda *_: 0, flags)
    return getattr(handle, command)(length, offset, flags)


def test_reads_back_what_it_writes_at_any_alignment(handle: Any) -> None:
    """Extents that begin and end anywhere, across the borders of blocks and chunks."""
    for offset, length in ((0, 1), (511, 2), (4095, 4098), (65535, 2), (65536, 65536), (100, 300_000)):
        content = bytes((offset + i) % 251 for i in range(length))
        handle.pwrite(content, offset)
        assert handle.pread(length, offset) == content


def test_zeros_and_trims(handle: Any, libnbd: ModuleType) -> None:
    handle.pwrite(b"x" * 256 * KIB, 0)
    handle.zero(100 * KIB, 10 * KIB)
    handle.zero(1000, 200 * KIB, libnbd.CMD_FLAG_NO_HOLE)
    handle.trim(3, 255 * KIB)
    assert handle.pread(10 * KIB, 0) == b"x" * 10 * KIB
    assert handle.pread(100 * KIB, 10 * KIB) == bytes(100 * KIB)
    assert handle.pread(2000, 200 * KIB - 500) == b"x" * 500 + bytes(1000) + b"x" * 500
    handle.cache(EXPORT_SIZE, 0)
    handle.flush()


@pytest.mark.parametrize("command", [WRITE, ZERO, TRIM])
def test_fua_is_accepted_by_everything_that_changes(handle: Any, libnbd: ModuleType, command: str) -> None:
    ask(handle, command, 4096, 4096, libnbd.CMD_FLAG_FUA)
    assert len(handle.pread(4096, 4096)) == 4096


def test_fua_is_accepted_by_everything_else(
    connect: Open, served: NbdServerProcess, libnbd: ModuleType
) -> None:
    """Clients are known to set it anywhere."""
    handle = connect(served)
    for command in (READ, CACHE, STATUS):
        ask(handle, command, 0, 512, libnbd.CMD_FLAG_FUA)
    handle.flush(libnbd.CMD_FLAG_FUA)
    assert not handle.aio_is_dead()


@pytest.mark.parametrize(
    ("command", "code"),
    [(READ, "EINVAL"), (WRITE, "ENOSPC"), (ZERO, "ENOSPC"), (TRIM, "EINVAL"), (CACHE, "EINVAL")],
)
@pytest.mark.parametrize(
    ("offset", "length"), [(END, 1), (END - 512, 1024), (END + (1 << 40), 512), ((1 << 63) - 512, 1024)]
)
def test_requests_past_the_end(
    handle: Any, libnbd: ModuleType, command: str, code: str, offset: int, length: int
) -> None:
    """Each is refused with the code that the protocol names, and the connection lives on."""
    assert refused(libnbd, lambda: ask(handle, command, offset, length)) == code
    assert len(handle.pread(512, END - 512)) == 512


def test_status_past_the_end(connect: Open, served: NbdServerProcess, libnbd: ModuleType) -> None:
    handle = connect(served)
    assert refused(libnbd, lambda: ask(handle, STATUS, END - 512, 1024)) == "EINVAL"
    assert len(handle.pread(512, 0)) == 512


def test_status_without_a_context(connect: Open, served: NbdServerProcess, libnbd: ModuleType) -> None:
    handle = connect(served, structured=False)
    assert refused(libnbd, lambda: ask(handle, STATUS, 0, 1024)) == "EINVAL"
    assert len(handle.pread(512, 0)) == 512


@pytest.mark.parametrize("command", [READ, WRITE, ZERO, TRIM, CACHE])
def test_unknown_flags(handle: Any, libnbd: ModuleType, command: str) -> None:
    """A write with an unknown flag is refused, its payload is consumed, and nothing was written."""
    handle.pwrite(b"before" * 100, 0)
    assert refused(libnbd, lambda: ask(handle, command, 0, 600, UNKNOWN_FLAG)) == "EINVAL"
    assert handle.pread(600, 0) == b"before" * 100


@pytest.mark.parametrize("command", [READ, WRITE, ZERO, TRIM, CACHE])
def test_flags_that_belong_to_another_command(handle: Any, libnbd: ModuleType, command: str) -> None:
    assert refused(libnbd, lambda: ask(handle, command, 0, 512, libnbd.CMD_FLAG_REQ_ONE)) == "EINVAL"
    assert len(handle.pread(512, 0)) == 512


@pytest.mark.parametrize("command", [READ, WRITE, ZERO, TRIM, CACHE])
def test_zero_length_does_no_harm(handle: Any, libnbd: ModuleType, command: str) -> None:
    """The protocol leaves the answer open, but not the connection."""
    try:
        ask(handle, command, 0, 0)
    except libnbd.Error as error:
        assert error.errnum == errno.EINVAL  # noqa: PT017
    assert len(handle.pread(512, 0)) == 512


def test_a_read_larger_than_the_limit_is_refused(handle: Any, libnbd: ModuleType) -> None:
    limit = handle.get_block_size(libnbd.SIZE_MAXIMUM)
    assert len(handle.pread(limit, 0)) == limit
    assert refused(libnbd, lambda: handle.pread(limit + 512, 0)) in ("EINVAL", "EOVERFLOW")
    assert len(handle.pread(512, 0)) == 512


def test_a_write_larger_than_the_limit_changes_nothing(
    connect: Open, served: NbdServerProcess, libnbd: ModuleType
) -> None:
    """Refused, or answered by hanging up, which the protocol allows for a payload beyond all limits."""
    handle = connect(served)
    limit = handle.get_block_size(libnbd.SIZE_MAXIMUM)
    handle.pwrite(b"y" * 4096, 0)
    with pytest.raises(libnbd.Error):
        handle.pwrite(b"x" * (limit + 4096), 0)
    assert connect(served).pread(4096, 0) == b"y" * 4096


def test_zeros_and_trims_larger_than_the_limit(handle: Any, libnbd: ModuleType) -> None:
    """They carry no payload, so the limit is not theirs."""
    handle.pwrite(b"x" * 512, END - 512)
    handle.zero(END, 0)
    assert handle.pread(512, END - 512) == bytes(512)
    handle.trim(END, 0)
    handle.cache(END, 0)


def test_fast_zero(handle: Any, libnbd: ModuleType) -> None:
    """Fast for whole chunks; otherwise declined, with nothing changed."""
    assert handle.can_fast_zero()
    handle.pwrite(b"x" * 256 * KIB, 0)
    handle.zero(64 * KIB, 64 * KIB, libnbd.CMD_FLAG_FAST_ZERO)
    assert handle.pread(64 * KIB, 64 * KIB) == bytes(64 * KIB)
    declined = libnbd.CMD_FLAG_FAST_ZERO | libnbd.CMD_FLAG_NO_HOLE
    assert refused(libnbd, lambda: handle.zero(64 * KIB, 128 * KIB, declined)) in ("ENOTSUP", "EOPNOTSUPP")
    assert handle.pread(64 * KIB, 128 * KIB) == b"x" * 64 * KIB


def test_a_read_only_export(connect: Open, start_server: StartServer, libnbd: ModuleType) -> None:
    """Everything that changes is refused with EPERM, everything else works."""
    handle = connect(start_server("--memory", "1M", "--read-only"))
    assert handle.is_read_only()
    for command in (WRITE, ZERO, TRIM):
        assert refused(libnbd, lambda command=command: ask(handle, command, 0, 512)) == "EPERM"
    assert handle.pread(512, 0) == bytes(512)
    handle.cache(512, 0)
    handle.flush()


def test_a_block_size_is_announced_and_kept_to(
    connect: Open, start_server: StartServer, libnbd: ModuleType
) -> None:
    handle = connect(start_server("--memory", "1M", "--block-size", "4096"))
    assert handle.get_block_size(libnbd.SIZE_MINIMUM) == 4096
    for command in (READ, WRITE, ZERO, TRIM, CACHE):
        assert refused(libnbd, lambda command=command: ask(handle, command, 512, 4096)) == "EINVAL"
        assert refused(libnbd, lambda command=command: ask(handle, command, 0, 512)) == "EINVAL"
        ask(handle, command, 4096, 8192)


def test_structured_reads_show_holes(connect: Open, start_server: StartServer, libnbd: ModuleType) -> None:
    """Chunks cover the extent once; untouched chunks travel as holes, unless the client forbids fragments."""
    handle = connect(start_server("--memory", "1M"))
    handle.pwrite(b"d" * 64 * KIB, 64 * KIB)
    chunks: list[tuple[int, int, int]] = []

    def note(content: bytes, offset: int, kind: int, error: object) -> int:
        chunks.append((offset, len(content), kind))
        return 0

    content = handle.pread_structured(256 * KIB, 0, note)
    assert content == bytes(64 * KIB) + b"d" * 64 * KIB + bytes(128 * KIB)
    hole, data = libnbd.READ_HOLE, libnbd.READ_DATA
    assert sorted(chunks) == [(0, 64 * KIB, hole), (64 * KIB, 64 * KIB, data), (128 * KIB, 128 * KIB, hole)]
    chunks.clear()
    assert handle.pread_structured(256 * KIB, 0, note, libnbd.CMD_FLAG_DF) == content
    assert chunks == [(0, 256 * KIB, data)]


def test_block_status(connect: Open, start_server: StartServer, libnbd: ModuleType) -> None:
    """Coalesced, from the offset that was asked for, and one extent only on request."""
    handle = connect(start_server("--memory", "1M"))
    assert handle.can_meta_context(libnbd.CONTEXT_BASE_ALLOCATION)
    handle.pwrite(b"d" * 128 * KIB, 64 * KIB)
    told: list[tuple[str, int, list[int]]] = []

    def note(context: str, offset: int, extents: list[int], error: object) -> int:
        told.append((context, offset, extents))
        return 0

    handle.block_status(1024 * KIB, 0, note)
    hole = libnbd.STATE_HOLE | libnbd.STATE_ZERO
    everything = [64 * KIB, hole, 128 * KIB, 0, 832 * KIB, hole]
    assert told == [(libnbd.CONTEXT_BASE_ALLOCATION, 0, everything)]
    told.clear()
    handle.block_status(100 * KIB, 100 * KIB, note, libnbd.CMD_FLAG_REQ_ONE)
    assert told == [(libnbd.CONTEXT_BASE_ALLOCATION, 100 * KIB, [92 * KIB, 0])]


def test_many_requests_in_flight(handle: Any, libnbd: ModuleType) -> None:
    """A thousand overlapping writes and reads, completed in whatever order."""
    buffers = [libnbd.Buffer.from_bytearray(bytearray(bytes([i % 256]) * 4096)) for i in range(1000)]
    cookies = [handle.aio_pwrite(buffer, i * 4096) for i, buffer in enumerate(buffers)]
    while handle.aio_in_flight():
        handle.poll(-1)
    assert all(handle.aio_command_completed(cookie) for cookie in cookies)
    for i in range(1000):
        assert handle.pread(4096, i * 4096) == bytes([i % 256]) * 4096


@pytest.mark.parametrize("handshake", [0, 1, 2, 3])
def test_every_combination_of_handshake_flags(
    connect: Open, served: NbdServerProcess, handshake: int
) -> None:
    """Without FIXED_NEWSTYLE there is only EXPORT_NAME; without NO_ZEROES 124 zeros follow it."""
    handle = connect(served, structured=False, handshake=handshake)
    assert handle.get_size() == EXPORT_SIZE
    assert len(handle.pread(512, 0)) == 512


@pytest.fixture
def negotiating(libnbd: ModuleType, served: NbdServerProcess) -> Iterator[Any]:
    """A handle that stays in the handshake."""
    handle = libnbd.NBD()
    handle.set_opt_mode(True)
    handle.set_strict_mode(0)
    handle.connect_uri(served.uri("disk"))
    yield handle
    if handle.aio_is_negotiating():
        handle.opt_abort()


def test_options_one_after_another(negotiating: Any, libnbd: ModuleType) -> None:
    """List, ask, fail, and enter transmission all the same."""
    names: list[str] = []
    negotiating.opt_list(lambda name, description: names.append(name) or 0)
    assert "bench/disk" in names
    negotiating.opt_info()
    assert negotiating.get_size() == EXPORT_SIZE
    contexts: list[str] = []
    negotiating.opt_list_meta_context(lambda name: contexts.append(name) or 0)
    assert "base:allocation" in contexts
    negotiating.set_export_name("no-such-export")
    for option in (negotiating.opt_info, negotiating.opt_go):
        assert refused(libnbd, option) == "ENOENT"
    negotiating.set_export_name("disk")
    negotiating.add_meta_context("base:allocation")
    negotiating.add_meta_context("x-nobody:knows-this")
    negotiating.opt_go()
    assert negotiating.get_structured_replies_negotiated()
    assert negotiating.can_meta_context("base:allocation")
    assert not negotiating.can_meta_context("x-nobody:knows-this")
    assert len(negotiating.pread(512, 0)) == 512
    negotiating.shutdown()


def test_wildcards_are_for_listing_only(negotiating: Any, libnbd: ModuleType) -> None:
    negotiating.add_meta_context("base:")
    listed: list[str] = []
    negotiating.opt_list_meta_context(lambda name: listed.append(name) or 0)
    assert listed == ["base:allocation"]
    negotiating.opt_go()
    assert not negotiating.can_meta_context("base:")
    assert not negotiating.can_meta_context("base:allocation")
    negotiating.shutdown()


def test_abort(negotiating: Any) -> None:
    negotiating.opt_abort()
    assert negotiating.aio_is_closed()
