"""Over a real S3 client and server: sync, restore, and a restore by a script that knows nothing of this package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from silo.clock import SystemClock
from silo.sync.caretaker import Caretaker
from silo.sync.head import Keeping
from silo.sync.pins import Keeper
from silo.sync.reader import StoreReader
from silo.sync.s3_location import S3Credentials
from silo.sync.settings import CollectorSettings
from silo.sync.store_url import open_store
from tests.support.s3 import S3Server, moto_server
from tests.support.source import ROOT
from tests.support.sync import CHUNK, SETTINGS, make_group, restored, syncing


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """An S3 server that checks signatures."""
    with moto_server() as running:
        yield running


def the_script() -> str:
    """The program in the specification of the format."""
    text = (ROOT / "docs/formats/store.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return script


async def test_a_script_restores_what_was_stored(
    server: S3Server, clock: SystemClock, tmp_path: Path
) -> None:
    """With a root, segments since, raw, compressed and zero chunks: both restores give what the guest saw."""
    bucket = server.make_bucket("restore")
    credentials = S3Credentials(server.access_key_id, server.secret_access_key)
    store = open_store(server.url(bucket, "deep/prefix"), clock, credentials=credentials)
    settings = attrs.evolve(SETTINGS, checkpoint_segments=1)
    group = make_group(clock, {"disk": 3000 * CHUNK, "ram": 10 * CHUNK + 512})
    async with syncing(store, clock, group=group, settings=settings) as it:
        for chunk in range(0, 60, 2):
            await it.write(chunk, clock.token(CHUNK))
            await it.write(2500 + chunk, b"text %d" % chunk)
        await it.write(3, b"memory", "ram")
        await it.syncer.sync_now()
        for round_ in range(8):
            await it.write(round_ * 5, clock.token(CHUNK))
            await it.disk.zero((2510 + round_) * CHUNK, 3 * CHUNK)
            await it.syncer.sync_now()
        image = it.image()
        assert it.head.root is not None
        assert it.head.segments
    assert await restored(store, clock) == image
    await store.aclose()
    script = tmp_path / "restore.py"
    script.write_text(the_script())
    for volume, content in image.items():
        path = tmp_path / volume
        command = [
            sys.executable,
            str(script),
            server.endpoint,
            bucket,
            "vm1",
            volume,
            str(path),
            "deep/prefix",
        ]
        environment = {"PATH": os.environ["PATH"], "AWS_DEFAULT_REGION": "us-east-1"} | server.environment()
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=50)
        assert path.read_bytes() == content


async def test_the_example_restores_what_was_stored(
    server: S3Server, clock: SystemClock, tmp_path: Path
) -> None:
    """With minio-py, in a bucket with versions: the newest generation, and a point whose rest was collected."""
    bucket = server.make_bucket("minio")
    versions = {"Status": "Enabled"}
    server.boto_client("s3").put_bucket_versioning(Bucket=bucket, VersioningConfiguration=versions)
    credentials = S3Credentials(server.access_key_id, server.secret_access_key)
    store = open_store(server.url(bucket, "deep/prefix"), clock, credentials=credentials)
    reader = StoreReader(store, clock)
    settings = attrs.evolve(SETTINGS, checkpoint_segments=1, collector=CollectorSettings(grace_s=0))
    group = make_group(clock, {"disk": 3000 * CHUNK})
    images = {}
    async with syncing(store, clock, group=group, settings=settings) as it:
        caretaker = Caretaker(it.group, it.syncer, store, reader, clock)
        for round_ in range(4):
            for chunk in range(40):
                await it.write(chunk, clock.token(CHUNK))
            await it.write(2000 + round_, b"text %d" % round_)
            await it.syncer.sync_now()
            if round_ == 0:
                await caretaker.fold(hurry=True)
                point = await Keeper(store, reader, clock).keep_newest("vm1", Keeping.POINT)
                images[str(point.head.generation)] = it.image()["disk"]
            await caretaker.collect(hurry=True)
        await caretaker.fold(hurry=True)
        assert (await caretaker.collect(hurry=True)).deleted_objects > 0
        images[""] = it.image()["disk"]
    await store.aclose()
    for generation, content in images.items():
        path = tmp_path / f"disk-{generation}"
        script = str(ROOT / "examples" / "restore_with_minio.py")
        where = [server.endpoint, bucket, "vm1", "disk", str(path), "deep/prefix", generation]
        environment = {"PATH": os.environ["PATH"]} | server.environment()
        subprocess.run(
            [sys.executable, script, *where], check=True, env=environment, cwd=tmp_path, timeout=50
        )
        assert path.read_bytes() == content
    text = (ROOT / "examples" / "restore_with_minio.py").read_text()
    assert "import silo" not in text
    assert "from silo" not in text


def test_the_script_is_short_and_independent() -> None:
    """Somebody who has only the specification can type it in."""
    script = the_script()
    assert "silo" not in script
    lines = [line for line in script.splitlines() if line.strip()]
    assert len(lines) <= 75
