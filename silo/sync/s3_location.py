"""Where an S3 store is, and who asks: the values that both S3 clients are made from.

The URL is ``s3://bucket/prefix?option=value&...``. A hyphen may stand for each underscore in an option's name.

==============  =====================================================================================
``endpoint``    a URL; absent for AWS itself
``region``
``path_style``  ``true`` or ``false``; by default true with an endpoint, else false
``payload``     ``signed``, or ``unsigned``: bodies are not hashed for the signature, for use over TLS
``ca_file``     PEM file with further authorities to trust for TLS, as for a server of one's own
``timeout_s``   for one request, not counting the time that its bytes may take
``client``      ``obstore`` or ``aiobotocore``
``profile``     of the AWS configuration files; aiobotocore only
==============  =====================================================================================

Credentials are never part of a URL, so a URL may be logged and stored. They come from the environment, from
the client's own chain of providers, or as `S3Credentials`. This module is pure.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import attrs

from silo.errors import InvalidRequestError
from silo.sync.store_keys import check_key

__all__ = ["EtagForm", "S3Client", "S3Credentials", "S3Location", "parse_s3_url"]

T = TypeVar("T")

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}\Z")
_TIMEOUT_DEFAULT_S = 20.0
_TIMEOUT_MAX_S = 600.0
_RATE_MIN_BPS = 256 * 1024
"""Bytes a second. A link that is slower than this is as good as dead: an RPO could not be held over it."""


class S3Client(enum.Enum):
    """Which library speaks S3."""

    OBSTORE = "obstore"
    AIOBOTOCORE = "aiobotocore"


class EtagForm(enum.Enum):
    """How an ETag is written in ``If-Match``: in double quotes as HTTP wants it, or bare, as old Ceph gateways do."""

    QUOTED = "quoted"
    UNQUOTED = "unquoted"

    def write(self, etag: str) -> str:
        """The value for the header."""
        return f'"{etag}"' if self is EtagForm.QUOTED else etag


@attrs.frozen
class S3Credentials:
    """A key pair, with the token of a session if there is one. The secret parts never show in a ``repr``."""

    access_key_id: str
    secret_access_key: str = attrs.field(repr=False)
    session_token: str | None = attrs.field(default=None, repr=False)


@attrs.frozen
class S3Location:
    """A parsed URL."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    signed_payload: bool = True
    ca_file: str | None = None
    timeout_s: float = _TIMEOUT_DEFAULT_S
    client: S3Client = S3Client.OBSTORE
    profile: str | None = None

    @property
    def url(self) -> str:
        """The URL again, in one form for each location."""
        options = {
            "endpoint": self.endpoint,
            "region": self.region,
            "path_style": str(self.path_style).lower()
            if self.path_style is not (self.endpoint is not None)
            else None,
            "ca_file": self.ca_file,
            "payload": None if self.signed_payload else "unsigned",
            "timeout_s": None if self.timeout_s == _TIMEOUT_DEFAULT_S else f"{self.timeout_s:g}",
            "client": None if self.client is S3Client.OBSTORE else self.client.value,
            "profile": self.profile,
        }
        query = urlencode({name: value for name, value in options.items() if value is not None}, safe=":/")
        path = f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket
        return f"s3://{path}?{query}" if query else f"s3://{path}"

    def object_name(self, key: str) -> str:
        """The key as the bucket knows it."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def time_for(self, size: int) -> float:
        """Seconds after which a request that moves ``size`` bytes is given up."""
        return self.timeout_s + size / _RATE_MIN_BPS


def parse_s3_url(url: str) -> S3Location:
    """The location that a URL names. Raises `InvalidRequestError`, which does not repeat what may be a secret."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise InvalidRequestError(
            "an S3 URL must not hold credentials", hint="use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    bucket, prefix = parts.netloc, parts.path.strip("/")
    if parts.scheme != "s3" or _BUCKET.match(bucket) is None or parts.fragment:
        raise InvalidRequestError(
            f"{parts.scheme}://{bucket} is not an S3 URL", hint="s3://bucket/prefix?endpoint=..."
        )
    if prefix:
        check_key(prefix)
    options = _options(parts.query)
    endpoint = _endpoint(options.pop("endpoint", None))
    location = S3Location(
        bucket=bucket,
        prefix=prefix,
        endpoint=endpoint,
        region=options.pop("region", None),
        path_style=_choice(options, "path_style", {"true": True, "false": False}, endpoint is not None),
        signed_payload=_choice(options, "payload", {"signed": True, "unsigned": False}, True),
        ca_file=options.pop("ca_file", None),
        timeout_s=_timeout(options.pop("timeout_s", None)),
        client=_choice(options, "client", {client.value: client for client in S3Client}, S3Client.OBSTORE),
        profile=options.pop("profile", None),
    )
    if options:
        raise InvalidRequestError(f"an S3 URL has no option {', '.join(sorted(options))}")
    if location.profile is not None and location.client is not S3Client.AIOBOTOCORE:
        raise InvalidRequestError("profile needs client=aiobotocore", hint="or export the profile's keys")
    return location


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        name = name.replace("-", "_")
        if name in options:
            raise InvalidRequestError(f"the option {name} is given twice")
        options[name] = value
    return options


def _endpoint(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise InvalidRequestError("the endpoint of an S3 URL must look like https://host:port")
    return endpoint.rstrip("/")


def _choice(options: dict[str, str], name: str, values: Mapping[str, T], default: T) -> T:
    given = options.pop(name, None)
    if given is None:
        return default
    if given not in values:
        raise InvalidRequestError(f"{name} cannot be {given!r}", hint=f"one of {', '.join(values)}")
    return values[given]


def _timeout(given: str | None) -> float:
    if given is None:
        return _TIMEOUT_DEFAULT_S
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s <= _TIMEOUT_MAX_S:
        raise InvalidRequestError(
            f"timeout_s cannot be {given!r}", hint=f"seconds, at most {_TIMEOUT_MAX_S:.0f}"
        )
    return timeout_s
