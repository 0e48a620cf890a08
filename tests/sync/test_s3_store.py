"""The S3 stores against a server that checks signatures, and behind a proxy that does what networks do.

Both clients are held to the same: what is said here of one is said of the other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from silo.abc import ObjectStore
from silo.clock import SystemClock
from silo.errors import InvalidRequestError, UnavailableError
from silo.sync.s3_location import EtagForm, S3Credentials
from silo.sync.s3_store import S3Store
from silo.sync.store_url import open_store
from silo.testing.check_store import check_store
from tests.support.certificates import Authority
from tests.support.fault_proxy import FaultProxy, HttpFaultKind
from tests.support.metadata_service import metadata_service
from tests.support.s3 import S3Server, moto_server

clients = pytest.mark.parametrize("client", ["obstore", "aiobotocore"])


def store_at(server: S3Server, url: str, secret: str | None = None) -> ObjectStore:
    credentials = S3Credentials(server.access_key_id, secret or server.secret_access_key)
    return open_store(url, SystemClock(), credentials=credentials)


@asynccontextmanager
async def behind_proxy(
    server: S3Server, bucket: str, client: str, **options: str
) -> AsyncIterator[tuple[ObjectStore, FaultProxy]]:
    async with FaultProxy(server.endpoint) as proxy:
        store = store_at(server, server.url(bucket, "vm", client=client, **{"endpoint": proxy.url} | options))
        try:
            yield store, proxy
        finally:
            await store.aclose()


async def body(store: ObjectStore, key: str) -> bytes | None:
    found = await store.get(key)
    return None if found is None else bytes(found.data)


@pytest.mark.parametrize("options", [{}, {"payload": "unsigned"}])
async def test_contract(s3_server: S3Server, bucket: str, options: dict[str, str]) -> None:
    async def make() -> ObjectStore:
        return store_at(s3_server, s3_server.url(bucket, "pre/fix", **options))

    await check_store(make, writers=4, rounds=3)
    assert "Contents" not in s3_server.boto_client("s3").list_objects_v2(Bucket=bucket)


@pytest.mark.slow
@clients
async def test_listings_of_several_pages(s3_server: S3Server, bucket: str, client: str) -> None:
    async def make() -> ObjectStore:
        return store_at(s3_server, s3_server.url(bucket, client=client))

    await check_store(make, writers=2, rounds=1, many=1100)


async def test_credentials_come_from_the_environment(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, clock: SystemClock
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    for client in ("obstore", "aiobotocore"):
        store = open_store(s3_server.url(bucket, client=client), clock)
        assert await store.put_if(client, [b"x"], match=None) is not None
        await store.aclose()


@clients
async def test_credentials_come_from_the_instance(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, clock: SystemClock, client: str
) -> None:
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_EC2_METADATA_DISABLED",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    keys = s3_server.temporary_credentials()
    async with metadata_service(*keys) as url, FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", url)  # what obstore reads
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)  # what botocore reads
        store = open_store(s3_server.url(bucket, client=client, endpoint=proxy.url), clock)
        assert await store.put_if("a", [b"x"], match=None) is not None
        assert proxy.exchanges[0].headers["x-amz-security-token"] == keys[2]
        await store.aclose()


async def test_no_credentials_anywhere(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, clock: SystemClock
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    async with FaultProxy(s3_server.endpoint) as proxy:
        proxy.inject(HttpFaultKind.STATUS, status=404, code="NotFound", times=None)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", proxy.url)
        store = open_store(s3_server.url(bucket), clock)
        with pytest.raises(UnavailableError, match="AWS_ACCESS_KEY_ID"):
            await store.get("a")
        await store.aclose()


def test_a_process_that_ends_after_its_last_request_ends_well(s3_server: S3Server, bucket: str) -> None:
    code = (
        "import asyncio, sys; from silo.clock import SystemClock; from silo.sync.store_url import open_store\n"
        "async def main():\n"
        "    await open_store(sys.argv[1], SystemClock()).put('a', [b'x'])\n"
        "asyncio.run(main())"
    )
    environment = os.environ | s3_server.environment()
    for _ in range(12):  # without the pause at exit about every sixth aborts
        subprocess.run([sys.executable, "-c", code, s3_server.url(bucket)], env=environment, check=True)


@clients
async def test_requests_are_plain(s3_server: S3Server, bucket: str, client: str) -> None:
    async with behind_proxy(s3_server, bucket, client) as (store, proxy):
        etag = await store.put_if("head", [b"one ", b"body"], match=None)
        assert etag is not None
        await store.put_if("head", [b"another"], match=etag)
        await store.put("head", [b"third"])
        create, replace, put = proxy.exchanges
        assert (create.path, create.body_size) == (f"/{bucket}/vm/head", 8)
        assert create.headers["if-none-match"] == "*"
        assert replace.headers["if-match"] == f'"{etag}"'
        assert not {"if-match", "if-none-match"} & set(put.headers)
        for exchange in proxy.exchanges:
            headers = exchange.headers
            assert headers["content-length"] == str(exchange.body_size)
            assert headers["authorization"].startswith("AWS4-HMAC-SHA256 ")
            assert len(headers["x-amz-content-sha256"]) == 64
            assert not {"transfer-encoding", "content-encoding", "x-amz-trailer"} & set(headers)
        store.etag_form = EtagForm.UNQUOTED  # type: ignore[attr-defined]
        assert await store.put_if("head", [b"x"], match="0" * 32) is None
        assert proxy.exchanges[-1].headers["if-match"] == "0" * 32


@clients
@pytest.mark.parametrize(
    ("status", "code"),
    [(429, "TooManyRequests"), (500, "InternalError"), (503, "SlowDown"), (409, "Conflict")],
)
async def test_a_busy_server_is_asked_once(
    s3_server: S3Server, bucket: str, client: str, status: int, code: str
) -> None:
    async with behind_proxy(s3_server, bucket, client) as (store, proxy):
        etag = await store.put("there", [b"x"])
        before = len(proxy.exchanges)
        proxy.inject(HttpFaultKind.STATUS, status=status, code=code, times=None)
        for call in (
            store.put("a", [b"x"]),
            store.put_if("a", [b"x"], match=None),
            store.put_if("there", [b"x"], match=etag),
            store.get("there"),
            store.head("there"),
            store.delete(["there"]),
            anext(store.list("")),
        ):
            with pytest.raises(UnavailableError, match=str(status)):
                await call
        assert len(proxy.exchanges) - before == 7
        proxy.faults.clear()
        assert await body(store, "a") is None
        assert await body(store, "there") == b"x"


@clients
async def test_connections_that_break(s3_server: S3Server, bucket: str, client: str) -> None:
    async with behind_proxy(s3_server, bucket, client) as (store, proxy):
        proxy.inject(HttpFaultKind.RESET, "PUT")
        with pytest.raises(UnavailableError):
            await store.put_if("a", [b"x"], match=None)
        assert await body(store, "a") is None

        proxy.inject(HttpFaultKind.LOSE_RESPONSE, "PUT")
        with pytest.raises(UnavailableError):
            await store.put_if("a", [b"applied"], match=None)
        assert await body(store, "a") == b"applied"
        assert await store.put_if("a", [b"again"], match=None) is None

        proxy.inject(HttpFaultKind.RESET, "GET")
        with pytest.raises(UnavailableError):
            await store.get("a")
        assert [exchange.method for exchange in proxy.exchanges].count("PUT") == 3


@clients
async def test_a_put_that_lands_late(s3_server: S3Server, bucket: str, client: str) -> None:
    async with behind_proxy(s3_server, bucket, client) as (store, proxy):
        old = await store.put("head", [b"old"])
        proxy.inject(HttpFaultKind.LATE, "PUT", times=2)
        for late in (b"late", b"too late"):
            with pytest.raises(UnavailableError):
                await store.put_if("head", [late], match=old)
        assert await body(store, "head") == b"old"
        await proxy.land_late()
        assert await body(store, "head") == b"late"


@clients
async def test_a_body_that_is_cut_short(s3_server: S3Server, bucket: str, client: str) -> None:
    async with behind_proxy(s3_server, bucket, client) as (store, proxy):
        await store.put("a", [bytes(100_000)])
        for start, length in ((0, None), (10, 50_000)):
            proxy.inject(HttpFaultKind.TRUNCATE, "GET")
            with pytest.raises(UnavailableError):
                await store.get("a", start=start, length=length)
        assert await body(store, "a") == bytes(100_000)


@clients
async def test_a_server_that_does_not_answer(s3_server: S3Server, bucket: str, client: str) -> None:
    async with behind_proxy(s3_server, bucket, client, timeout_s="0.3") as (store, proxy):
        proxy.inject(HttpFaultKind.HANG, times=2)
        with pytest.raises(UnavailableError, match="within"):
            await store.put_if("a", [b"x"], match=None)
        with pytest.raises(UnavailableError, match="within"):
            await store.get("a")
        assert await store.put_if("a", [b"x"], match=None) is not None


@clients
async def test_nobody_listens(s3_server: S3Server, bucket: str, client: str) -> None:
    async with FaultProxy(s3_server.endpoint) as proxy:
        gone = proxy.url
    store = store_at(s3_server, s3_server.url(bucket, client=client, endpoint=gone))
    with pytest.raises(UnavailableError):
        await store.get("a")
    await store.aclose()


@clients
async def test_a_cancelled_call_ends_at_once(s3_server: S3Server, bucket: str, client: str) -> None:
    async with behind_proxy(s3_server, bucket, client) as (store, proxy):
        proxy.inject(HttpFaultKind.HOLD, "PUT")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(store.put_if("a", [b"x"], match=None))
            await proxy.struck.wait()
            task.cancel()
        assert task.cancelled()
        assert await body(store, "a") is None
        proxy.go.set()
        assert await store.put("b", [b"y"])


@clients
async def test_wrong_credentials_are_not_told(
    s3_server: S3Server, bucket: str, client: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = store_at(s3_server, s3_server.url(bucket, client=client), secret="wrong-and-secret")
    calls = (
        store.get("a"),
        store.put_if("a", [b"x"], match=None),
        store.delete(["a"]),
        anext(store.list("")),
    )
    for call in calls:
        with pytest.raises(InvalidRequestError) as caught:
            await call
        told = f"{caught.value} {caught.value!r} {caught.value.__cause__!r} {store.url} {store!r}"
        assert "403" in told
        assert "credentials" in caught.value.hint
        assert "wrong-and-secret" not in told
        assert s3_server.access_key_id not in told
    assert "wrong-and-secret" not in caplog.text
    await store.aclose()


@clients
async def test_a_missing_bucket_is_not_an_empty_one(s3_server: S3Server, client: str) -> None:
    store = store_at(s3_server, s3_server.url("no-such-bucket", client=client))
    for call in (
        store.get("head"),
        store.put_if("head", [b"x"], match=None),
        store.put_if("head", [b"x"], match="0" * 32),
        store.put("head", [b"x"]),
        store.delete(["head"]),
        anext(store.list("")),
    ):
        with pytest.raises(InvalidRequestError, match="NoSuchBucket"):
            await call
    await store.aclose()


@clients
def test_tls_with_an_authority_of_ones_own(tmp_path: Path, client: str) -> None:
    authority = Authority(tmp_path)
    with moto_server(authority) as server:
        bucket = server.make_bucket("bucket")

        async def use(**options: str) -> str | None:
            store = store_at(server, server.url(bucket, client=client, **options))
            try:
                return await store.put_if("a", [bytes(100_000)], match=None)
            finally:
                await store.aclose()

        with pytest.raises(UnavailableError):
            asyncio.run(use())
        assert asyncio.run(use(ca_file=str(authority.path))) is not None


def test_a_missing_file_of_authorities(clock: SystemClock) -> None:
    with pytest.raises(InvalidRequestError, match="nowhere"):
        open_store("s3://bucket?ca_file=/nowhere.pem", clock)


async def test_virtual_hosts(s3_server: S3Server, bucket: str) -> None:
    location = s3_server.url(bucket, path_style="false", endpoint="https://s3.example:9000")
    store = store_at(s3_server, location)
    assert isinstance(store, S3Store)
    assert store._client is not None
    assert store._client.config["endpoint"] == f"https://{bucket}.s3.example:9000"
    await store.aclose()
