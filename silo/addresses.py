"""Where a host listens, as people write it: ``unix:/path`` or ``tcp:host:port``.

An IPv6 address stands in brackets: ``tcp:[::1]:5170``. An address never carries a secret.
"""

from __future__ import annotations

import attrs

from silo.errors import InvalidRequestError

__all__ = ["TcpAddress", "UnixAddress", "parse_address"]


@attrs.frozen
class UnixAddress:
    """A Unix socket by its path."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@attrs.frozen
class TcpAddress:
    """A host, by name or number, and a port. Port 0 asks for any free one, when listening."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


def parse_address(text: str) -> UnixAddress | TcpAddress:
    """Read ``unix:/path`` or ``tcp:host:port``. `InvalidRequestError` for anything else."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return UnixAddress(rest)
    host, separator, port = rest.rpartition(":")
    if kind == "tcp" and separator and port.isdecimal() and 0 <= int(port) <= 65535:
        return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))
    raise InvalidRequestError(f"{text!r} is not an address", hint="write unix:/path or tcp:host:port")
