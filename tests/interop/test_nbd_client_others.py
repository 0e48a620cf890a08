"""Our client against servers of other projects, and against ours: it must be at home with all of them."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.common.child import ListeningChild, listen_tcp, listen_unix
from silo.errors import InvalidRequestError, UnavailableError
from silo.exports.nbd_client import NbdClient
from silo.exports.nbd_client_dial import describe_export, list_exports
from silo.exports.nbd_session import HeaderStyle
from tests.interop.conftest import EXPORT_SIZE, StartServer

pytestmark = pytest.mark.interop

RequireTool = Callable[[str], str]
Start = Callable[..., ListeningChild]
MIB = 1 << 20
STYLES = [(), (HeaderStyle.STRUCTURED,), (HeaderStyle.EXTENDED, HeaderStyle.STRUCTURED)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start any server that understands socket activation."""
    children: list[ListeningChild] = []

    def start(*argv: str, tcp: bool = False) -> ListeningChild:
        name = f"server{len(children)}"
        listener = listen_tcp() if tcp else listen_unix(tmp_path / f"{name}.sock")
        children.append(ListeningChild(argv, listener, tmp_path / f"{name}.log"))
        return children[-1]

    yield start
    for child in children:
        child.stop()


@pytest.fixture(params=["nbdkit", "nbdkit-old", "qemu-nbd", "silo"])
def server(
    request: pytest.FixtureRequest,
    require_tool: RequireTool,
    start: Start,
    start_server: StartServer,
    tmp_path: Path,
) -> ListeningChild:
    """A writable export of `EXPORT_SIZE` zeros."""
    if request.param == "silo":
        return start_server("--memory", str(EXPORT_SIZE))
    if request.param == "qemu-nbd":
        (tmp_path / "disk.img").touch()
        os.truncate(tmp_path / "disk.img", EXPORT_SIZE)
        options = ["--persistent", "--format=raw", "--discard=unmap", "--shared=16"]
        return start(require_tool("qemu-nbd"), *options, str(tmp_path / "disk.img"), tcp=True)
    old = ["--no-sr", "--mask-handshake=1"] if request.param == "nbdkit-old" else []
    return start(require_tool("nbdkit"), "-f", *old, "memory", str(EXPORT_SIZE))


