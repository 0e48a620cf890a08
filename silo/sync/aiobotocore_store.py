"""The S3 store on aiobotocore: five times the CPU of `silo.sync.s3_store`, and everything that botocore knows
about credentials: profiles, SSO, assumed roles, processes.

The same contract, the same values and errors. The client is made lean: no parameter validation, no checksum
trailers (which need chunked bodies, which some gateways refuse, and which some servers answer wrongly for ranges:
our own digests cover the content), plain signed bodies. A body is joined into one buffer, because the client would
otherwise read it piecewise in a thread.

Nothing is retried, on two levels: botocore's own retries are configured away, and those of aiohttp, which sends a
PUT again when its connection breaks, are switched off where no configuration reaches (`_AskingOnce`).

The connection pool belongs to the event loop of the first call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

from silo.abc import Buffer, ObjectInfo, ObjectStore, StoredObject
from silo.errors import ClosedError, InvalidRequestError, SiloError
from silo.sync.s3_errors import NO_SUCH_BUCKET, NOT_FOUND, PRECONDITION_FAILED, no_answer, refusal
from silo.sync.s3_location import EtagForm, S3Credentials, S3Location
from silo.sync.store_keys import check_key, check_prefix, check_range

__all__ = ["AiobotocoreStore"]

_CONNECT_TIMEOUT_S = 5
_CONNECTIONS_MAX = 64
_LIST_PAGE = 1000
_DELETE_BATCH = 1000
"""What one DeleteObjects request may name."""
_ABSENT = frozenset({NOT_FOUND})
_PRECONDITION = frozenset({PRECONDITION_FAILED})


class AiobotocoreStore(ObjectStore):
    """Objects in a bucket, below a prefix. Without ``credentials`` botocore's chain finds them.

    ``session`` brings an own one, configured in whatever way botocore allows; then the location's profile counts
    for nothing.
    """

    def __init__(
        self,
        location: S3Location,
        *,
        credentials: S3Credentials | None = None,
        session: AioSession | None = None,
    ) -> None:
        self.url = location.url
        self.etag_form = EtagForm.QUOTED
        """How `put_if` writes ETags. The probe sets it."""
        self._location = location
        self._credentials = credentials
        self._session = session or AioSession(profile=location.profile)
        self._connections = AsyncExitStack()
        self._client: Any = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def put(self, key: str, data: Sequence[Buffer]) -> str:
        check_key(key)
        return _etag(await self._put(key, data))

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        check_key(key)
        if match is None:
            answer = await self._put(key, data, unmet=_PRECONDITION, IfNoneMatch="*")
        else:
            unmet = _PRECONDITION | _ABSENT
            answer = await self._put(key, data, unmet=unmet, IfMatch=self.etag_form.write(match))
        return None if answer is None else _etag(answer)

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        check_key(key)
        check_range(start, length)
        what = f"get {key}"
        asked = {}
        if length is not None:
            asked["Range"] = f"bytes={start}-{start + length - 1}"
        elif start:
            asked["Range"] = f"bytes={start}-"
        client = await self._open_client()
        answer = await self._answer(client.get_object(**self._named(key), **asked), 0, what, unmet=_ABSENT)
        if answer is None:
            return None
        coming = answer["ContentLength"]
        async with answer["Body"] as stream:
            body = await self._answer(stream.read(), coming, what)
        if len(body) != coming:
            raise no_answer(what, f"{len(body)} of {coming} bytes came")
        size = int(answer["ContentRange"].rpartition("/")[2]) if asked else coming
        return StoredObject(body, _etag(answer), size)

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        client = await self._open_client()
        answer = await self._answer(client.head_object(**self._named(key)), 0, f"head {key}", unmet=_ABSENT)
        if answer is None:
            return None
        return ObjectInfo(key, answer["ContentLength"], _etag(answer), answer["LastModified"].timestamp())

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        client = await self._open_client()
        for first in range(0, len(keys), _DELETE_BATCH):
            batch = [{"Key": self._location.object_name(key)} for key in keys[first : first + _DELETE_BATCH]]
            request = client.delete_objects(
                Bucket=self._location.bucket, Delete={"Objects": batch, "Quiet": True}
            )
            what = f"delete {len(batch)} objects"
            answer = await self._answer(request, 0, what)
            for failed in answer.get("Errors", ()):
                raise no_answer(what, f"one failed with {failed.get('Code', 'an error')}")

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        client = await self._open_client()
        asked = {
            "Bucket": self._location.bucket,
            "Prefix": self._location.object_name(prefix),
            "MaxKeys": _LIST_PAGE,
        }
        skip = len(self._location.object_name(""))
        while True:
            page = await self._answer(client.list_objects_v2(**asked), 0, f"list {prefix}")
            for found in page.get("Contents", ()):
                modified = found["LastModified"].timestamp()
                yield ObjectInfo(found["Key"][skip:], found["Size"], _etag(found), modified)
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    async def aclose(self) -> None:
        self._closed = True
        self._client = None
        await self._connections.aclose()

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self._location.bucket, "Key": self._location.object_name(key)}

    async def _open_client(self) -> Any:
        async with self._opening:  # no deadline: reads configuration files, and no network
            if self._closed:
                raise ClosedError(f"the store {self.url} is closed")
            if self._client is None:
                try:
                    client = self._session.create_client(
                        "s3", **_client_arguments(self._location, self._credentials)
                    )
                    self._client = await self._connections.enter_async_context(client)
                except (BotoCoreError, ValueError) as error:
                    raise _translated(error, "open") from None
            return self._client

    async def _put(
        self, key: str, data: Sequence[Buffer], *, unmet: frozenset[int] = frozenset(), **condition: str
    ) -> Any:
        client = await self._open_client()
        body = b"".join(data)
        request = client.put_object(**self._named(key), Body=body, **condition)
        return await self._answer(request, len(body), f"put {key}", unmet=unmet)

    async def _answer(
        self, request: Awaitable[Any], size: int, what: str, *, unmet: frozenset[int] = frozenset()
    ) -> Any:
        """Await a request that moves ``size`` bytes, within its deadline, and translate what it raises.

        None when the server refuses with one of the statuses ``unmet``, unless because there is no such bucket.
        """
        timeout_s = self._location.time_for(size)
        try:
            async with asyncio.timeout(timeout_s):
                return await request
        except TimeoutError:
            raise no_answer(what, f"nothing came within {timeout_s:.0f} s") from None
        except ClientError as error:
            status, code = _status_and_code(error)
            if status in unmet and code != NO_SUCH_BUCKET:
                return None
            raise refusal(status, code, what) from None
        except (BotoCoreError, aiohttp.ClientError, OSError) as error:
            raise _translated(error, what) from None


def _status_and_code(error: ClientError) -> tuple[int, str]:
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    code: str = error.response.get("Error", {}).get("Code", "")
    return status, "" if code == str(status) else code  # botocore makes one up when there was none


def _translated(error: Exception, what: str) -> SiloError:
    if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound | ValueError):
        return InvalidRequestError(f"cannot {what}: {error}", hint="see botocore's chain of credentials")
    return no_answer(what, type(error).__name__)


class _AskingOnce(AIOHTTPSession):
    """aiobotocore's HTTP session without aiohttp's silent second attempt, which would turn a success into a 412."""

    async def _get_session(self, proxy_url: str | None) -> Any:
        session = await super()._get_session(proxy_url)  # type: ignore[misc]
        session._retry_connection = False
        return session


def _client_arguments(location: S3Location, credentials: S3Credentials | None) -> dict[str, Any]:
    config = AioConfig(
        signature_version="s3v4",
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=location.timeout_s,
        max_pool_connections=_CONNECTIONS_MAX,
        http_session_cls=_AskingOnce,
        retries={"total_max_attempts": 1, "mode": "standard"},
        parameter_validation=False,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={
            "payload_signing_enabled": location.signed_payload,
            "addressing_style": "path" if location.path_style else "virtual",
        },
    )
    arguments: dict[str, Any] = {"config": config, "endpoint_url": location.endpoint}
    if location.region is not None:
        arguments["region_name"] = location.region
    if location.ca_file is not None:
        arguments["verify"] = location.ca_file
    elif location.endpoint is not None and location.endpoint.startswith("http://"):
        arguments["verify"] = (
            False  # without TLS, reading the system's authorities is a tenth of a second for nothing
        )
    if credentials is not None:
        arguments["aws_access_key_id"] = credentials.access_key_id
        arguments["aws_secret_access_key"] = credentials.secret_access_key
        arguments["aws_session_token"] = credentials.session_token
    return arguments


def _etag(answer: Any) -> str:
    """The ETag without its quotes: one form inside, whichever the server wants to hear."""
    etag: str = answer["ETag"]
    return etag.strip('"')
