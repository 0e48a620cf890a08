"""The written forms of an NBD server's address."""

from __future__ import annotations

import pytest

from silo.addresses import TcpAddress, UnixAddress
from silo.errors import InvalidRequestError
from silo.exports.nbd_uri import NbdUri, parse_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://host", NbdUri(TcpAddress("host", 10809))),
        ("nbd://host:1/", NbdUri(TcpAddress("host", 1))),
        ("nbd://127.0.0.1:10810/vm1/disk", NbdUri(TcpAddress("127.0.0.1", 10810), "vm1/disk")),
        ("nbd://[::1]:5/a%20b", NbdUri(TcpAddress("::1", 5), "a b")),
        ("nbd+unix:///?socket=/run/x.sock", NbdUri(UnixAddress("/run/x.sock"))),
        ("nbd+unix:///vm1/disk?socket=/run/a%20b", NbdUri(UnixAddress("/run/a b"), "vm1/disk")),
        ("nbds://host/disk", NbdUri(TcpAddress("host", 10809), "disk", tls=True)),
        (
            "nbds://10.0.0.1:5/d?tls-certificates=/etc/pki&tls-hostname=host",
            NbdUri(TcpAddress("10.0.0.1", 5), "d", tls=True, certificates="/etc/pki", hostname="host"),
        ),
        (
            "nbds+unix:///d?socket=/run/x&tls-hostname=host",
            NbdUri(UnixAddress("/run/x"), "d", tls=True, hostname="host"),
        ),
        ("unix:/run/x.sock", NbdUri(UnixAddress("/run/x.sock"))),
        ("tcp:host:5", NbdUri(TcpAddress("host", 5))),
        ("tcp:[::1]:5", NbdUri(TcpAddress("::1", 5))),
    ],
)
def test_reads_every_form(text: str, expected: NbdUri) -> None:
    assert expected == parse_uri(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:5",
        "http://host/",
        "nbd://",
        "nbd://user@host/",
        "nbd://host:port/",
        "nbd://host:99999/",
        "nbd+unix:///disk",
        "nbd+unix://host/disk?socket=/x",
        "nbd+unix:///?socket=/a&socket=/b",
        "nbd+tcp://host/",
        "nbds+vsock:///",
        "nbd://host/?socket=/x",
        "nbd://host/?tls-certificates=/x",
        "nbds://host/?tls-psk-file=/x",
        "nbds://host/?tls-hostname=",
        "nbds+unix:///disk",
        "unix:",
        "tcp:host",
        "tcp:host:port",
        "tcp:host:70000",
    ],
)
def test_refuses_everything_else(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_uri(text)


@pytest.mark.parametrize(
    "uri",
    [
        NbdUri(TcpAddress("host", 5), "vm1/disk"),
        NbdUri(TcpAddress("fe80::1", 5), "a b?#"),
        NbdUri(UnixAddress("/run/with space&more"), "d%sk"),
        NbdUri(TcpAddress("host", 5), "a", tls=True, certificates="/a&b", hostname="c"),
        NbdUri(UnixAddress("/run/x"), tls=True, certificates="/a b"),
    ],
)
def test_what_it_writes_it_can_read(uri: NbdUri) -> None:
    assert uri == parse_uri(str(uri))
