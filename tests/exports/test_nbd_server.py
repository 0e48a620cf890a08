"""Servers and their connections: sockets, the handshake's deadline, many clients, reconnecting ones, the end."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

import pytest

from silo.addresses import TcpAddress, UnixAddress
from silo.devices.memory import MemoryDevice
from silo.errors import InvalidRequestError
from silo.exports.nbd_exports import NbdExport, NbdExports
from silo.exports.nbd_server import NbdServer, NbdServerSettings
from silo.exports.nbd_wire import Command, NbdError, Option, OptionReply
from tests.support.held import HeldDevice
from tests.support.logs import ExpectedLogs
from tests.support.nbd_peer import Peer, condition, serving
from tests.support.volumes import CHUNK, make_volume

READ, WRITE, DISC = Command.READ, Command.WRITE, Command.DISC
SIZE = 16 * CHUNK


def memory(name: str = "disk"):
    return make_volume(MemoryDevice(SIZE), name=name)[1]


async def connect(address: UnixAddress | TcpAddress) -> Peer:
    family = socket.AF_UNIX if isinstance(address, UnixAddress) else socket.AF_INET
    target = address.path if isinstance(address, UnixAddress) else (address.host, address.port)
    sock = socket.socket(family)
    sock.setblocking(False)
    peer = Peer(sock=sock)
    try:
        await asyncio.get_running_loop().sock_connect(sock, target)
    except BaseException:
        peer.close()
        raise
    return peer


async def test_unix_and_tcp_at_once(tmp_path: Path):
    """One server, two sockets, one volume: what is written through one is read through the other."""
    path = tmp_path / "nbd.sock"
    async with serving(memory()) as server:
        unix, tcp = server.listen(f"unix:{path}"), server.listen("tcp:127.0.0.1:0")
        assert unix == UnixAddress(str(path))
        assert isinstance(tcp, TcpAddress)
        assert tcp.port > 0
        assert server.addresses == [unix, tcp]
        assert server.uri("group/disk") == f"nbd+unix:///group/disk?socket={path}"
        async with await connect(unix) as one, await connect(tcp) as two:
            await one.go("disk")
            await two.go("group/disk")
            assert await one.write(0, b"shared") == 0
            assert await two.read(0, 6) == b"shared"
            assert two.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
    assert not path.exists()


async def test_a_socket_that_listens_already(tmp_path: Path):
    """A service manager may hand over its socket; its file is not ours to remove."""
    path = tmp_path / "given.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    async with serving(memory()) as server, await connect(server.listen(listener)) as peer:
        await peer.go()
    assert path.exists()


async def test_many_exports_one_server():
    """Every volume under its name, the bare name while it is unambiguous, and nothing else."""
    async with serving(memory("disk"), memory("data")) as server:
        for name in ("group/disk", "data"):
            async with Peer(server) as peer:
                await peer.go(name)
                assert await peer.write(0, name.encode()) == 0
        async with Peer(server) as peer:
            await peer.greet()
            assert await peer.option(Option.GO, b"\0\0\0\0\0\0") == OptionReply.ERR_UNKNOWN
            assert await peer.option(Option.GO, b"\0\0\0\4data\0\0") == OptionReply.ACK
            assert await peer.read(0, 4) == b"data"


async def test_requests_behind_the_handshake_are_not_lost():
    """A client that does not wait for the answer to GO has its first requests served."""
    async with serving(memory()) as server, Peer(server) as peer:
        await peer.greet()
        option = struct.pack(">QII", 0x49484156454F5054, Option.EXPORT_NAME, 4) + b"disk"
        request = struct.pack(">IHHQQI", 0x25609513, 0, READ, 9, 0, 3)
        await peer.send(option + request)
        await peer.receive(10)
        assert await peer.reply(3) == (9, 0, bytes(3))


async def test_a_guilty_connection_dies_alone():
    """Nonsense in the handshake, nonsense in the transmission, half a write: the others notice nothing."""
    volume = memory()
    async with serving(volume) as server, Peer(server) as good:
        await good.go()
        for guilt in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff"):
            async with Peer(server) as bad:
                await bad.receive(18)
                await bad.send(guilt)
                await bad.wait_closed()
        async with Peer(server) as bad:
            await bad.go()
            await bad.send(b"\xee" * 28)
            assert await bad.wait_closed() == b""
        async with Peer(server) as bad:
            await bad.go()
            await bad.request(WRITE, 0, 1 << 20, payload=b"half")
        await condition(lambda: server.connections == 1)
        assert await good.read(0, 4) == bytes(4)


async def test_an_error_of_ours_ends_one_connection_and_is_logged(expect_log: ExpectedLogs):
    """The server goes on, and the log has the traceback."""
    expect_log("ended by an error of ours")
    device = HeldDevice(SIZE, slow="read")
    _, volume = make_volume(device)

    async def broken(offset: int, length: int) -> bytes:
        raise ZeroDivisionError

    async with serving(volume) as server:
        sound = device.inner.read
        device.inner.read = broken
        async with Peer(server) as peer:
            await peer.go()
            await peer.request(READ, 0, 1)
            assert await peer.wait_closed() == b""
        device.inner.read = sound
        async with Peer(server) as peer:
            await peer.go()
            assert await peer.read(0, 1) == b"\0"


async def test_an_error_of_ours_at_once_ends_one_connection_too(expect_log: ExpectedLogs):
    """On the synchronous path as well: a callback that raises would be called again for ever."""
    expect_log("ended by an error of ours")
    volume = memory()

    def broken(offset: int, length: int) -> bytes:
        raise ZeroDivisionError

    async with serving(volume) as server, Peer(server) as good:
        await good.go()
        sound = volume.device.read_nowait
        volume.device.read_nowait = broken
        async with Peer(server) as peer:
            await peer.go()
            await peer.request(READ, 0, 1)
            assert await peer.wait_closed() == b""
        volume.device.read_nowait = sound
        assert await good.read(0, 1) == b"\0"


@pytest.mark.parametrize("said", [b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT\0\0\0\7"])
async def test_a_slow_handshake_is_ended(said: bytes):
    """Whoever has not chosen an export in time is closed, however far it got."""
    settings = NbdServerSettings(handshake_timeout_s=0.05)
    async with serving(memory(), settings=settings) as server, Peer(server) as slow, Peer(server) as good:
        await good.go()
        await slow.send(said)
        assert len(await slow.wait_closed()) == 18
        assert await good.read(0, 1) == b"\0"


async def test_undecided_clients_are_limited():
    """One more than allowed closes the oldest that has not chosen an export; those that have are left alone."""
    settings = NbdServerSettings(handshakes_max=2)
    async with serving(memory(), settings=settings) as server, Peer(server) as good, Peer(server) as first:
        await good.go()
        await first.greet()
        async with Peer(server) as second, Peer(server) as third:
            assert await first.wait_closed() == b""
            await second.go()
            await third.go()
        assert await good.read(0, 1) == b"\0"


async def test_a_flood_of_connections_is_closed_before_it_is_greeted():
    """Even a client whose turn never came is disconnected, and the newest still get in."""
    async with serving(memory(), settings=NbdServerSettings(handshakes_max=2)) as server:
        flood = [Peer(server) for _ in range(10)]
        for peer in flood[:8]:
            assert await peer.wait_closed() == b""
        for peer in flood[8:]:
            await peer.go()
        for peer in flood:
            peer.close()


async def test_sixty_four_connections():
    """All of them see one volume, each gets its own replies."""
    async with serving(memory()) as server, asyncio.TaskGroup() as tasks:

        async def client(number: int) -> None:
            async with Peer(server) as peer:
                await peer.go()
                offset, content = number * 512, bytes([number]) * 512
                assert await peer.write(offset, content) == 0
                assert await peer.read(offset, 512) == content
                await peer.request(DISC)
                assert await peer.wait_closed() == b""

        for number in range(64):
            tasks.create_task(client(number))


async def test_a_reconnecting_client_is_not_overtaken_by_its_past():
    """An old write that is still in flight, or still in the socket, ends before the new connection's first request."""
    device = HeldDevice(SIZE, slow="write", hold="write")
    _, volume = make_volume(device)
    async with serving(volume) as server, Peer(server) as old:
        await old.go()
        await old.request(WRITE, 0, payload=b"o" * CHUNK)
        held = await device.next("write")
        await old.request(WRITE, CHUNK, payload=b"o" * CHUNK)
        async with Peer(server) as new, asyncio.TaskGroup() as tasks:
            await new.go()
            repeated = tasks.create_task(new.write(0, b"n" * CHUNK))
            held.release()
            (await device.next("write")).release()
            held = await device.next("write")
            assert held.offset == 0
            assert [offset for _, offset in device.log] == [0, CHUNK]
            held.release()
            assert await repeated == 0
        assert bytes(await volume.read(0, 2 * CHUNK)) == b"n" * CHUNK + b"o" * CHUNK


