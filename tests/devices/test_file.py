"""The device in a regular file: contract, opening, the two speeds, errors of the disk."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from silo.devices.file import FileDevice
from silo.errors import CapacityError, ClosedError, InvalidRequestError, UnavailableError
from silo.linux import EPHEMERAL_FILESYSTEMS, filesystem_magic
from silo.testing.check_device import check_device
from tests.support.tools import require_tool

MIB = 1 << 20


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A directory on a file system in memory."""
    try:
        directory = tempfile.TemporaryDirectory(dir="/dev/shm")
    except OSError as error:
        pytest.skip(f"no file system in memory: {error}")
    with directory as name:
        yield Path(name)


class Maker:
    """Makes devices in one directory, each in a file of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made = 0

    async def make(self) -> FileDevice:
        self.made += 1
        return FileDevice(self.directory / str(self.made), 3 * MIB + 512)

    async def reopen(self, device: FileDevice) -> FileDevice:
        return FileDevice(device.path)


# ------------------------------------------------------------------------------------------------ contract


async def test_contract_on_disk(tmp_path: Path) -> None:
    maker = Maker(tmp_path)
    await check_device(maker.make, reopen=maker.reopen)


async def test_contract_in_memory(memory_path: Path) -> None:
    maker = Maker(memory_path)
    await check_device(maker.make, reopen=maker.reopen)


async def test_contract_where_nothing_runs_inline(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses RWF_NOWAIT and is not in memory."""
    monkeypatch.setattr("silo.devices.file.filesystem_magic", lambda fd: 0x6969)
    maker = Maker(memory_path)
    device = await maker.make()
    assert device.read_nowait(0, 512) is None
    assert not device.write_nowait(0, bytes(512))
    assert not device.zero_nowait(0, 512)
    await device.aclose()
    await check_device(maker.make, reopen=maker.reopen)


