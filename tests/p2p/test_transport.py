"""Plain sockets, and the simulated network, held to the contract of a transport."""

from __future__ import annotations

import socket

import pytest

from silo.errors import InvalidRequestError
from silo.p2p.transport import PlainTransport
from silo.testing.check_transport import check_transport


async def test_unix_sockets_keep_the_contract(tmp_path):
    """Unix sockets are a transport."""
    assert await check_transport(PlainTransport(), f"unix:{tmp_path}/s") is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_tcp_keeps_the_contract(host):
    """TCP is a transport, when it is asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert await check_transport(PlainTransport(insecure_tcp=True), f"tcp:{host}:{port}") is None


async def test_plain_tcp_must_be_asked_for():
    """Without the flag, no byte goes over TCP in the clear."""
    with pytest.raises(InvalidRequestError, match="without encryption"):
        await PlainTransport().connect("tcp:127.0.0.1:1")
    with pytest.raises(InvalidRequestError, match="without encryption"):
        await PlainTransport().listen("tcp:127.0.0.1:0")


async def test_port_zero_becomes_a_real_port():
    """A listener names the port that the system chose."""
    listener = await PlainTransport(insecure_tcp=True).listen("tcp:127.0.0.1:0")
    assert int(listener.url.rpartition(":")[2]) > 0
    await listener.aclose()


async def test_a_dead_servers_socket_is_replaced(tmp_path):
    """A socket file that nobody answers on is no obstacle; a file of another kind is."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = await PlainTransport().listen(f"unix:{path}")
    await listener.aclose()
    assert not path.exists()
    path.write_text("notes")
    with pytest.raises(InvalidRequestError, match="no socket"):
        await PlainTransport().listen(f"unix:{path}")
    assert path.read_text() == "notes"
