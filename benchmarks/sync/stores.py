"""Stores that count what is asked of them, on their own rather than by what the syncer says."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from silo.abc import Buffer, ObjectInfo, ObjectStore, StoredObject
from silo.clock import SystemClock
from silo.errors import InvalidRequestError
from silo.sync.file_store import FileStore
from silo.sync.s3_location import S3Credentials, parse_s3_url
from silo.sync.s3_store import S3Store

__all__ = [
    "Counting",
    "ForgetfulStore",
    "Opener",
    "PlainStore",
    "empty",
    "open_directory",
    "s3_server",
    "scratch",
]


class Counting(ObjectStore):
    """What every store below adds to its own calls. Put it in front of a store."""

    puts = put_bytes = gets = get_bytes = 0

    async def put(self, key: str, data: Sequence[Buffer]) -> str:
        """As the port says."""
        self._count_put(data)
        return await super().put(key, data)  # type: ignore[safe-super]

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        """As the port says."""
        self._count_put(data)
        return await super().put_if(key, data, match=match)  # type: ignore[safe-super]

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        """As the port says."""
        found = await super().get(key, start=start, length=length)  # type: ignore[safe-super]
        self.gets += 1
        self.get_bytes += len(found.data) if found is not None else 0
        return found

    def _count_put(self, data: Sequence[Buffer]) -> None:
        self.puts += 1
        self.put_bytes += sum(len(memoryview(part).cast("B")) for part in data)


Opener = Callable[[Path], Counting]
"""Makes a store for one measurement, whose scratch directory is given."""


class CountingFileStore(Counting, FileStore):
    """A directory, with its fsyncs."""


class CountingS3Store(Counting, S3Store):
    """A bucket."""


class _Dictionary(ObjectStore):
    """The least that a store can do: joins what it is given and keeps it. With ``latency_s`` every call takes that."""

    url = "plain:"

    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._writes = 0

    async def put(self, key: str, data: Sequence[Buffer]) -> str:
        await asyncio.sleep(self.latency_s)
        return self._write(key, data)

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        await asyncio.sleep(self.latency_s)
        found = self._objects.get(key)
        return self._write(key, data) if (found[1] if found else None) == match else None

    def _write(self, key: str, data: Sequence[Buffer]) -> str:
        self._writes += 1
        self._objects[key] = b"".join(data), f"{self._writes}"
        return self._objects[key][1]

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        await asyncio.sleep(self.latency_s)
        if key not in self._objects:
            return None
        data, etag = self._objects[key]
        if start and start >= len(data):
            raise InvalidRequestError(f"{key} has {len(data)} bytes")
        stop = len(data) if length is None else start + length
        return StoredObject(memoryview(data)[start:stop], etag, len(data))

    async def head(self, key: str) -> ObjectInfo | None:
        found = self._objects.get(key)
        return ObjectInfo(key, len(found[0]), found[1], 0.0) if found else None

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._objects.pop(key, None)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        for key in sorted(key for key in self._objects if key.startswith(prefix)):
            yield ObjectInfo(key, len(self._objects[key][0]), self._objects[key][1], 0.0)

    async def aclose(self) -> None:
        """Nothing to close."""


class PlainStore(Counting, _Dictionary):
    """Objects in a dictionary: no hashing, no files, no network. For counting bytes and our own CPU time."""


class ForgetfulStore(PlainStore):
    """As `PlainStore`, but segments are not kept: no real store joins megabytes on our event loop."""

    def _write(self, key: str, data: Sequence[Buffer]) -> str:
        return super()._write(key, () if "/segments/" in key else data)


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="silo-bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def open_directory(place: Path) -> Counting:
    """A store in a directory below ``place``."""
    return CountingFileStore(place / "store", SystemClock())


@contextmanager
def s3_server() -> Iterator[Opener]:
    """moto in a process of its own, which checks signatures; yields what opens a store there, empty for each place."""
    from tests.support.s3 import moto_server  # a second of importing, for those alone who measure S3

    with moto_server() as running:
        bucket = running.make_bucket("benchmark")
        credentials = S3Credentials(running.access_key_id, running.secret_access_key)

        def open_bucket(place: Path) -> Counting:
            return CountingS3Store(parse_s3_url(running.url(bucket, place.name)), credentials=credentials)

        yield open_bucket


async def empty(store: ObjectStore) -> None:
    """Delete everything: a server that keeps objects in memory must not grow from round to round."""
    await store.delete([found.key async for found in store.list("")])