@pytest.mark.parametrize("refused", [{2 | 1}, {2 | 1, 16 | 1}], ids=["no punching", "no fallocate"])
async def test_contract_without_fallocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: set[int]
) -> None:
    """A file system that cannot punch holes, or cannot even zero a range, is written with zeros."""
    from silo import linux

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        if mode in refused:
            raise OSError(errno.EOPNOTSUPP, "refused")
        linux.fallocate(fd, mode, offset, length)

    monkeypatch.setattr("silo.devices.file.fallocate", fallocate)
    maker = Maker(tmp_path)
    await check_device(maker.make, reopen=maker.reopen)


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[Path]:
    """A loop device of 3 MiB and one block; skips the test where we may not make one."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 3 * MIB + 512)
    command = [require_tool("losetup"), "--find", "--show", str(image)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    path = Path(made.stdout.strip())
    yield path
    subprocess.run([require_tool("losetup"), "--detach", str(path)], check=True, timeout=30)


async def test_contract_on_a_block_device(block_device: Path) -> None:
    async def make() -> FileDevice:
        with block_device.open("r+b") as file:
            file.write(bytes(3 * MIB + 512))
        return FileDevice(block_device)

    async def reopen(device: FileDevice) -> FileDevice:
        return FileDevice(device.path)

    await check_device(make, reopen=reopen)


async def test_a_volume_may_be_smaller_than_its_block_device(block_device: Path) -> None:
    device = FileDevice(block_device, MIB)
    assert device.size == MIB
    assert await device.data_extents() == [(0, MIB)]
    await device.aclose()
    with pytest.raises(InvalidRequestError, match="has 3146240 bytes, not the 4194304"):
        FileDevice(block_device, 4 * MIB)


async def test_a_block_device_in_use_is_refused(block_device: Path) -> None:
    """By a mount or anything else that opens it exclusively."""
    fd = os.open(block_device, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(UnavailableError, match="is mounted or otherwise in use"):
            FileDevice(block_device)
    finally:
        os.close(fd)
    device = FileDevice(block_device)
    await device.aclose()


# ------------------------------------------------------------------------------------------------- opening


async def test_a_missing_file_is_created_sparse(tmp_path: Path) -> None:
    device = FileDevice(tmp_path / "disk", 1 << 40)
    assert device.size == 1 << 40
    assert await device.data_extents() == []
    assert os.stat(device.path).st_blocks == 0
    await device.aclose()
    again = FileDevice(tmp_path / "disk")
    assert again.size == 1 << 40
    await again.aclose()


async def test_an_empty_file_is_grown(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    device = FileDevice(tmp_path / "disk", MIB, create=False)
    assert (tmp_path / "disk").stat().st_size == MIB
    await device.aclose()


def test_what_cannot_be_opened_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    (tmp_path / "empty").touch()
    for path, size, message in (
        ("missing", None, "does not exist"),
        ("empty", None, "is empty"),
        ("disk", 8192, "has 4096 bytes, not the 8192"),
        ("disk", 512, "has 4096 bytes, not the 512"),
        ("disk", -1, "has 4096 bytes"),
        (".", None, "neither a regular file"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            FileDevice(tmp_path / path, size)
    with pytest.raises(InvalidRequestError, match="does not exist"):
        FileDevice(tmp_path / "missing", MIB, create=False)
    with pytest.raises(UnavailableError, match="could not open"):
        FileDevice(tmp_path / "no" / "such" / "directory", MIB)
    assert not (tmp_path / "missing").exists()


async def test_a_second_open_is_refused_and_names_the_holder(tmp_path: Path) -> None:
    """The lock holds between processes and inside one, and ends with the device."""
    path = tmp_path / "disk"
    device = FileDevice(path, MIB)
    with pytest.raises(UnavailableError, match="in use by this very process"):
        FileDevice(path)
    code = f"from silo.devices.file import FileDevice; FileDevice({str(path)!r})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert child.returncode != 0
    assert f"in use by process {os.getpid()}" in child.stderr
    await device.aclose()
    again = FileDevice(path)
    await again.aclose()


# ---------------------------------------------------------------------------------------------- two speeds


FAST_DISK = (
    "this disk answers before the kernel has refused (a non-blocking read starts the read-ahead, then looks)"
)


def evict(device: FileDevice) -> None:
    """Push a file out of the page cache; skip the test where that cannot be done."""
    if not device._nowait:
        pytest.skip("this file system refuses RWF_NOWAIT")
    libc = ctypes.CDLL(None)
    fd = os.open(device.path, os.O_RDWR)
    try:
        with mmap.mmap(fd, device.size) as pages:
            address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)))
            cached = ctypes.create_string_buffer(device.size // mmap.PAGESIZE)
            for _ in range(100):
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                libc.mincore(address, ctypes.c_size_t(device.size), cached)
                if not any(byte & 1 for byte in cached.raw):
                    return
    finally:
        os.close(fd)
    pytest.skip("this file system keeps its pages")


async def test_cached_reads_are_inline_and_cold_ones_are_not(tmp_path: Path) -> None:
    async with contextlib.aclosing(FileDevice(tmp_path / "disk", MIB)) as device:
        data = os.urandom(MIB)
        await device.write(0, data)
        for offset, length in ((0, 4096), (4096, 65536), (0, MIB)):
            assert bytes(device.read_nowait(offset, length) or b"") == data[offset : offset + length]
        refused = 0
        for page in range(0, MIB, 16384):
            evict(device)  # every time, because even a refusal makes the kernel read ahead
            answer = device.read_nowait(page, 4096)
            refused += answer is None
            assert answer is None or answer == data[page : page + 4096]
        if not refused:
            pytest.skip(FAST_DISK)
        assert await device.read(0, 4096) == data[:4096]
        assert bytes(device.read_nowait(0, 4096) or b"") == data[:4096]


async def test_a_write_into_part_of_a_cold_page_is_not_inline(tmp_path: Path) -> None:
    """The kernel would read the page first; whole pages and cached ones are written at once."""
    async with contextlib.aclosing(FileDevice(tmp_path / "disk", MIB)) as device:
        expected = bytearray(os.urandom(MIB))
        await device.write(0, bytes(expected))
        refused = 0
        for turn in range(16):
            for offset, length in ((512, 512), (8192, 4608), (MIB - 512, 512), (MIB // 2 + 512, 3584)):
                evict(device)
                if device.write_nowait(offset, bytes([turn]) * length):
                    expected[offset : offset + length] = bytes([turn]) * length
                else:
                    refused += 1
        if not refused:
            pytest.skip(FAST_DISK)
        assert device.write_nowait(65536, b"y" * 8192)
        assert device.write_nowait(65536 + 512, b"z" * 512)
        expected[65536 : 65536 + 8192] = b"y" * 512 + b"z" * 512 + b"y" * 7168
        assert await device.read(0, MIB) == bytes(expected)


async def test_large_requests_are_left_to_threads(tmp_path: Path) -> None:
    device = FileDevice(tmp_path / "disk", 16 * MIB)
    await device.write(0, bytes(16 * MIB))
    assert device.read_nowait(0, 8 * MIB) is None
    assert not device.write_nowait(0, bytes(MIB))
    assert not device.zero_nowait(0, 8 * MIB)
    assert device.zero_nowait(0, 4 * MIB)
    await device.aclose()


async def test_zero_gives_space_back(tmp_path: Path) -> None:
    device = FileDevice(tmp_path / "disk", 8 * MIB)
    await device.write(0, b"x" * (8 * MIB))
    await device.flush()
    before = os.stat(device.path).st_blocks
    assert device.zero_nowait(0, 2 * MIB)
    await device.zero(4 * MIB, 4 * MIB)
    await device.flush()
    assert os.stat(device.path).st_blocks <= before // 2
    assert await device.data_extents() == [(2 * MIB, 2 * MIB)]
    await device.aclose()


def test_the_probe_knows_memory_from_disk(memory_path: Path) -> None:
    fd = os.open(memory_path, os.O_RDONLY)
    try:
        assert filesystem_magic(fd) in EPHEMERAL_FILESYSTEMS
    finally:
        os.close(fd)


# -------------------------------------------------------------------------------------------------- errors


async def test_a_failed_flush_sticks_until_reopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports lost pages once; saying success later would be a lie about them."""
    device = FileDevice(tmp_path / "disk", MIB)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(UnavailableError, match="flush"):
            await device.flush()
    with pytest.raises(UnavailableError, match="earlier flush"):
        await device.flush()
    await device.aclose()
    again = FileDevice(tmp_path / "disk")
    await again.flush()
    await again.aclose()


