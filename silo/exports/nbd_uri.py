"""Where an NBD server listens, and which of its exports is meant: the written forms.

Two are understood. The URI of the NBD project names server and export at once::

    nbd://host[:port][/export]                  nbds://host[:port][/export][?tls-certificates=/directory]
    nbd+unix:///[export]?socket=/path           nbds+unix:///[export]?socket=/path&tls-hostname=name

and an address of `silo.addresses`, ``unix:/path`` or ``tcp:host:port``, names the server only. The ``nbds`` forms ask
for TLS. ``tls-certificates`` is a directory with ``ca-cert.pem`` and, if the server asks who we are,
``client-cert.pem`` and ``client-key.pem``, as libnbd and QEMU have it; without it the system's authorities count.
``tls-hostname`` is the name that the server's certificate must have, when it is not the host's.

None of the forms ever carries a secret.
"""

from __future__ import annotations

from urllib.parse import parse_qs, quote, unquote, urlsplit

import attrs

from silo.addresses import TcpAddress, UnixAddress, parse_address
from silo.errors import InvalidRequestError

__all__ = ["NBD_PORT", "NbdUri", "parse_uri"]

NBD_PORT = 10809
"""Registered for NBD; used when a URI names no port."""

_FORMS = "write nbd://host:port/export, nbd+unix:///export?socket=/path (nbds for TLS), unix:/path or tcp:host:port"
_PARAMETERS = frozenset(("socket", "tls-certificates", "tls-hostname"))


@attrs.frozen
class NbdUri:
    """A server and the name of one of its exports; the empty name asks for its default one."""

    address: UnixAddress | TcpAddress
    export: str = ""
    tls: bool = False
    certificates: str = ""
    """A directory, see the module."""
    hostname: str = ""
    """The name in the server's certificate; empty: the host's."""

    @property
    def server_name(self) -> str:
        """What the server's certificate must name."""
        return self.hostname or (self.address.host if isinstance(self.address, TcpAddress) else "")

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        export = quote(self.export)
        query = {
            "socket": self.address.path if isinstance(self.address, UnixAddress) else "",
            "tls-certificates": self.certificates,
            "tls-hostname": self.hostname,
        }
        tail = "&".join(f"{key}={quote(value)}" for key, value in query.items() if value)
        if isinstance(self.address, UnixAddress):
            return f"{scheme}+unix:///{export}?{tail}"
        place = f"{scheme}://{str(self.address).removeprefix('tcp:')}/{export}"
        return f"{place}?{tail}" if tail else place


def parse_uri(text: str) -> NbdUri:
    """Read any of the forms above; an address without an export means the default export."""
    parts = urlsplit(text)
    if parts.scheme in ("unix", "tcp"):
        return NbdUri(parse_address(text))
    scheme, plus, unix = parts.scheme.partition("+")
    if scheme not in ("nbd", "nbds") or (plus and unix != "unix"):
        raise _not_a_server(text)
    query = _parameters(text, parts.query, tls=scheme == "nbds")
    path = query.pop("socket", "")
    if bool(path) != bool(plus) or (plus and parts.netloc):
        raise _not_a_server(text)
    return NbdUri(
        UnixAddress(path) if plus else _tcp_address(text, parts.netloc),
        unquote(parts.path.removeprefix("/")),
        tls=scheme == "nbds",
        certificates=query.get("tls-certificates", ""),
        hostname=query.get("tls-hostname", ""),
    )


def _not_a_server(text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{text!r} does not name an NBD server", hint=_FORMS)


def _parameters(text: str, query: str, *, tls: bool) -> dict[str, str]:
    """What stands behind the question mark. Nothing that is asked for there is ignored."""
    found = parse_qs(query, keep_blank_values=True)
    for key, values in found.items():
        if key not in _PARAMETERS or len(values) != 1 or not values[0] or (key != "socket" and not tls):
            raise InvalidRequestError(f"{text!r} asks for {key!r}, which cannot be had", hint=_FORMS)
    return {key: values[0] for key, values in found.items()}


def _tcp_address(text: str, netloc: str) -> TcpAddress:
    """The ``host[:port]`` of a URI."""
    parts = urlsplit(f"//{netloc}")
    try:
        port = parts.port
    except ValueError as error:
        raise InvalidRequestError(f"{text!r} has an impossible port", hint=_FORMS) from error
    if not parts.hostname or "@" in netloc:
        raise InvalidRequestError(f"{text!r} names no host", hint=_FORMS)
    return TcpAddress(parts.hostname, NBD_PORT if port is None else port)
