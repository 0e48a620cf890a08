"""Mutual TLS between hosts: the contract of a transport, who is let in, and what everybody else is told.

Whatever is wrong, both ends say so in words that help, and neither says anything of a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from silo.abc import Connection, Transport
from silo.clock import SystemClock
from silo.errors import InvalidRequestError, RemoteProtocolError, SiloError, UnavailableError
from silo.p2p.tls import CERTIFICATE_FILE, KEY_FILE, HostTls
from silo.p2p.tls_transport import PIECE_SIZE, TlsTransport
from silo.p2p.transport import PlainTransport
from silo.testing.check_transport import check_transport
from tests.support.fleet import DAY_S, Fleet
from tests.support.logs import ExpectedLogs


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "fleet")


@contextlib.asynccontextmanager
async def greeting(transport: Transport) -> AsyncIterator[str]:
    """A host that says hello to whoever gets in; its address."""
    listener = await transport.listen("tcp:127.0.0.1:0")

    async def serve() -> None:
        while True:
            connection = await listener.accept()
            try:
                await connection.send([b"hello"])
                await connection.receive_into(memoryview(bytearray(1)))
            finally:
                await connection.aclose()

    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(serve())
        try:
            yield listener.url
        finally:
            serving.cancel()
            await listener.aclose()


async def greeted(transport: Transport, url: str) -> bytes:
    connection = await transport.connect(url)
    try:
        return await receive(connection, 5)
    finally:
        await connection.aclose()


async def receive(connection: Connection, size: int) -> bytes:
    content = memoryview(bytearray(size))
    filled = 0
    while filled < size:
        count = await connection.receive_into(content[filled:])
        if not count:
            raise UnavailableError("the end came early")
        filled += count
    return bytes(content)


async def refused(transport: Transport, url: str) -> SiloError:
    """What whoever is not let in is told."""
    with pytest.raises(SiloError) as caught:
        await greeted(transport, url)
    return caught.value


async def heard(log: ExpectedLogs, pattern: str) -> None:
    """Wait until the other end has said so in its log."""
    log(pattern)
    async with asyncio.timeout(10):
        while not log.matching(pattern):
            await asyncio.sleep(0.005)


# ---- the contract -------------------------------------------------------------------------------------------


async def test_tls_keeps_the_contract(fleet):
    """Mutual TLS is a transport."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = TlsTransport(fleet.host("a")), TlsTransport(fleet.host("b"))
    assert await check_transport(here, f"tcp:127.0.0.1:{port}", dialler=there) is None


async def test_unix_sockets_stay_plain(fleet, tmp_path):
    """Within one machine the directory decides who may connect."""
    transport = TlsTransport(fleet.host("a"))
    assert await check_transport(transport, f"unix:{tmp_path}/s") is None


@pytest.mark.parametrize(
    "size", [1, 16 << 10, PIECE_SIZE - 1, PIECE_SIZE, PIECE_SIZE + 1, 3 * PIECE_SIZE + 7]
)
async def test_every_size_travels(fleet, size):
    """Whatever the sizes of buffers, pieces and records, bytes arrive as they were sent."""
    listener = await TlsTransport(fleet.host("a")).listen("tcp:127.0.0.1:0")
    here = await TlsTransport(fleet.host("b")).connect(listener.url)
    there = await listener.accept()
    content = os.urandom(size)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(here.send([content[:1], b"", content[1:]]))
        assert await receive(there, size) == content
    assert "(b)" in there.peer
    assert "(a)" in here.peer
    for end in (here, there, listener):
        await end.aclose()


# ---- who is let in ------------------------------------------------------------------------------------------


async def test_a_name_that_was_not_dialled(fleet, expect_log: ExpectedLogs):
    """Another member of the fleet cannot stand in for the host that was dialled, unless names do not matter."""
    async with greeting(TlsTransport(fleet.host("b", ("10.1.2.3",)))) as url:
        error = await refused(TlsTransport(fleet.host("a")), url)
        assert "mismatch" in error.message
        assert "--address" in error.hint
        lenient = fleet.host("a", check_names=False)
        assert await greeted(TlsTransport(lenient), url) == b"hello"
        await heard(expect_log, "was turned away")


async def test_another_fleet(fleet, tmp_path, expect_log: ExpectedLogs):
    """Certificates of another authority are refused by either side, and both say why."""
    stranger = TlsTransport(Fleet(tmp_path / "other").host("s"))
    async with greeting(TlsTransport(fleet.host("b"))) as url:
        error = await refused(stranger, url)
        assert "is not accepted" in error.message
        await heard(expect_log, "does not accept the certificate of this host: unknown ca")


async def test_a_caller_of_another_fleet(fleet, tmp_path, expect_log: ExpectedLogs):
    """A caller who trusts us is not trusted for that."""
    ours, theirs = fleet.host("a"), Fleet(tmp_path / "other").host("s")
    mixed = TlsTransport(HostTls(theirs.certificate, theirs.key, ours.authority))
    async with greeting(TlsTransport(fleet.host("b"))) as url:
        error = await refused(mixed, url)
        assert "does not accept the certificate of this host" in error.message
        await heard(expect_log, "is not accepted")