@pytest.mark.parametrize("styles", STYLES, ids=["simple", "structured", "richest"])
async def test_against_a_model(server: ListeningChild, styles: tuple[HeaderStyle, ...]) -> None:
    """Random requests on disjoint parts, many at a time, leave what a bytearray says."""
    seed = int.from_bytes(os.urandom(4))
    chance = random.Random(seed)
    model = bytearray(8 * MIB)

    async def work(client: NbdClient, start: int, length: int) -> None:
        for _ in range(40):
            offset = start + 512 * chance.randrange(length // 512)
            size = min(512 * chance.randrange(1, 600), start + length - offset)
            kind = chance.choice(["write", "write", "read", "zero"])
            if kind == "write":
                model[offset : offset + size] = content = chance.randbytes(size)
                await client.write(offset, content, fua=chance.random() < 0.1)
            elif kind == "zero":
                model[offset : offset + size] = bytes(size)
                await client.write_zeroes(offset, size, no_hole=chance.random() < 0.2)
            else:
                expected = bytes(model[offset : offset + size])
                assert await client.read(offset, size) == expected, f"seed {seed}"

    async with await NbdClient.connect(server.uri(), styles=styles) as client:
        async with asyncio.TaskGroup() as tasks:
            for lane in range(8):
                tasks.create_task(work(client, lane * MIB, MIB))
        await client.flush()
        assert await client.read(0, len(model)) == model, f"seed {seed}"


async def test_block_status_tells_data_from_holes(server: ListeningChild) -> None:
    async with await NbdClient.connect(server.uri(), contexts=["base:allocation"]) as client:
        if client.export.style is HeaderStyle.SIMPLE:
            with pytest.raises(InvalidRequestError):
                await client.block_status(0, EXPORT_SIZE)
            return
        await client.write(MIB, os.urandom(MIB))
        extents = (await client.block_status(0, EXPORT_SIZE))["base:allocation"]
        assert extents[:2] == [(MIB, 3), (MIB, 0)]
        assert (await client.block_status(0, MIB, one=True)) == {"base:allocation": [(MIB, 3)]}


async def test_sparse_reads_are_put_together(require_tool: RequireTool, start: Start, tmp_path: Path) -> None:
    """qemu-nbd answers one read with many chunks, data and holes; nbdcopy is the judge."""
    image = tmp_path / "disk.img"
    chance = random.Random(7)
    with image.open("wb") as file:
        file.truncate(EXPORT_SIZE)
        for _ in range(200):
            file.seek(4096 * chance.randrange(EXPORT_SIZE // 4096))
            file.write(chance.randbytes(4096))
    server = start(require_tool("qemu-nbd"), "--persistent", "--format=raw", "--read-only", str(image))
    async with await NbdClient.connect(server.uri()) as client:
        assert client.export.style is HeaderStyle.STRUCTURED
        assert client.export.read_only
        with pytest.raises(InvalidRequestError):
            await client.write(0, bytes(512))
        step = 4 * MIB
        async with asyncio.TaskGroup() as tasks:
            parts = [tasks.create_task(client.read(offset, step)) for offset in range(0, EXPORT_SIZE, step)]
    assert b"".join(part.result() for part in parts) == image.read_bytes()


async def test_cancelling_half_of_everything(server: ListeningChild) -> None:
    """What was cancelled leaves the connection in step: the others get their own answers."""
    content = random.Random(3).randbytes(16 * MIB)
    async with await NbdClient.connect(server.uri()) as client:
        await client.write(0, content)
        async with asyncio.TaskGroup() as tasks:
            reads = [tasks.create_task(client.read(i * 65536, 65536)) for i in range(256)]
            await asyncio.sleep(0)
            for read in reads[::2]:
                read.cancel()
        for index, read in enumerate(reads):
            if index % 2 == 0:
                assert read.cancelled()
            else:
                assert read.result() == content[index * 65536 : (index + 1) * 65536]
        await client.settle()
        assert await client.read(0, 16 * MIB) == content


async def test_asking_without_opening(server: ListeningChild) -> None:
    assert (await describe_export(server.uri())).size == EXPORT_SIZE
    assert len(await list_exports(server.uri())) == 1


async def test_errors_of_the_server(require_tool: RequireTool, start: Start) -> None:
    """nbdkit's error filter fails requests on purpose; the connection lives on."""
    options = ["error-pread-rate=100%", "error-pread=EIO", "error-pwrite-rate=100%", "error-pwrite=ENOSPC"]
    server = start(require_tool("nbdkit"), "-f", "--filter=error", "memory", "1M", *options)
    async with await NbdClient.connect(server.uri()) as client:
        with pytest.raises(UnavailableError):
            await client.read(0, 512)
        with pytest.raises(Exception, match="space"):
            await client.write(0, bytes(512))
        await client.write_zeroes(0, 512)


async def test_a_server_that_is_killed(require_tool: RequireTool, start: Start) -> None:
    server = start(require_tool("nbdkit"), "-f", "--filter=delay", "memory", "1M", "rdelay=60")
    async with await NbdClient.connect(server.uri()) as client:
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(_expect_unavailable(client.read(0, 512)))
            await client.write(0, bytes(512))
            server.kill()
            await reading
        with pytest.raises(UnavailableError):
            await client.flush()


async def _expect_unavailable(awaitable) -> None:
    with pytest.raises(UnavailableError):
        await awaitable


def test_nbdkit_speaks_our_uri(require_tool: RequireTool, start: Start) -> None:
    """The URIs that we write are understood by libnbd's tools."""
    for tcp in (False, True):
        server = start(require_tool("nbdkit"), "-f", "memory", "1M", tcp=tcp)
        size = subprocess.run(
            [require_tool("nbdinfo"), "--size", server.uri()], capture_output=True, text=True, check=True
        )
        assert size.stdout == f"{MIB}\n"