async def test_a_failed_flush_sticks_although_its_caller_was_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FileDevice(tmp_path / "disk", MIB)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(device.flush())
            await asyncio.sleep(0)
            task.cancel()
    assert task.cancelled()
    with pytest.raises(UnavailableError, match="earlier flush"):
        await device.flush()
    await device.aclose()


async def test_flushes_that_wait_together_share_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty at once cost two calls at most: the one that runs and one for all the others."""
    device = FileDevice(tmp_path / "disk", MIB)
    calls = []
    fdatasync = os.fdatasync

    def count(fd: int) -> None:
        calls.append(fd)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", count)
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(device.flush())
    assert 1 <= len(calls) <= 2
    await device.flush()
    assert len(calls) <= 3
    await device.aclose()


async def test_a_full_disk_is_a_capacity_error(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a quota: the kernel refuses the write with EFBIG."""
    device = FileDevice(tmp_path / "disk", MIB)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(CapacityError, match="no room to write"):
            await device.write(128 << 10, b"x")
        with pytest.raises(CapacityError):
            device.write_nowait(128 << 10, b"x" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    await device.aclose()


async def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write fewer bytes than it was given; the rest follows."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data)[:1000], offset))
    device = FileDevice(tmp_path / "disk", MIB)
    data = os.urandom(10_000)
    assert device.write_nowait(0, data)
    await device.write(100_000, data)
    assert await device.read(0, 10_000) == data
    assert await device.read(100_000, 10_000) == data
    await device.aclose()


async def test_a_file_cut_short_from_outside_is_noticed(tmp_path: Path) -> None:
    device = FileDevice(tmp_path / "disk", MIB)
    await device.write(0, b"x" * MIB)
    os.truncate(device.path, 10_000)
    assert device.read_nowait(8192, 4096) is None
    with pytest.raises(UnavailableError, match="ends at byte 10000"):
        await device.read(8192, 4096)
    await device.aclose()


async def test_closing_waits_for_calls_in_threads(tmp_path: Path) -> None:
    """They finish on the file that they began on; a call that comes too late is refused."""
    device = FileDevice(tmp_path / "disk", 32 * MIB)
    async with asyncio.TaskGroup() as group:
        for part in range(4):
            group.create_task(device.write(part * 8 * MIB, bytes([65 + part]) * (8 * MIB)))
        await asyncio.sleep(0)  # all of them are in their threads
        await device.aclose()
        with pytest.raises(ClosedError):
            await device.read(0, 1)
    content = (tmp_path / "disk").read_bytes()
    assert content == b"".join(bytes([65 + part]) * (8 * MIB) for part in range(4))
