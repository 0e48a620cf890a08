"""Both S3 clients against a real server that differs from Amazon's in many ways: Ceph's gateway."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from aiobotocore.session import AioSession

from silo.abc import ObjectStore
from silo.clock import SystemClock
from silo.sync.aiobotocore_store import AiobotocoreStore
from silo.sync.probe import Probe, probe_store
from silo.sync.s3_location import EtagForm, S3Client, S3Credentials, parse_s3_url
from silo.sync.s3_store import S3Store
from silo.testing.check_store import check_store
from tests.support.radosgw import radosgw_server
from tests.support.s3 import S3Server

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@pytest.fixture(scope="module")
def radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with radosgw_server(tmp_path_factory.mktemp("radosgw")) as server:
        yield server


@pytest.mark.parametrize("client", S3Client)
async def test_contract(radosgw: S3Server, clock: SystemClock, client: S3Client) -> None:
    """The probe finds the one form of ETag that works; with it the whole contract holds."""
    bucket = radosgw.make_bucket(f"contract-{client.value}")
    location = parse_s3_url(radosgw.url(bucket, "pre/fix", client=client.value))
    credentials = S3Credentials(radosgw.access_key_id, radosgw.secret_access_key)
    session = AioSession()

    def open_handle() -> S3Store | AiobotocoreStore:
        if client is S3Client.OBSTORE:
            return S3Store(location, credentials=credentials)
        return AiobotocoreStore(location, credentials=credentials, session=session)

    first = open_handle()
    assert await probe_store(first, clock) == Probe((EtagForm.UNQUOTED,))
    assert first.etag_form is EtagForm.UNQUOTED
    await first.aclose()

    async def make() -> ObjectStore:
        store = open_handle()
        store.etag_form = EtagForm.UNQUOTED
        return store

    await check_store(make, writers=6)
