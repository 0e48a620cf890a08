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
from silo.sync.s3_location import S3Credentials
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


def test_the_script_is_short_and_independent() -> None:
    """Somebody who has only the specification can type it in."""
    script = the_script()
    assert "silo" not in script
    lines = [line for line in script.splitlines() if line.strip()]
    assert len(lines) <= 75
