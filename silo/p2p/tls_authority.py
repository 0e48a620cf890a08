"""A private certificate authority for a fleet: made once, and used to give every host its key and certificate.

An authority is a directory with ``ca.crt`` and ``ca.key``. It belongs on a machine that serves nothing; hosts get
``hosts/<name>/``, which holds ``host.crt``, ``host.key`` and a copy of ``ca.crt``, the three files of
`silo.p2p.tls.HostTls`. Keys are elliptic (P-256), unencrypted, and readable by their owner alone (0600).

Every call may be repeated: what is there and still good is kept, what is missing or expires soon is made. A directory
that was left half-written by a crash is completed by the next call, because the certificate is written last.

Nothing here revokes: certificates of hosts are short-lived, and an authority can be replaced while both are trusted
(``ca.crt`` may hold two certificates).
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from silo.abc import Clock
from silo.errors import InvalidRequestError
from silo.files import make_directory, os_error, replace_file
from silo.p2p.tls import AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE

__all__ = ["Authority", "Issued"]

AUTHORITY_KEY_FILE = "ca.key"
AUTHORITY_DAYS = 3650
HOST_DAYS = 365
RENEW_PART = 3
"""A certificate is made anew when less than a third of its time is left."""
SKEW = datetime.timedelta(hours=1)
"""Clocks of a fleet differ: a certificate counts from a little before it was made."""


@attrs.frozen
class Issued:
    """A certificate that is on disk now."""

    directory: Path
    name: str
    names: tuple[str, ...]
    """What the certificate says that it may be dialled as."""
    expires_at: float
    """Seconds since the epoch."""
    fingerprint: str
    """SHA-256 of the certificate."""
    is_new: bool
    """False when one was there that is good for a while."""


class Authority:
    """See the module. Blocking calls, for a command; one process at a time."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.directory = directory
        self._clock = clock

    def make(self, name: str = "silo fleet", *, days: int = AUTHORITY_DAYS) -> Issued:
        """Make the authority, unless there is one. `InvalidRequestError` when the directory cannot be used."""
        path = self.directory / AUTHORITY_FILE
        try:
            make_directory(self.directory)
            if path.exists():
                return self._issued(self.directory, _read(path), is_new=False)
            key = _new_key()
            certificate = (
                self._builder(_named(name), _named(name), key.public_key(), days)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_usage(signs=True), critical=True)
                .sign(key, hashes.SHA256())
            )
            replace_file(self.directory / AUTHORITY_KEY_FILE, _pem_of_key(key))
            replace_file(path, _pem_of(certificate))
        except OSError as error:
            raise os_error(error, f"make an authority in {self.directory}") from error
        return self._issued(self.directory, certificate, is_new=True)

    def issue(
        self,
        name: str,
        addresses: Sequence[str] = (),
        *,
        directory: Path | None = None,
        days: int = HOST_DAYS,
        renew: bool = False,
    ) -> Issued:
        """A key and certificate for a host that is dialled as ``name`` or at one of ``addresses``.

        They go to ``directory``, by default ``hosts/<name>`` of the authority. What is there is kept if it has these
        names, is signed by this authority and is good for a while, unless ``renew`` says otherwise; a certificate
        that is made anew gets a new key. `InvalidRequestError` when there is no authority or a name is none.
        """
        if not 1 <= days <= AUTHORITY_DAYS:
            raise InvalidRequestError(f"a certificate cannot be valid for {days} days")
        names = tuple(dict.fromkeys((name, *addresses)))
        alternatives = [_alternative(one) for one in names]
        base = directory or self.directory / "hosts" / name
        signer, signer_key = self._open()
        try:
            make_directory(base)
            present = base / CERTIFICATE_FILE
            if present.exists() and not renew:
                certificate = _read(present)
                if self._is_good(certificate, alternatives, signer):
                    replace_file(base / AUTHORITY_FILE, _pem_of(signer))
                    return self._issued(base, certificate, is_new=False)
            key = _new_key()
            certificate = (
                self._builder(_named(name), signer.subject, key.public_key(), days)
                .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                .add_extension(_usage(signs=False), critical=True)
                .add_extension(
                    x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                    critical=False,
                )
                .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
                .add_extension(
                    x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()),
                    critical=False,
                )
                .sign(signer_key, hashes.SHA256())
            )
            replace_file(base / KEY_FILE, _pem_of_key(key))
            replace_file(base / AUTHORITY_FILE, _pem_of(signer))
            replace_file(present, _pem_of(certificate))
        except OSError as error:
            raise os_error(error, f"write the certificate of {name} to {base}") from error
        return self._issued(base, certificate, is_new=True)

    def _open(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        path = self.directory / AUTHORITY_KEY_FILE
        hint = f"make one with `silo certs init {self.directory}`"
        try:
            certificate = _read(self.directory / AUTHORITY_FILE)
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise InvalidRequestError(
                f"there is no authority in {self.directory}: {error.strerror}", hint=hint
            ) from error
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(f"{path} holds no key that can be used") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise InvalidRequestError(f"{path} is not the key of the certificate beside it")
        return certificate, key

    def _is_good(
        self, certificate: x509.Certificate, names: Sequence[x509.GeneralName], signer: x509.Certificate
    ) -> bool:
        try:
            certificate.verify_directly_issued_by(signer)
            found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return False
        lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        left = certificate.not_valid_after_utc - self._now()
        return set(found) == set(names) and left > lifetime / RENEW_PART

    def _now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._clock.wall(), datetime.UTC)

    def _builder(
        self, subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
    ) -> x509.CertificateBuilder:
        now = self._now()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    def _issued(self, directory: Path, certificate: x509.Certificate, *, is_new: bool) -> Issued:
        try:
            found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = tuple(str(one.value) for one in found)
        except x509.ExtensionNotFound:
            names = ()
        subjects = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return Issued(
            directory=directory,
            name=str(subjects[0].value) if subjects else "",
            names=names,
            expires_at=certificate.not_valid_after_utc.timestamp(),
            fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
            is_new=is_new,
        )


def _new_key() -> ec.EllipticCurvePrivateKey:
    """From the system's own source of randomness, which is the only one fit for keys."""
    return ec.generate_private_key(ec.SECP256R1())


def _named(name: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    except ValueError as error:
        raise InvalidRequestError(f"{name!r} cannot be the name of a certificate: {error}") from error


def _alternative(name: str) -> x509.GeneralName:
    """An address, or a host name as DNS has them; never anything that could lead out of a directory."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass  # a name, then
    labels = name.split(".")
    good = all(
        label and len(label) < 64 and label.replace("-", "a").isalnum() and label.isascii()
        and not label.startswith("-") and not label.endswith("-")
        for label in labels
    )  # fmt: skip
    if not good or len(name) > 64:
        raise InvalidRequestError(
            f"{name!r} is neither a host name nor an address", hint="write it as it will be dialled"
        )
    return x509.DNSName(name.lower())


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise InvalidRequestError(f"{path} holds no certificate") from error


def _pem_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
