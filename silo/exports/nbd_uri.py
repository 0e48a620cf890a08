"""Where an NBD server listens, and which of its exports is meant: the written forms.

Two are understood. The URI of the NBD project names server and export at once::

    nbd://host[:port][/export]
    nbd+unix:///[export]?socket=/path

and Silo's own address names the server only: ``unix:/path`` or ``tcp:host:port`` (an IPv6 address in brackets).
Neither ever carries a secret.
"""

from __future__ import annotations

from urllib.parse import parse_qs, quote, unquote, urlsplit

import attrs

from silo.errors import InvalidRequestError

__all__ = ["NBD_PORT", "NbdUri", "TcpAddress", "UnixAddress", "parse_address", "parse_uri"]

NBD_PORT = 10809
"""Registered for NBD; used when a URI names no port."""

_FORMS = "write nbd://host:port/export, nbd+unix:///export?socket=/path, unix:/path or tcp:host:port"


@attrs.frozen
class UnixAddress:
    """A Unix socket by its path."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@attrs.frozen
class TcpAddress:
    """A host, by name or number, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:{self._bracketed}:{self.port}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


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


def parse_address(text: str) -> UnixAddress | TcpAddress:
    """Read ``unix:/path`` or ``tcp:host:port``. `InvalidRequestError` for anything else."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return UnixAddress(rest)
    host, separator, port = rest.rpartition(":")
    if kind == "tcp" and separator and port.isdecimal() and 0 <= int(port) <= 65535:
        return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))
    raise InvalidRequestError(f"{text!r} is not an address", hint="write unix:/path or tcp:host:port")


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
