"""Buckets that keep every version of every object: nothing that decides who writes may depend on that."""

from __future__ import annotations

import msgspec
import pytest

from silo.clock import SystemClock
from silo.errors import CorruptionError, FencedError
from silo.sync.claim import Expectation, Seen
from silo.sync.head import VolumeInfo
from silo.sync.probe import probe_store
from silo.sync.register import Register
from silo.sync.s3_location import S3Credentials
from silo.sync.store_url import open_store
from tests.support.s3 import S3Server

VOLUMES = (VolumeInfo("disk", 1 << 20, 65536, 4096),)


@pytest.mark.parametrize("client", ["obstore", "aiobotocore"])
@pytest.mark.parametrize("versioning", ["Enabled", "Suspended"])
async def test_owners_and_zombies(
    s3_server: S3Server, bucket: str, clock: SystemClock, client: str, versioning: str
) -> None:
    """Claims, commits, fencing, and a head of which an older version was put back."""
    s3 = s3_server.boto_client("s3")
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": versioning})
    credentials = S3Credentials(s3_server.access_key_id, s3_server.secret_access_key)
    store = open_store(s3_server.url(bucket, client=client), clock, credentials=credentials)
    try:
        await probe_store(store, clock, prefix="vm1/")
        old, new = Register(store, "vm1", clock), Register(store, "vm1", clock)
        head = await old.claim(Expectation.opening(), volumes=VOLUMES)
        first = s3.get_object(Bucket=bucket, Key="vm1/head")["Body"].read()
        head = await old.commit(msgspec.structs.replace(head, generation=1))
        claimed = await new.claim(Expectation.force())
        await new.commit(msgspec.structs.replace(claimed, generation=2))
        with pytest.raises(FencedError):
            await old.commit(msgspec.structs.replace(head, generation=2))
        versions = s3.list_object_versions(Bucket=bucket, Prefix="vm1/head").get("Versions", [])
        assert len(versions) == (4 if versioning == "Enabled" else 1)
        s3.put_object(Bucket=bucket, Key="vm1/head", Body=first)
        with pytest.raises(CorruptionError, match="rolled back"):
            await new.confirm()
        late = Register(store, "vm1", clock)
        with pytest.raises(CorruptionError, match="rolled back"):
            await late.claim(Expectation.restoring((), Seen(2), forced=True))
    finally:
        await store.aclose()
