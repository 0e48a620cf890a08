"""Stores by URL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from silo.clock import SystemClock
from silo.errors import InvalidRequestError
from silo.sync.aiobotocore_store import AiobotocoreStore
from silo.sync.file_store import FileStore
from silo.sync.memory_client import MemoryClient
from silo.sync.s3_location import S3Credentials
from silo.sync.s3_store import S3Store
from silo.sync.store_url import open_store


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("file:///var/lib/silo-store", FileStore),
        ("s3://bucket/prefix?region=eu-central-1", S3Store),
        ("s3://bucket/prefix?region=eu-central-1&client=aiobotocore", AiobotocoreStore),
        ("memory:", MemoryClient),
    ],
)
async def test_kinds(clock: SystemClock, url: str, kind: type) -> None:
    store = open_store(url, clock)
    assert type(store) is kind
    assert store.url == url
    await store.aclose()


async def test_a_directory_with_spaces(tmp_path: Path, clock: SystemClock) -> None:
    store = open_store(f"file://{tmp_path}/with%20space", clock)
    await store.put("a", [b"x"])
    assert (tmp_path / "with space" / "a").read_bytes() == b"x"
    assert store.url == f"file://{tmp_path}/with%20space"
    await store.aclose()


async def test_network_file_systems_can_be_allowed(tmp_path: Path, clock: SystemClock) -> None:
    store = open_store(f"file://{tmp_path}?network-filesystem=allow", clock)
    assert await store.get("a") is None
    await store.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/var/lib/store",
        "bucket/prefix",
        "ftp://host/dir",
        "file://host/dir",
        "file:relative",
        "file:///dir?option=1",
        "file:///dir?network-filesystem=deny",
        "file:///dir#fragment",
        "s3://",
    ],
)
def test_nonsense(clock: SystemClock, url: str) -> None:
    with pytest.raises(InvalidRequestError):
        open_store(url, clock)


def test_only_s3_takes_credentials(clock: SystemClock) -> None:
    with pytest.raises(InvalidRequestError):
        open_store("file:///dir", clock, credentials=S3Credentials("a", "b"))


def test_clients_are_imported_only_when_asked_for() -> None:
    code = (
        "import sys; from silo.clock import SystemClock; from silo.sync.store_url import open_store;"
        "open_store('file:///nowhere', SystemClock());"
        "print([name for name in ('obstore', 'aiobotocore', 'botocore', 'aiohttp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
