"""What ``silo serve`` is told about NBD: certificates and limits.

::

    [nbd]
    certificate = "/etc/silo/server-cert.pem"
    key = "/etc/silo/server-key.pem"
    tls = "required"                          # or "optional": clients may stay in the clear
    client_ca = "/etc/silo/ca-cert.pem"       # clients must show a certificate that it has signed
    client_certificates = "required"          # or "optional": they may show none
    connections = 128                         # of one disk
    memory = "32M"                            # requests and replies under way, of one address
    handshake_timeout = "30s"

Certificates are for TCP addresses. A Unix socket stays in the clear: who may open it is the business of its
file's permissions.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from silo.errors import InvalidRequestError
from silo.exports.nbd_server import NbdServerSettings
from silo.exports.nbd_tls import NbdTls
from silo.settings import parse_duration, parse_size

__all__ = ["NbdConfig"]

MEMORY_MIN = 1 << 20
"""A server with less room than a few requests would serve them one by one."""


class NbdConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module."""

    certificate: str = ""
    key: str = ""
    tls: Literal["required", "optional"] = "required"
    client_ca: str = ""
    client_certificates: Literal["required", "optional"] = "required"
    connections: int = 128
    memory: str | int = "32M"
    handshake_timeout: str | float = "30s"

    def check(self) -> None:
        """Raise `InvalidRequestError` unless the values make sense together. Opens no file."""
        if bool(self.certificate) != bool(self.key):
            raise InvalidRequestError("a certificate needs its key, and a key its certificate")
        if self.client_ca and not self.certificate:
            raise InvalidRequestError(
                "clients cannot be asked for a certificate without TLS", hint="name a certificate and its key"
            )
        if not 1 <= self.connections <= 1 << 16:
            raise InvalidRequestError(f"{self.connections} connections make no sense", hint="take 1 to 65536")
        settings = self.settings()
        if settings.payload_bytes < MEMORY_MIN:
            raise InvalidRequestError(f"{self.memory} is too little memory", hint="take at least 1M")
        if settings.handshake_timeout_s <= 0:
            raise InvalidRequestError("the handshake timeout must be positive")

    def settings(self) -> NbdServerSettings:
        """The limits."""
        return NbdServerSettings(
            handshake_timeout_s=parse_duration(self.handshake_timeout),
            payload_bytes=parse_size(self.memory),
            connections_max=self.connections,
        )

    def load(self) -> NbdTls | None:
        """Read the certificates; ``None`` when there are none. Blocks. `InvalidRequestError` names a bad file."""
        if not self.certificate:
            return None
        return NbdTls.from_files(
            self.certificate,
            self.key,
            client_authority=self.client_ca or None,
            clients_must_show=self.client_certificates == "required",
            required=self.tls == "required",
        )
