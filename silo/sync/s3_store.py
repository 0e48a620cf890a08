"""The S3 store on obstore: requests are signed, hashed and sent outside of Python and its global lock.

Bodies are plain: hashed for the signature, sent with a Content-Length and joined from the caller's buffers
without a copy, so those must not change until the call has ended. Create is ``If-None-Match: *``, replace is
``If-Match``, in the form of ETag that `silo.sync.probe` found to work. The client never retries: it could not
know whether a lost answer was a success, and would turn one into a 412. The caller retries and can know.

Every request has a deadline that grows with the bytes it moves (`S3Location.time_for`). How many run at the same
time is the caller's business. A call that is cancelled, or given up at its deadline, is no longer waited for; if
the server already had all of it, a mutation may still land, as a whole.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store as Client

from silo.abc import Buffer, ObjectInfo, ObjectStore, StoredObject
from silo.errors import ClosedError, InvalidRequestError, UnavailableError
from silo.sync.s3_errors import CONFLICT, NO_SUCH_BUCKET, NOT_FOUND, no_answer, refusal
from silo.sync.s3_location import EtagForm, S3Credentials, S3Location
from silo.sync.store_keys import check_key, check_prefix, check_range, just_before

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode
    from obstore.store import ClientConfig, S3Config, S3Credential, S3CredentialProvider

__all__ = ["S3Store"]

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 5
_EXIT_PAUSE_S = 0.05
"""Some hundred times what a thread that waits for the lock needs."""
_LIST_PAGE = 1000
_DELETE_BATCH = 1000
"""What one DeleteObjects request may name."""

# obstore tells the answer's status and code only in its words, and some statuses apart only there.
_STATUS = re.compile(r"status code: (\d{3})")
_METADATA_SERVICE = re.compile(r"/latest/(?:api/token|meta-data)")
_CODE = re.compile(r"<Code>([A-Za-z0-9_.]{1,64})</Code>")


@atexit.register
def _let_threads_leave() -> None:
    """Give obstore's threads a moment, at exit, to come out of Python.

    A thread that hands over a result wakes the event loop and then needs the global lock once more. When the program
    is over by then, as after its last request, Python (before 3.14) ends that thread in a way that aborts the process.
    """
    threading.Event().wait(_EXIT_PAUSE_S)


class S3Store(ObjectStore):
    """Objects in a bucket, below a prefix. Without ``credentials`` obstore's own chain finds them: environment,
    web identity, container, instance metadata.
    """

    def __init__(self, location: S3Location, *, credentials: S3Credentials | None = None) -> None:
        self.url = location.url
        self.etag_form = EtagForm.QUOTED
        """How `put_if` writes ETags. The probe sets it."""
        self._location = location
        self._client: Client | None = Client(
            location.bucket,
            prefix=location.prefix or None,
            config=_config(location),
            client_options=_client_options(location),
            retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
            credential_provider=_provider(credentials),
        )

    async def put(self, key: str, data: Sequence[Buffer]) -> str:
        check_key(key)
        return await self._put(key, data, "overwrite")

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        check_key(key)
        mode: PutMode = "create" if match is None else {"e_tag": self.etag_form.write(match)}
        try:
            return await self._put(key, data, mode)
        except _ConditionFalse:
            return None

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        check_key(key)
        check_range(start, length)
        client, what = self._open_client(), f"get {key}"
        options: Any = {}
        if length is not None:
            options = {"range": (start, start + length)}
        elif start:
            options = {"range": {"offset": start}}
        try:
            found = await self._answer(obstore.get_async(client, key, options=options), 0, what)
        except FileNotFoundError:
            return None
        first, limit = found.range
        body = await self._answer(_body(found), limit - first, what)
        if len(body) != limit - first:
            raise no_answer(what, f"{len(body)} of {limit - first} bytes came")
        return StoredObject(memoryview(body), _etag(found.meta["e_tag"], what), found.meta["size"])

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        try:
            found = await self._answer(obstore.head_async(self._open_client(), key), 0, f"head {key}")
        except FileNotFoundError:
            return None
        return _info(found)

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        client = self._open_client()
        for first in range(0, len(keys), _DELETE_BATCH):
            batch = list(keys[first : first + _DELETE_BATCH])
            with contextlib.suppress(FileNotFoundError):
                await self._answer(obstore.delete_async(client, batch), 0, f"delete {len(batch)} objects")

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        directory, _, unfinished = prefix.rpartition("/")
        # obstore lists whole directories; start just before the prefix, and end behind it.
        before = just_before(prefix) if unfinished else None
        pages = obstore.list(self._open_client(), directory or None, offset=before, chunk_size=_LIST_PAGE)
        what = f"list {prefix}"
        while (page := await self._answer(_next_page(pages), 0, what)) is not None:
            for found in page:
                if found["path"].startswith(prefix):
                    yield _info(found)
                elif found["path"] > prefix:
                    return

    async def aclose(self) -> None:
        self._client = None  # the pool of connections goes with it

    def _open_client(self) -> Client:
        if self._client is None:
            raise ClosedError(f"the store {self.url} is closed")
        return self._client

    async def _put(self, key: str, data: Sequence[Buffer], mode: PutMode) -> str:
        body = [memoryview(buffer).cast("B") for buffer in data]
        size = sum(view.nbytes for view in body)
        what = f"put {key}"
        put = obstore.put_async(self._open_client(), key, body, mode=mode, use_multipart=False)
        try:
            return _etag((await self._answer(put, size, what))["e_tag"], what)
        except FileNotFoundError:
            raise refusal(NOT_FOUND, "", what) from None

    async def _answer(self, request: Awaitable[T], size: int, what: str) -> T:
        """Await a request that moves ``size`` bytes, within its deadline, and translate what it raises.

        ``FileNotFoundError`` passes: it means one thing for an object that is read and another for one that is put.
        """
        timeout_s = self._location.time_for(size)
        try:
            async with asyncio.timeout(timeout_s):
                return await request
        except TimeoutError:
            raise no_answer(what, f"nothing came within {timeout_s:.0f} s") from None
        except FileNotFoundError as error:
            status, code = _status_and_code(error)
            if code == NO_SUCH_BUCKET:
                raise refusal(status or NOT_FOUND, code, what) from None
            raise
        except BaseError as error:
            raise _translated(error, what) from None


class _ConditionFalse(Exception):
    """The server says that the condition of a write does not hold."""


def _translated(error: BaseError, what: str) -> Exception:
    if _METADATA_SERVICE.search(str(error)):
        return UnavailableError(
            f"no credentials could be had to {what}: none are set, and the instance's metadata service gives none",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the instance a role",
        )
    status, code = _status_and_code(error)
    if (
        isinstance(error, AlreadyExistsError | PreconditionError)
        and status != CONFLICT
        and code != NO_SUCH_BUCKET
    ):
        return _ConditionFalse()
    if status is not None:
        return refusal(status, code, what)
    if "redirect" in str(error):
        return refusal(301, "", what)
    return no_answer(what, "no answer, or a part of one")


def _status_and_code(error: Exception) -> tuple[int | None, str]:
    words = str(error)
    status, code = _STATUS.search(words), _CODE.search(words)
    return int(status[1]) if status else None, code[1] if code else ""


def _config(location: S3Location) -> S3Config:
    config: S3Config = {
        "conditional_put": "etag",
        "unsigned_payload": not location.signed_payload,
        "virtual_hosted_style_request": not location.path_style,
    }
    if location.region is not None:
        config["region"] = location.region
    if location.endpoint is not None:
        config["endpoint"] = location.endpoint if location.path_style else _virtual_host(location)
    return config


def _virtual_host(location: S3Location) -> str:
    """The endpoint with the bucket in its host name; obstore does not put it there by itself."""
    parts = urlsplit(location.endpoint or "")
    return parts._replace(netloc=f"{location.bucket}.{parts.netloc}").geturl()


def _client_options(location: S3Location) -> ClientConfig:
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
        # Ours come first, and depend on the size; this one only makes sure that nothing outlives them for ever.
        "timeout": timedelta(hours=1),
    }
    if location.endpoint is not None:
        options["allow_http"] = location.endpoint.startswith("http://")
    if location.ca_file is not None:
        options["root_certificate"] = _authorities(location.ca_file)
    return options


def _authorities(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"ca_file {path}: {error.strerror}") from error


def _provider(credentials: S3Credentials | None) -> S3CredentialProvider | None:
    """Fixed credentials for obstore. Not through its configuration: that would mix with the environment's token."""
    if credentials is None:
        return None
    fixed: S3Credential = {
        "access_key_id": credentials.access_key_id,
        "secret_access_key": credentials.secret_access_key,
        "token": credentials.session_token,
        "expires_at": None,
    }
    return lambda: fixed


async def _body(found: obstore.GetResult) -> obstore.Bytes:
    return await found.bytes_async()


async def _next_page(pages: Any) -> Sequence[ObjectMeta] | None:
    try:
        return await pages.__anext__()  # type: ignore[no-any-return]
    except StopAsyncIteration:
        return None


def _info(found: ObjectMeta) -> ObjectInfo:
    etag = (found["e_tag"] or "").strip('"')
    return ObjectInfo(found["path"], found["size"], etag, found["last_modified"].timestamp())


def _etag(etag: str | None, what: str) -> str:
    """The ETag without its quotes: one form inside, whichever the server wants to hear."""
    if not etag:
        raise UnavailableError(
            f"the S3 server did not name an ETag for {what}", hint="is a proxy in between?"
        )
    return etag.strip('"')
