"""Encrypted connections: the upgrade, who may connect, large transfers both ways, and clean ends."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from silo.devices.memory import MemoryDevice
from silo.errors import InvalidRequestError
from silo.exports.nbd_catalog import TlsPolicy
from silo.exports.nbd_server import NbdServer, NbdServerSettings
from silo.exports.nbd_tls import NbdTls, server_context
from silo.exports.nbd_wire import REQUEST, REQUEST_MAGIC, Command, Option, OptionReply
from silo.volume import Volume
from tests.support.certificates import Authority
from tests.support.nbd_peer import Peer, condition, serving
from tests.support.volumes import make_volume

MIB = 1 << 20
SIZE = 8 * MIB


def memory() -> Volume:
    return make_volume(MemoryDevice(SIZE))[1]


def tls(signer: Authority, policy: TlsPolicy = TlsPolicy.REQUIRED, **options: object) -> NbdTls:
    return NbdTls(server_context(*signer.issue("server"), **options), policy)


class TlsPeer(Peer):
    """A client that encrypts after `secure`."""

    def __init__(self, server: NbdServer) -> None:
        super().__init__(server)
        self._bio: tuple[ssl.MemoryBIO, ssl.MemoryBIO] | None = None
        self._tls: ssl.SSLObject | None = None

    async def secure(self, context: ssl.SSLContext) -> None:
        """Ask for encryption and begin it."""
        assert await self.option(Option.STARTTLS) == OptionReply.ACK
        incoming, outgoing = self._bio = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._exchange()
        await super().send(outgoing.read())

    async def _exchange(self) -> None:
        incoming, outgoing = self._bio
        await super().send(outgoing.read())
        data = await self._loop.sock_recv(self.sock, 1 << 18)
        if not data:
            raise EOFError("the server closed")
        incoming.write(data)

    async def send(self, data: bytes) -> None:
        if self._tls is None:
            return await super().send(data)
        self._tls.write(data)
        await super().send(self._bio[1].read())

    async def receive(self, size: int) -> bytes:
        if self._tls is None:
            return await super().receive(size)
        data = b""
        while len(data) < size:
            try:
                part = self._tls.read(size - len(data))
            except ssl.SSLWantReadError:
                await self._exchange()
                continue
            if not part:
                raise EOFError("the server said goodbye")
            data += part
        return data


@pytest.mark.parametrize("policy", [TlsPolicy.REQUIRED, TlsPolicy.OPTIONAL])
async def test_requests_over_an_encrypted_connection(tmp_path: Path, policy: TlsPolicy):
    """Small and large, both ways, many at once; the server says goodbye at the end."""
    authority = Authority(tmp_path)
    volume = memory()
    async with serving(volume, tls=tls(authority, policy)) as server, TlsPeer(server) as peer:
        await peer.greet()
        await peer.secure(authority.client_context())
        assert await peer.option(Option.GO, b"\0\0\0\0\0\0") == OptionReply.ACK
        content = bytes(range(256)) * 4 * 1024
        for length in (1, 4096, 16384, 300_000, MIB):
            assert await peer.write(7, content[:length]) == 0
            assert await peer.read(7, length) == content[:length]
        for cookie in range(100):
            await peer.request(Command.READ, cookie, 1000, cookie=cookie)
        for cookie in range(100):
            assert (await peer.reply(1000))[0] == cookie
        await peer.request(Command.DISC)
        with pytest.raises(EOFError, match="goodbye"):
            await peer.receive(1)


async def test_nothing_is_left_behind_in_the_decryption(tmp_path: Path):
    """What was decrypted together with a large write is served although the socket has nothing more to say."""
    authority = Authority(tmp_path)
    async with serving(memory(), tls=tls(authority)) as server, TlsPeer(server) as peer:
        await peer.greet()
        await peer.secure(authority.client_context())
        await peer.option(Option.GO, b"\0\0\0\0\0\0")
        for length in (200_000, 262_144 - 28, 262_144, 300_000, MIB):
            write = REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, 1, 0, length) + b"w" * length
            reads = (REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, cookie, 0, 5) for cookie in (2, 3, 4))
            await peer.send(write + b"".join(reads))
            assert await peer.reply() == (1, 0, b"")
            for cookie in (2, 3, 4):
                assert await peer.reply(5) == (cookie, 0, b"wwwww")


async def test_a_flood_of_encrypted_requests_waits_for_the_client_to_listen(tmp_path: Path):
    """Back-pressure holds below the encryption too, and nothing is lost when it lets go."""
    authority = Authority(tmp_path)
    volume = memory()
    volume.write_nowait(0, b"r" * MIB)
    async with serving(volume, tls=tls(authority)) as server, TlsPeer(server) as peer:
        await peer.greet()
        await peer.secure(authority.client_context())
        await peer.option(Option.GO, b"\0\0\0\0\0\0")
        for cookie in range(32):
            await peer.request(Command.READ, 0, MIB, cookie=cookie)
        await condition(lambda: server._budget.used > 0)
        assert server._budget.used <= 3 * MIB
        for cookie in range(32):
            assert await peer.reply(MIB) == (cookie, 0, b"r" * MIB)


async def test_required_means_required(tmp_path: Path):
    """In the clear nothing but STARTTLS is answered."""
    authority = Authority(tmp_path)
    async with serving(memory(), tls=tls(authority)) as server, Peer(server) as peer:
        await peer.greet()
        assert await peer.option(Option.LIST) == OptionReply.ERR_TLS_REQD
        assert await peer.option(Option.GO, b"\0\0\0\0\0\0") == OptionReply.ERR_TLS_REQD


async def test_optional_means_optional(tmp_path: Path):
    """A client that does not care is served in the clear."""
    authority = Authority(tmp_path)
    async with serving(memory(), tls=tls(authority, TlsPolicy.OPTIONAL)) as server, Peer(server) as peer:
        await peer.go()
        assert await peer.read(0, 1) == b"\0"


@pytest.mark.parametrize(("shown", "admitted"), [("client", True), (None, False), ("stranger", False)])
async def test_clients_can_be_asked_who_they_are(tmp_path: Path, shown: str | None, admitted: bool):
    """With a required client certificate only those that our authority has signed get in."""
    authority = Authority(tmp_path)
    stranger = Authority(tmp_path, "other")
    context = authority.client_context("client" if shown == "client" else None)
    if shown == "stranger":
        context.load_cert_chain(*stranger.issue("stranger"))
    encryption = tls(authority, authority=authority.path, require_client=True)
    async with serving(memory(), tls=encryption) as server, TlsPeer(server) as peer:
        await peer.greet()
        if admitted:
            await peer.secure(context)
            assert await peer.option(Option.LIST) == OptionReply.ACK
        else:
            with pytest.raises((ssl.SSLError, EOFError, ConnectionError)):
                await peer.secure(context)
                await peer.option(Option.LIST)
        await condition(lambda: server.connections == int(admitted))


@pytest.mark.parametrize("garbage", [b"", b"\x16\x03\x01\0\5hello", bytes(100)])
async def test_a_failed_upgrade_ends_the_connection(tmp_path: Path, garbage: bytes):
    """A client that leaves or talks nonsense instead of TLS takes only its own connection with it."""
    authority = Authority(tmp_path)
    async with serving(memory(), tls=tls(authority)) as server, Peer(server) as peer:
        await peer.greet()
        assert await peer.option(Option.STARTTLS) == OptionReply.ACK
        if garbage:
            await peer.send(garbage)
            await peer.wait_closed()
        else:
            peer.close()
        await condition(lambda: server.connections == 0)


async def test_bytes_behind_starttls_end_the_connection(tmp_path: Path):
    """Somebody in between could have put them there."""
    authority = Authority(tmp_path)
    async with serving(memory(), tls=tls(authority)) as server, Peer(server) as peer:
        await peer.greet()
        option = b"IHAVEOPT" + (5).to_bytes(4, "big") + bytes(4)
        await peer.send(option + b"IHAVEOPT")
        assert len(await peer.wait_closed()) == 20


async def test_a_cut_connection_is_no_goodbye(tmp_path: Path):
    """A write that was cut off inside the encryption is not applied."""
    authority = Authority(tmp_path)
    volume = memory()
    async with serving(volume, tls=tls(authority)) as server, TlsPeer(server) as peer:
        await peer.greet()
        await peer.secure(authority.client_context())
        await peer.option(Option.GO, b"\0\0\0\0\0\0")
        await peer.request(Command.WRITE, 0, 100_000, payload=b"x" * 50_000)
        peer.close()
        await condition(lambda: server.connections == 0)
    assert bytes(await volume.read(0, 100)) == bytes(100)


async def test_the_handshakes_deadline_covers_the_encryption(tmp_path: Path):
    """A client that stops in the middle of the TLS handshake is closed."""
    authority = Authority(tmp_path)
    settings = NbdServerSettings(handshake_timeout_s=0.05)
    async with serving(memory(), tls=tls(authority), settings=settings) as server, Peer(server) as peer:
        await peer.greet()
        await peer.option(Option.STARTTLS)
        await peer.wait_closed()
        await condition(lambda: server.connections == 0)


def test_files_that_do_not_fit_are_refused(tmp_path: Path):
    """A clear error at start, instead of a server that no client can talk to."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    _, other_key = authority.issue("other")
    for files in ((certificate, other_key), (tmp_path / "missing", key), (key, key)):
        with pytest.raises(InvalidRequestError):
            server_context(*files)
    with pytest.raises(InvalidRequestError):
        server_context(certificate, key, require_client=True)
    assert server_context(certificate, key).minimum_version == ssl.TLSVersion.TLSv1_2
