"""Our client over TLS: what it sends and receives, whom it trusts, and how it ends."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from pathlib import Path

import pytest

from silo.devices.memory import MemoryDevice
from silo.errors import InvalidRequestError, SiloError, UnavailableError
from silo.exports.nbd_catalog import TlsPolicy
from silo.exports.nbd_client import NbdClient
from silo.exports.nbd_client_dial import describe_export, list_contexts, list_exports
from silo.exports.nbd_server import NbdServer
from silo.exports.nbd_tls import NbdTls, server_context
from silo.volume import Volume
from tests.support.certificates import Authority
from tests.support.nbd_peer import serving
from tests.support.volumes import make_volume

MIB = 1 << 20
SIZE = 16 * MIB


def memory() -> Volume:
    return make_volume(MemoryDevice(SIZE))[1]


def encrypting(signer: Authority, **options: object) -> NbdTls:
    return NbdTls(server_context(*signer.issue("server"), **options), TlsPolicy.REQUIRED)


def credentials(path: Path, authority: Authority, name: str = "") -> Path:
    """A directory as libnbd has it."""
    path.mkdir()
    shutil.copy(authority.path, path / "ca-cert.pem")
    if name:
        for source, target in zip(authority.issue(name), ("client-cert.pem", "client-key.pem"), strict=True):
            shutil.copy(source, path / target)
    return path


def uri(server: NbdServer, directory: Path, hostname: str = "localhost") -> str:
    """How a client reaches the server, and whom it trusts."""
    return f"{address(server)}?tls-certificates={directory}&tls-hostname={hostname}"


def address(server: NbdServer) -> str:
    """How a client reaches the server on TCP."""
    if not server.addresses:
        server.listen("tcp:127.0.0.1:0")
    return server.uri("disk")


async def test_everything_travels_encrypted(tmp_path: Path):
    """Small and large requests, many at once, against a model; and the questions that need no connection."""
    authority = Authority(tmp_path)
    trusted = credentials(tmp_path / "pki", authority)
    seed = int.from_bytes(os.urandom(4))
    chance = random.Random(seed)
    model = bytearray(SIZE)
    async with serving(memory(), tls=encrypting(authority)) as server:
        at = uri(server, trusted)
        assert at.startswith("nbds")
        assert (await describe_export(at)).size == SIZE
        assert len(await list_exports(at)) == 1
        assert "base:allocation" in await list_contexts(at)

        async with await NbdClient.connect(at, contexts=["base:allocation"]) as client:

            async def work(start: int) -> None:
                for _ in range(20):
                    length = chance.choice((1, 512, 4096, 70_000, MIB))
                    offset = start + chance.randrange(2 * MIB - length)
                    if chance.random() < 0.5:
                        content = chance.randbytes(length)
                        model[offset : offset + length] = content
                        await client.write(offset, content)
                    else:
                        assert await client.read(offset, length) == model[offset : offset + length], seed
                await client.flush()

            async with asyncio.TaskGroup() as tasks:
                for start in range(0, SIZE, 2 * MIB):
                    tasks.create_task(work(start))
            assert await client.read(0, SIZE) == model, seed
            status = await client.block_status(0, SIZE)
            assert sum(length for length, _ in status["base:allocation"]) == SIZE


async def test_a_server_that_is_somebody_else_is_refused(tmp_path: Path):
    """Another name, another authority, nobody's name at all; nothing is asked of it."""
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    trusted, wrong = credentials(tmp_path / "pki", authority), credentials(tmp_path / "wrong", stranger)
    async with serving(memory(), tls=encrypting(authority)) as server:
        for at in (uri(server, trusted, "elsewhere"), uri(server, wrong)):
            with pytest.raises(InvalidRequestError, match="certificate"):
                await NbdClient.connect(at)
        with pytest.raises(InvalidRequestError, match="cannot use"):
            await NbdClient.connect(uri(server, tmp_path / "missing"))
        with pytest.raises(InvalidRequestError, match="tls-hostname"):
            await NbdClient.connect("nbds+unix:///disk?socket=/run/x.sock")


async def test_we_say_who_we_are(tmp_path: Path):
    """When the server asks for it; without a certificate the connection ends."""
    authority = Authority(tmp_path)
    named, nobody = credentials(tmp_path / "a", authority, "client"), credentials(tmp_path / "b", authority)
    tls = encrypting(authority, authority=authority.path, require_client=True)
    async with serving(memory(), tls=tls) as server:
        async with await NbdClient.connect(uri(server, named)) as client:
            assert await client.read(0, 512) == bytes(512)
        with pytest.raises(SiloError):
            await NbdClient.connect(uri(server, nobody))


async def test_both_sides_must_agree_to_encrypt(tmp_path: Path):
    """Neither falls back to speaking in the clear."""
    authority = Authority(tmp_path)
    trusted = credentials(tmp_path / "pki", authority)
    async with serving(memory()) as server:
        secured = uri(server, trusted).replace("nbd", "nbds", 1)
        with pytest.raises(InvalidRequestError, match="encrypt"):
            await NbdClient.connect(secured)
    async with serving(memory(), tls=encrypting(authority)) as server:
        with pytest.raises(InvalidRequestError, match="TLS"):
            await NbdClient.connect(address(server).replace("nbds", "nbd", 1))


async def test_a_connection_that_is_cut_is_lost(tmp_path: Path):
    """What was asked for ends with an error; nothing waits for ever."""
    authority = Authority(tmp_path)
    trusted = credentials(tmp_path / "pki", authority)
    async with serving(memory(), tls=encrypting(authority)) as server:
        client = await NbdClient.connect(uri(server, trusted))
        async with asyncio.TaskGroup() as tasks:
            reads = [tasks.create_task(expect_lost(client)) for _ in range(4)]
            await asyncio.sleep(0)
            await server.aclose()
        assert all(read.done() for read in reads)
        with pytest.raises(SiloError):
            await client.read(0, 512)
        await client.aclose()


async def expect_lost(client: NbdClient) -> None:
    """Read until that is not possible any more."""
    with pytest.raises((UnavailableError, SiloError)):
        while True:
            await client.read(0, MIB)
