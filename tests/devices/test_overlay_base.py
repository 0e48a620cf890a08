"""How a base is recognised, and how that is remembered."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from pathlib import Path

import pytest
from blake3 import blake3

from silo.devices.memory import MemoryDevice
from silo.devices.overlay_base import PIECE, Base, cached_digest, content_digest
from silo.devices.readonly import ReadOnlyDevice, ReadOnlyFile
from silo.errors import UnavailableError
from silo.records import encode_record
from tests.support.overlays import make_overlay, memory_with

CONTENT = random.Random(1).randbytes(PIECE) + bytes(3 * PIECE) + b"end"


def description_of(content: bytes) -> str:
    """The digest, as the format's document says it."""
    pieces = [content[start : start + PIECE] for start in range(0, len(content), PIECE)]
    head = b"silo-base-1".ljust(16, b"\0") + struct.pack("<Q", len(content))
    return blake3(head + b"".join(blake3(piece).digest() for piece in pieces)).hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        CONTENT,
        CONTENT[:PIECE],
        CONTENT[: PIECE - 1],
        bytes(2 * PIECE),
        bytes(2 * PIECE + 1),
        b"x",
        bytes(512),
    ],
)
async def test_the_digest_is_that_of_the_description(content: bytes) -> None:
    assert await content_digest(memory_with(content)) == description_of(content)


async def test_the_digest_depends_on_the_bytes_alone(tmp_path: Path) -> None:
    """Not on holes, nor on layers."""
    expected = description_of(CONTENT)
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(CONTENT[:PIECE])
        file.seek(4 * PIECE)
        file.write(b"end")
    async with contextlib.aclosing(ReadOnlyFile(path)) as sparse:
        assert await content_digest(sparse) == expected
    path.write_bytes(CONTENT)
    async with contextlib.aclosing(ReadOnlyFile(path)) as dense:
        assert await content_digest(dense) == expected
    overlay = make_overlay(memory_with(b"x" * (4 * PIECE)), cell_size=65536)
    await overlay.write(0, CONTENT[: 2 * PIECE])
    await overlay.zero(2 * PIECE, 2 * PIECE)
    assert (await Base.of(overlay)).digest == description_of(CONTENT[: 4 * PIECE])


@pytest.mark.parametrize("other", [CONTENT + b"\0", CONTENT[:-1], b"X" + CONTENT[1:], CONTENT[:-1] + b"X"])
async def test_other_bytes_have_another_digest(other: bytes) -> None:
    assert await content_digest(memory_with(other)) != description_of(CONTENT)


async def test_holes_cost_nothing() -> None:
    """A tebibyte of which one byte was written."""

    class Counting(MemoryDevice):
        reads = 0

        async def read(self, offset: int, length: int) -> bytes:
            self.reads += 1
            return await super().read(offset, length)

    device = Counting(1 << 36)
    device.write_nowait(5 << 30, b"x")
    await content_digest(device)
    assert device.reads <= 3


# ---- the cache ------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "golden.img"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


class Reads(ReadOnlyFile):
    """Counts what is read of it."""

    reads = 0

    async def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        return bytes(await super().read(offset, length))


async def digest_of(image: Path, *caches: Path) -> tuple[str, bool]:
    """The digest, and whether the image had to be read for it."""
    async with contextlib.aclosing(Reads(image)) as device:
        return await cached_digest(device, caches), device.reads > 0


async def test_what_is_known_is_not_read_again(image: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert await digest_of(image, cache) == (description_of(CONTENT), True)
    assert await digest_of(image, cache) == (description_of(CONTENT), False)
    assert await digest_of(image, tmp_path / "other", cache) == (description_of(CONTENT), False)


async def test_a_file_that_changed_is_read_again(image: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    await digest_of(image, cache)
    changed = b"X" + CONTENT[1:]
    image.write_bytes(changed)
    os.utime(image, ns=(5, 5))  # whatever the clock of the file system says
    assert await digest_of(image, cache) == (description_of(changed), True)
    assert await digest_of(image, cache) == (description_of(changed), False)


async def test_a_cache_that_makes_no_sense_is_replaced(image: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    await digest_of(image, cache)
    whole = cache.read_bytes()
    for damage in (b"", whole[:-1], whole.replace(b"a", b"b"), encode_record("digest", b"{}"), b"\xff" * 300):
        cache.write_bytes(damage)
        assert await digest_of(image, cache) == (description_of(CONTENT), True)
        assert cache.read_bytes() == whole


async def test_where_one_cache_cannot_be_written_the_next_one_is(image: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "no such folder" / "cache"
    assert await digest_of(image, nowhere, tmp_path / "cache") == (description_of(CONTENT), True)
    assert await digest_of(image, nowhere, tmp_path / "cache") == (description_of(CONTENT), False)
    assert await digest_of(image, nowhere) == (description_of(CONTENT), True)


async def test_without_a_fingerprint_nothing_is_remembered(tmp_path: Path) -> None:
    device = ReadOnlyDevice(memory_with(CONTENT))
    assert await cached_digest(device, (tmp_path / "cache",)) == description_of(CONTENT)
    assert not (tmp_path / "cache").exists()


async def test_a_base_that_changes_while_it_is_read_is_refused(image: Path, tmp_path: Path) -> None:
    class Changing(ReadOnlyFile):
        async def read(self, offset: int, length: int) -> bytes:
            os.utime(image, ns=(offset, offset))
            return bytes(await super().read(offset, length))

    async with contextlib.aclosing(Changing(image)) as device:
        with pytest.raises(UnavailableError, match="changed while it was read"):
            await cached_digest(device, (tmp_path / "cache",))
    assert not (tmp_path / "cache").exists()
