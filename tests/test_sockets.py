"""Listening sockets: stale files, living servers, and options that every connection wants."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from silo.addresses import TcpAddress, UnixAddress
from silo.errors import InvalidRequestError
from silo.sockets import address_of, listen_on, peer_of, tune


def test_a_dead_servers_socket_is_replaced(tmp_path: Path):
    """The file that a killed process left behind is no obstacle."""
    address = UnixAddress(str(tmp_path / "s"))
    listen_on(address).close()
    assert Path(address.path).exists()
    with listen_on(address) as listener:
        assert address_of(listener) == address


def test_a_living_servers_socket_is_refused(tmp_path: Path):
    """Nobody loses a running server by starting another."""
    address = UnixAddress(str(tmp_path / "s"))
    with listen_on(address), pytest.raises(InvalidRequestError, match="somebody does already"):
        listen_on(address)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path):
    """A mistyped path must not cost a disk image."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"precious")
    with pytest.raises(InvalidRequestError, match="no socket"):
        listen_on(UnixAddress(str(path)))
    assert path.read_bytes() == b"precious"


def test_a_port_of_ones_own_choosing_or_any(tmp_path: Path):
    """Port 0 becomes the port that was really bound; a port in use and an unknown host are refused."""
    with listen_on(TcpAddress("127.0.0.1", 0)) as listener:
        bound = address_of(listener)
        assert isinstance(bound, TcpAddress)
        assert bound.port > 0
        with pytest.raises(InvalidRequestError):
            listen_on(bound)
    with pytest.raises(InvalidRequestError):
        listen_on(TcpAddress("no.such.host.invalid", 1))


def test_peers_have_names(tmp_path: Path):
    """A process number on Unix sockets, an address on TCP, and something even when nobody is there any more."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) == f"unix:pid={os.getpid()}"
    with listen_on(TcpAddress("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as client:
            accepted, _ = listener.accept()
            with accepted:
                assert peer_of(accepted) == f"tcp:127.0.0.1:{client.getsockname()[1]}"
        assert peer_of(listener) == "a client that is gone"


def test_connections_are_tuned():
    """TCP sends small messages at once and notices vanished peers; nothing blocks."""
    listener = listen_on(TcpAddress("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client:
        tune(client)
        assert client.getblocking() is False
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        tune(ours)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= before
