"""The private authority of a fleet: what it writes, who may read it, and what a repetition does."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from silo.clock import SystemClock
from silo.errors import InvalidRequestError
from silo.p2p.tls_authority import HOST_DAYS, Authority
from tests.support.fleet import DAY_S, ShiftedClock


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "ca", SystemClock())
    made.make()
    return made


def certificate(directory: Path, name: str = "host.crt") -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / name).read_bytes())


def test_an_authority_is_made_once(tmp_path):
    """A second call keeps what is there: hosts trust it already."""
    authority = Authority(tmp_path / "deep" / "ca", SystemClock())
    first, second = authority.make("the fleet"), authority.make("another name")
    assert first.is_new
    assert not second.is_new
    assert (second.fingerprint, second.name) == (first.fingerprint, "the fleet")


def test_keys_are_their_owners_alone(authority):
    """Files 0600, directories 0700; and the authority's key is given to nobody."""
    made = authority.issue("hosta")
    for path in (authority.directory / "ca.key", made.directory / "host.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    for path in (authority.directory, made.directory):
        assert path.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in made.directory.iterdir()) == ["ca.crt", "host.crt", "host.key"]
    secret = (authority.directory / "ca.key").read_bytes()
    assert all(secret not in path.read_bytes() for path in made.directory.iterdir())


def test_a_certificate_says_little_and_serves_both_sides(authority):
    """It names the host, signs nothing, and verifies strictly."""
    made = authority.issue("hosta", ["10.0.0.5", "hosta.internal", "::1"])
    found = certificate(made.directory)
    assert set(made.names) == {"hosta", "10.0.0.5", "hosta.internal", "::1"}
    extensions = found.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH,
    }  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(made.directory / "ca.crt")
    context.load_cert_chain(made.directory / "host.crt", made.directory / "host.key")
    assert [ca["serialNumber"] for ca in context.get_ca_certs()]


def test_what_is_good_is_kept(authority):
    """The same host again gets the same certificate, until it asks for another, or is called otherwise."""
    first = authority.issue("hosta", ["10.0.0.5"])
    assert authority.issue("hosta", ["10.0.0.5"]).fingerprint == first.fingerprint
    renewed = authority.issue("hosta", ["10.0.0.5"], renew=True)
    moved = authority.issue("hosta", ["10.0.0.6"])
    assert len({first.fingerprint, renewed.fingerprint, moved.fingerprint}) == 3
    assert moved.is_new


@pytest.mark.parametrize(("age", "is_kept"), [(0.5, True), (0.7, False), (2.0, False)])
def test_what_expires_is_made_anew(authority, age, is_kept):
    """In good time, so that a job that runs now and then is all that a fleet needs."""
    past = Authority(authority.directory, ShiftedClock(-age * HOST_DAYS * DAY_S))
    first = past.issue("hosta")
    again = authority.issue("hosta")
    assert (again.fingerprint == first.fingerprint) is is_kept
    assert again.expires_at > SystemClock().wall()


def test_a_half_written_directory_is_completed(authority):
    """The certificate comes last: without it nothing counts."""
    made = authority.issue("hosta")
    (made.directory / "host.crt").unlink()
    again = authority.issue("hosta")
    assert again.is_new
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
        again.directory / "host.crt", again.directory / "host.key"
    )


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "-a", "a b", "host_a", "ä", "a" * 65, "a..b", "*.x"]
)
def test_names_that_are_none(authority, name):
    """Nothing that a resolver would not take, and nothing that leaves the directory."""
    with pytest.raises(InvalidRequestError, match="neither a host name nor an address"):
        authority.issue(name)
    assert sorted(path.name for path in authority.directory.iterdir()) == ["ca.crt", "ca.key"]


def test_no_authority(tmp_path, authority):
    """Without one, or with the key of another, there is nothing to sign with."""
    with pytest.raises(InvalidRequestError, match="no authority") as caught:
        Authority(tmp_path / "empty", SystemClock()).issue("hosta")
    assert "silo certs init" in caught.value.hint
    other = Authority(tmp_path / "other", SystemClock())
    other.make()
    (authority.directory / "ca.key").write_bytes((other.directory / "ca.key").read_bytes())
    with pytest.raises(InvalidRequestError, match="not the key"):
        authority.issue("hosta")