async def test_an_old_connection_that_cannot_finish_is_cancelled():
    """Its write never happens, and the new connection goes on."""
    device = HeldDevice(SIZE, slow="write", hold="write")
    _, volume = make_volume(device)
    async with serving(volume, settle_timeout_s=0.05) as server, Peer(server) as old:
        await old.go()
        await old.request(WRITE, 0, payload=b"o" * CHUNK)
        stuck = await device.next("write")
        async with Peer(server) as new, asyncio.TaskGroup() as tasks:
            await new.go()
            written = tasks.create_task(new.write(0, b"n" * CHUNK))
            assert await old.wait_closed() == b""
            (await device.next("write")).release()
            assert await written == 0
        stuck.release()
        assert bytes(await volume.read(0, CHUNK)) == b"n" * CHUNK


async def test_the_oldest_connection_of_an_export_makes_room():
    """With a limit of two, the third client gets in and the first is closed."""
    async with serving(memory(), connections_max=2) as server, Peer(server) as first:
        await first.go()
        async with Peer(server) as second, Peer(server) as third:
            for peer in (second, third):
                await peer.go()
            assert await first.wait_closed() == b""
            assert await second.read(0, 1) == b"\0"
            assert await third.read(0, 1) == b"\0"


async def test_closing_drains():
    """What is in flight is finished and answered, what comes later is refused, nobody new gets in."""
    device = HeldDevice(SIZE, slow="write", hold="write")
    _, volume = make_volume(device)
    exports = NbdExports()
    exports.add(NbdExport("group/disk", volume))
    async with asyncio.TaskGroup() as tasks:
        server = NbdServer(exports, tasks)
        address = server.listen("tcp:127.0.0.1:0")
        async with await connect(address) as peer, await connect(address) as undecided:
            await peer.go()
            await undecided.greet()
            await peer.request(WRITE, 0, payload=b"x" * CHUNK, cookie=1)
            held = await device.next("write")
            closing = tasks.create_task(server.aclose())
            await condition(lambda: server.addresses == [])
            await peer.request(READ, 0, 1, cookie=2)
            assert await peer.reply() == (2, NbdError.ESHUTDOWN, b"")
            assert await undecided.option(Option.LIST) == OptionReply.ERR_SHUTDOWN
            with pytest.raises(ConnectionError):
                await connect(address)
            held.release()
            assert await peer.reply() == (1, 0, b"")
            assert await peer.wait_closed() == b""
            await closing
            assert await undecided.wait_closed() == b""
        await server.aclose()
    assert server.connections == 0


