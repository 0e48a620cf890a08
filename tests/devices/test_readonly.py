"""Devices that refuse to be changed, and files that many may read."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from silo.abc import BlockDevice
from silo.devices.file import FileDevice
from silo.devices.memory import MemoryDevice
from silo.devices.readonly import ReadOnlyDevice, ReadOnlyFile
from silo.errors import ClosedError, InvalidRequestError, UnavailableError

CONTENT = random.Random(1).randbytes(100_000) + bytes(1 << 20) + b"end"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file with a hole."""
    path = tmp_path / "golden.img"
    with path.open("wb") as file:
        file.write(CONTENT[:100_000])
        file.seek(len(CONTENT) - 3)
        file.write(b"end")
    return path


@contextlib.asynccontextmanager
async def both(image: Path) -> AsyncIterator[list[BlockDevice]]:
    memory = MemoryDevice(len(CONTENT))
    memory.write_nowait(0, CONTENT)
    async with (
        contextlib.aclosing(ReadOnlyDevice(memory)) as device,
        contextlib.aclosing(ReadOnlyFile(image)) as file,
    ):
        yield [device, file]


async def test_reading_at_both_speeds(image: Path) -> None:
    async with both(image) as devices:
        for device in devices:
            assert device.size == len(CONTENT)
            for offset, length in ((0, 100), (99_990, 20), (device.size - 1, 1), (0, device.size)):
                assert bytes(await device.read(offset, length)) == CONTENT[offset : offset + length]
                found = device.read_nowait(offset, length)
                assert found is None or bytes(found) == CONTENT[offset : offset + length]
            extents = await device.data_extents()
            assert any(offset + length == device.size for offset, length in extents)


async def test_changes_are_refused(image: Path) -> None:
    async with both(image) as devices:
        for device in devices:
            for at_once in (lambda: device.write_nowait(0, b"x"), lambda: device.zero_nowait(0, 1)):  # noqa: B023
                with pytest.raises(InvalidRequestError, match="can only be read"):
                    at_once()
            for change in (device.write(0, b"x"), device.zero(0, 1)):
                with pytest.raises(InvalidRequestError, match="can only be read"):
                    await change
            await device.flush()
            assert bytes(await device.read(0, 10)) == CONTENT[:10]


async def test_after_closing_everything_says_so(image: Path) -> None:
    async with both(image) as devices:
        for device in devices:
            await device.aclose()
            await device.aclose()
            for call in (
                device.read(0, 1),
                device.write(0, b"x"),
                device.zero(0, 1),
                device.flush(),
                device.data_extents(),
            ):
                with pytest.raises(ClosedError):
                    await call
            with pytest.raises(ClosedError):
                device.read_nowait(0, 1)
            with pytest.raises(ClosedError):
                device.write_nowait(0, b"x")
            with pytest.raises(ClosedError):
                device.zero_nowait(0, 1)


async def test_many_may_read_while_nobody_may_write(image: Path) -> None:
    first, second = ReadOnlyFile(image), ReadOnlyFile(image)
    with pytest.raises(UnavailableError, match="in use by this very process"):
        FileDevice(image)
    await first.aclose()
    with pytest.raises(UnavailableError, match="in use"):
        FileDevice(image)
    await second.aclose()
    writer = FileDevice(image)
    with pytest.raises(UnavailableError, match="in use"):
        ReadOnlyFile(image)
    await writer.aclose()


async def test_the_file_needs_no_right_to_write(image: Path) -> None:
    image.chmod(0o444)
    async with contextlib.aclosing(ReadOnlyFile(image)) as device:
        flags = Path(f"/proc/self/fdinfo/{device.inner._fd}").read_text()
        assert int(flags.split("flags:")[1].split()[0], 8) & os.O_ACCMODE == os.O_RDONLY


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"missing does not exist \(correct the path\)"):
        ReadOnlyFile(tmp_path / "missing")
    with pytest.raises(InvalidRequestError, match="neither a regular file nor a block device"):
        ReadOnlyFile(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidRequestError, match="is empty"):
        ReadOnlyFile(tmp_path / "empty")


async def test_the_fingerprint_changes_with_the_file(image: Path) -> None:
    copy = image.with_name("copy")
    copy.write_bytes(CONTENT)
    prints = set()
    for change in (
        lambda: None,
        lambda: os.utime(image, ns=(1, 1)),
        lambda: os.utime(image, ns=(1, 2)),
        lambda: os.truncate(image, 100_000),
        lambda: copy.rename(image),
    ):
        change()
        async with contextlib.aclosing(ReadOnlyFile(image)) as device:
            found = await device.fingerprint()
            assert await device.fingerprint() == found
            prints.add(found)
    assert len(prints) == 5
    assert "" not in prints


async def test_of_any_other_device_nothing_is_known() -> None:
    assert await ReadOnlyDevice(MemoryDevice(512)).fingerprint() == ""
