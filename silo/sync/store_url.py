"""From a URL to an object store. The one place that knows which kinds there are.

======================================  ==================================================================
``file:///directory``                   `silo.sync.file_store`; ``?network-filesystem=allow`` where it must be
``s3://bucket/prefix?...``              `silo.sync.s3_store`; the options are those of `silo.sync.s3_location`
``s3://...?client=aiobotocore``         `silo.sync.aiobotocore_store`, which needs the extra ``s3-aiobotocore``
``memory:``                             `silo.sync.memory_store`, a new and empty one every time
======================================  ==================================================================

Opening does no I/O: what is wrong with the place shows at the first call. The clients are imported only here and
only when they are asked for, because they take longer to import than all the rest together.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from silo.abc import Clock, ObjectStore
from silo.errors import InvalidRequestError
from silo.sync.s3_location import S3Client, S3Credentials, S3Location, parse_s3_url

__all__ = ["open_store"]


def open_store(url: str, clock: Clock, *, credentials: S3Credentials | None = None) -> ObjectStore:
    """Open the store that ``url`` names. The caller closes it.

    ``credentials`` are for S3; without them the client's own chain applies (environment, instance metadata, ...).
    Raises `InvalidRequestError` for a URL that makes no sense.
    """
    scheme = urlsplit(url).scheme
    if credentials is not None and scheme != "s3":
        raise InvalidRequestError(f"a {scheme or 'nameless'} store takes no credentials")
    if scheme == "file":
        return _open_directory(url, clock)
    if scheme == "s3":
        return _open_bucket(parse_s3_url(url), credentials)
    if scheme == "memory":
        from silo.sync.memory_store import MemoryStore

        return MemoryStore(clock).client()
    raise InvalidRequestError(
        f"{scheme or 'no scheme'!r} is not a kind of store",
        hint="use file:///directory or s3://bucket/prefix",
    )


def _open_directory(url: str, clock: Clock) -> ObjectStore:
    from silo.sync.file_store import FileStore

    parts = urlsplit(url)
    options = parse_qs(parts.query, keep_blank_values=True)
    network = options.pop("network-filesystem", options.pop("network_filesystem", None))
    if options or network not in (None, ["allow"]):
        raise InvalidRequestError("a file store's only option is network-filesystem=allow")
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.fragment:
        raise InvalidRequestError(f"{url!r} does not name a directory", hint="use file:///absolute/path")
    return FileStore(Path(unquote(parts.path)), clock, allow_network_filesystem=network is not None)


def _open_bucket(location: S3Location, credentials: S3Credentials | None) -> ObjectStore:
    if location.client is S3Client.OBSTORE:
        from silo.sync.s3_store import S3Store

        return S3Store(location, credentials=credentials)
    try:
        from silo.sync.aiobotocore_store import AiobotocoreStore
    except ImportError as error:
        raise InvalidRequestError(
            "client=aiobotocore needs aiobotocore", hint="pip install 'silo-blocks[s3-aiobotocore]'"
        ) from error
    return AiobotocoreStore(location, credentials=credentials)
