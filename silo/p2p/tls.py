"""Who a host is to other hosts: its certificate, its key, and the authority of its fleet.

Hosts trust exactly one thing, the authority in their directory (``silo certs`` makes one). Both sides of every
connection show a certificate that it has signed, over TLS 1.3 and nothing older. The side that dials also checks that
the certificate names the host that it dialled, so that no other member of the fleet can stand in for the target;
``check_names=False`` leaves it at membership, for fleets whose hosts are dialled by addresses that no certificate
knows. The side that listens cannot know who will come: every member of the fleet may bring a group. What keeps one
member from taking a group that is another's is the register, not the certificate.

Files are read anew when they have changed, so a renewed certificate needs no restart; connections that are up keep
what they began with. Nothing of a key is ever logged or put into an error.
"""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import Self

import attrs

from silo.abc import Clock
from silo.errors import InvalidRequestError
from silo.threads import run_to_completion

__all__ = ["AUTHORITY_FILE", "CERTIFICATE_FILE", "KEY_FILE", "Contexts", "HostTls"]

_log = logging.getLogger(__name__)

AUTHORITY_FILE = "ca.crt"
CERTIFICATE_FILE = "host.crt"
KEY_FILE = "host.key"
WARN_S = 14 * 86400.0
"""A certificate that expires sooner is worth a word at the start."""


@attrs.frozen
class HostTls:
    """PEM files. ``authority`` may hold several certificates, so that a fleet can change from one to the next."""

    certificate: Path = attrs.field(converter=Path)
    key: Path = attrs.field(converter=Path)
    authority: Path = attrs.field(converter=Path)
    check_names: bool = attrs.field(default=True, kw_only=True)
    """The host that is dialled must be named in the certificate that it shows."""

    @classmethod
    def in_directory(cls, directory: str | os.PathLike[str], *, check_names: bool = True) -> Self:
        """The files under the names that ``silo certs issue`` gives them."""
        base = Path(directory)
        return cls(base / CERTIFICATE_FILE, base / KEY_FILE, base / AUTHORITY_FILE, check_names=check_names)

    async def check(self, clock: Clock) -> None:
        """`InvalidRequestError` unless the files can be used; logs what will be trouble soon."""
        await Contexts(self).get()
        expires_at, mode = await run_to_completion(None, self._look)
        left_s = expires_at - clock.wall()
        if left_s < WARN_S:
            when = "has expired" if left_s < 0 else f"expires in {left_s / 86400:.1f} days"
            _log.warning("the certificate %s %s: other hosts will not accept it then", self.certificate, when)
        if mode & 0o077:
            _log.warning("the key %s can be read by others: chmod 600 it", self.key)

    def _look(self) -> tuple[float, int]:
        """When the certificate expires, and who may read the key."""
        from cryptography import x509  # heavy, and wanted only with TLS

        try:
            found = x509.load_pem_x509_certificate(self.certificate.read_bytes())
            mode = self.key.stat().st_mode
        except (OSError, ValueError) as error:
            raise InvalidRequestError(f"cannot use {self.certificate}: {error}") from error
        return found.not_valid_after_utc.timestamp(), mode


class Contexts:
    """What OpenSSL needs for either side, made from the files as they are now. Concurrent calls are allowed."""

    def __init__(self, tls: HostTls) -> None:
        self.tls = tls
        self._seen: tuple[object, ...] = ()
        self._pair: tuple[ssl.SSLContext, ssl.SSLContext] | None = None

    async def get(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """For dialling, and for listening. `InvalidRequestError` when the files cannot be used."""
        self._pair = await run_to_completion(None, self._load)
        return self._pair

    def _load(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        seen = tuple(_signature(path) for path in (self.tls.certificate, self.tls.key, self.tls.authority))
        if self._pair is not None and seen == self._seen:
            return self._pair
        dialling = self._context(ssl.PROTOCOL_TLS_CLIENT)
        dialling.check_hostname = self.tls.check_names
        listening = self._context(ssl.PROTOCOL_TLS_SERVER)
        listening.num_tickets = 0  # nobody resumes: a migration connects a few times in all
        self._seen = seen
        return dialling, listening

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        path = self.tls.certificate
        try:
            context.load_cert_chain(path, self.tls.key, password=_no_password)
            path = self.tls.authority
            context.load_verify_locations(path)
        except OSError as error:  # ssl.SSLError is one
            raise InvalidRequestError(
                f"cannot use {path}: {error.strerror or error}",
                hint="`silo certs issue` makes the three files that belong together",
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def _signature(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidRequestError(
            f"cannot read {path}: {error.strerror}", hint="`silo certs issue` makes it"
        ) from error
    return status.st_mtime_ns, status.st_size, status.st_ino


def _no_password() -> bytes:
    raise InvalidRequestError(
        "the key of this host is encrypted, and nobody is there to be asked for its password",
        hint="store it unencrypted, readable by its owner alone",
    )
