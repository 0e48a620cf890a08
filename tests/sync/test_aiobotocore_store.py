"""The S3 store on aiobotocore. What both S3 clients have in common is in `test_s3_store`."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiobotocore.session import AioSession

from silo.clock import SystemClock
from silo.errors import InvalidRequestError
from silo.sync.aiobotocore_store import AiobotocoreStore
from silo.sync.s3_location import S3Credentials, parse_s3_url
from silo.sync.store_url import open_store
from silo.testing.check_store import check_store
from tests.support.s3 import S3Server


async def test_contract(s3_server: S3Server, bucket: str) -> None:
    session = AioSession()  # shared: every session reads botocore's models anew
    credentials = S3Credentials(s3_server.access_key_id, s3_server.secret_access_key)
    location = parse_s3_url(s3_server.url(bucket, "pre/fix", client="aiobotocore"))

    async def make() -> AiobotocoreStore:
        return AiobotocoreStore(location, credentials=credentials, session=session)

    await check_store(make, writers=2, rounds=3, big=1 << 20)


async def test_profiles(
    s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: SystemClock
) -> None:
    (tmp_path / "credentials").write_text(
        f"[work]\naws_access_key_id = {s3_server.access_key_id}\n"
        f"aws_secret_access_key = {s3_server.secret_access_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    store = open_store(s3_server.url(bucket, client="aiobotocore", profile="work"), clock)
    assert await store.put_if("a", [b"x"], match=None) is not None
    await store.aclose()


async def test_without_credentials_or_with_a_wrong_profile(
    s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: SystemClock
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for options in ({}, {"profile": "nobody"}):
        store = open_store(s3_server.url(bucket, client="aiobotocore", **options), clock)
        with pytest.raises(InvalidRequestError, match=r"credentials|profile"):
            await store.get("a")
        await store.aclose()
