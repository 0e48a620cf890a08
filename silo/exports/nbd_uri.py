"""Where an NBD server listens, and which of its exports is meant: the written forms.

Two are understood. The URI of the NBD project names server and export at once::

    nbd://host[:port][/export]
    nbd+unix:///[export]?socket=/path

and an address of `silo.addresses`, ``unix:/path`` or ``tcp:host:port``, names the server only. Neither ever
carries a secret.
"""

from __future__ import annotations

from urllib.parse import parse_qs, quote, unquote, urlsplit

import attrs

from silo.addresses import TcpAddress, UnixAddress, parse_address
from silo.errors import InvalidRequestError

__all__ = ["NBD_PORT", "NbdUri", "parse_uri"]

NBD_PORT = 10809
"""Registered for NBD; used when a URI names no port."""

_FORMS = "write nbd://host:port/export, nbd+unix:///export?socket=/path, unix:/path or tcp:host:port"


@attrs.frozen
class NbdUri:
    """A server and the name of one of its exports; the empty name asks for its default one."""

    address: UnixAddress | TcpAddress
    export: str = ""

    def __str__(self) -> str:
        export = quote(self.export)
        if isinstance(self.address, UnixAddress):
            return f"nbd+unix:///{export}?socket={quote(self.address.path)}"
        return f"nbd://{str(self.address).removeprefix('tcp:')}/{export}"


def parse_uri(text: str) -> NbdUri:
    """Read any of the forms above; an address without an export means the default export."""
    parts = urlsplit(text)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        paths = parse_qs(parts.query).get("socket", [])
        if len(paths) == 1 and not parts.netloc:
            return NbdUri(UnixAddress(paths[0]), export)
    elif parts.scheme == "nbd":
        return NbdUri(_tcp_address(text, parts.netloc), export)
    elif parts.scheme in ("unix", "tcp"):
        return NbdUri(parse_address(text))
    raise InvalidRequestError(f"{text!r} does not name an NBD server", hint=_FORMS)


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