async def test_closing_does_not_wait_for_ever():
    """A request that cannot finish is cancelled when the time for draining is over."""
    device = HeldDevice(SIZE, slow="write", hold="write")
    _, volume = make_volume(device)
    async with (
        serving(volume, settings=NbdServerSettings(drain_timeout_s=0.05)) as server,
        Peer(server) as peer,
    ):
        await peer.go()
        await peer.request(WRITE, 0, payload=b"x" * CHUNK)
        await device.next("write")
        await server.aclose()
        assert await peer.wait_closed() == b""
    assert device.log == []


async def test_an_export_can_be_removed_while_it_is_used():
    """Its clients are drained, the others stay, new clients do not find it."""
    async with serving(memory("disk"), memory("data")) as server, Peer(server) as one, Peer(server) as two:
        await one.go("disk")
        await two.go("data")
        await server.exports.remove("group/disk")
        assert await one.wait_closed() == b""
        assert await two.read(0, 1) == b"\0"
        async with Peer(server) as late:
            await late.greet()
            assert await late.option(Option.GO, b"\0\0\0\4disk\0\0") == OptionReply.ERR_UNKNOWN


async def test_an_address_that_cannot_be_had_is_refused(tmp_path: Path):
    """And leaves the server as it was."""
    async with serving(memory()) as server:
        for address in (f"unix:{tmp_path}/no/such/directory/s", "tcp:203.0.113.1:1", "somewhere"):
            with pytest.raises(InvalidRequestError):
                server.listen(address)
        assert server.addresses == []