async def test_an_expired_certificate(fleet, tmp_path, expect_log: ExpectedLogs):
    """What was valid once is not enough, on either side."""
    past = Fleet(tmp_path / "fleet", shift_s=-100 * DAY_S)
    old = TlsTransport(past.host("old", days=30))
    good = TlsTransport(fleet.host("good"))
    async with greeting(good) as url:
        error = await refused(old, url)
        assert "certificate expired" in error.message
        await heard(expect_log, "certificate has expired")
    async with greeting(old) as url:
        error = await refused(good, url)
        assert "certificate has expired" in error.message
        await heard(expect_log, "certificate expired")


async def test_a_caller_without_a_certificate(fleet, expect_log: ExpectedLogs):
    """Trusting the fleet is not belonging to it."""
    ours = fleet.host("b")
    async with greeting(TlsTransport(ours)) as url:
        context = ssl.create_default_context(cafile=ours.authority)
        host, _, port = url.removeprefix("tcp:").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            if not await reader.read(5):
                raise ConnectionError("it hung up")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        await heard(expect_log, "showed no certificate")


async def test_an_older_tls(fleet, expect_log: ExpectedLogs):
    """Nothing below TLS 1.3."""
    ours = fleet.host("b")
    async with greeting(TlsTransport(ours)) as url:
        context = ssl.create_default_context(cafile=ours.authority)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        host, _, port = url.removeprefix("tcp:").rpartition(":")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(host, int(port), ssl=context)
        await heard(expect_log, "does not speak TLS 1.3")


@pytest.mark.parametrize("first", [b"SILO\x01\x01\0\0\0\0\0\0", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64])
async def test_plain_text_to_a_tls_port(fleet, first, expect_log: ExpectedLogs):
    """Whoever does not encrypt is turned away, and others are served all the while."""
    async with greeting(TlsTransport(fleet.host("b"))) as url:
        plain = await PlainTransport(insecure_tcp=True).connect(url)
        await plain.send([first])
        assert await greeted(TlsTransport(fleet.host("a")), url) == b"hello"
        answer = memoryview(bytearray(64))
        assert bytes(answer[: await plain.receive_into(answer)])[:2] == b"\x15\x03"
        await plain.aclose()
        await heard(expect_log, "does not speak TLS")


async def test_tls_to_a_plain_port(fleet):
    """A host that speaks TLS does not go on without."""
    listener = await PlainTransport(insecure_tcp=True).listen("tcp:127.0.0.1:0")

    async def hang_up() -> None:
        connection = await listener.accept()
        await connection.receive_into(memoryview(bytearray(4096)))
        await connection.aclose()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(hang_up())
        with pytest.raises(RemoteProtocolError, match="during the TLS handshake"):
            await TlsTransport(fleet.host("a")).connect(listener.url)
    await listener.aclose()


async def test_silent_callers_hold_up_nobody(fleet):
    """Connections that say nothing wait in the background."""
    async with greeting(TlsTransport(fleet.host("b"))) as url:
        silent = [await PlainTransport(insecure_tcp=True).connect(url) for _ in range(20)]
        assert await greeted(TlsTransport(fleet.host("a")), url) == b"hello"
        for connection in silent:
            await connection.aclose()


# ---- files --------------------------------------------------------------------------------------------------


async def test_a_renewed_certificate_is_taken_up(fleet, expect_log: ExpectedLogs):
    """Files are read again when they have changed; nobody is restarted."""
    ours = fleet.host("b", ("10.1.2.3",))
    async with greeting(TlsTransport(ours)) as url:
        caller = TlsTransport(fleet.host("a"))
        with pytest.raises(RemoteProtocolError, match="mismatch"):
            await greeted(caller, url)
        fleet.host("b", ("127.0.0.1",))
        assert await greeted(caller, url) == b"hello"
        await heard(expect_log, "was turned away")


@pytest.mark.parametrize("what", ["missing", "garbage", "other key", "encrypted key"])
async def test_files_that_do_not_fit(fleet, what):
    """Said at the start, with the file that is wrong; never with anything that is in it."""
    ours, other = fleet.host("a"), fleet.host("c")
    secret = ours.key.read_bytes()
    if what == "missing":
        (ours.certificate.parent / CERTIFICATE_FILE).unlink()
    elif what == "garbage":
        ours.certificate.write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    elif what == "other key":
        (ours.key.parent / KEY_FILE).write_bytes(other.key.read_bytes())
    else:
        key = serialization.load_pem_private_key(secret, password=None)
        ours.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
    with pytest.raises(InvalidRequestError) as caught:
        await ours.check(SystemClock())
    assert secret.decode().splitlines()[1] not in str(caught.value)


async def test_a_certificate_that_ends_soon_is_announced(fleet, expect_log: ExpectedLogs):
    """And a key that others can read."""
    ours = fleet.host("a", days=3)
    ours.key.chmod(0o644)
    await ours.check(SystemClock())
    expect_log("expires in")
    expect_log("can be read by others")
    assert ours.key.stat().st_mode & 0o777 == 0o644
