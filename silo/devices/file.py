"""A device in a regular file or on a block device of the host.

**Two speeds.** Page cache hits are served inline, on the event loop; what may wait for a disk goes to a thread.
The difference is told by ``preadv2`` with ``RWF_NOWAIT``, which is tried once at open:

* it works (ext4, xfs, btrfs, block devices): hits inline, misses in a thread;
* it is refused by tmpfs or ramfs: nothing there waits for a disk, so everything small is inline;
* it is refused elsewhere (NFS, FUSE): everything goes to threads.

Buffered writes refuse ``RWF_NOWAIT`` everywhere, but only copy into the page cache; up to 256 KiB they are
inline. An exception is a write that covers a page in part while that page is not cached: the kernel would
have to read it first, so such a write goes to a thread.

**Buffers.** ``os.pread`` returns fresh ``bytes`` but cannot be told not to wait; ``os.preadv`` can, and wants a
buffer. It gets a new one every time, because several replies of one batch are alive at once: a ``bytearray``
when small, memory from numpy when large, where clearing it first would cost a quarter of the read.

**Flush.** ``fdatasync`` on a thread of its own; callers that wait in its queue share the next one. The kernel
reports a failed write-back once and then forgets which pages it lost; so after a failed flush every later
flush fails too, until the device is reopened and somebody has decided what is on it.

**Threads.** A cancelled call still waits for its thread, and closing waits for all of them before the file
descriptor is given back: a thread can never touch a file that was opened later under the same number.

The file is locked against every other `FileDevice` (``flock``); a block device is also opened ``O_EXCL``, which
the kernel refuses while it is mounted. Never use the file by other means while it is served.
"""

from __future__ import annotations

import enum
import errno
import io
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import numpy as np

from silo.abc import BlockDevice, Buffer
from silo.errors import ClosedError, InvalidRequestError, SiloError, UnavailableError
from silo.files import lock_exclusive, os_error, pwrite_all, sync_directory
from silo.linux import EPHEMERAL_FILESYSTEMS, PUNCH_HOLE, ZERO_RANGE, fallocate, filesystem_magic
from silo.threads import run_to_completion
from silo.zeros import zeros

__all__ = ["FileDevice"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_INLINE_READ_MAX = 4 << 20
"""More would hold up the event loop for milliseconds of copying, which a thread does beside it."""
_INLINE_WRITE_MAX = 256 << 10
_INLINE_ZERO_MAX = 4 << 20
"""One chunk of the largest size."""
_CLEARED_READ_MAX = 32 << 10
"""Up to here a bytearray is cheaper than numpy's detour."""
_ZERO_STEP = 1 << 20
_PAGE_MASK = 4095
_THREADS = 8
"""Enough to keep a disk's queue busy; page cache hits do not come here."""


class _Inline(enum.Enum):
    """What may run on the event loop."""

    CACHED = enum.auto()
    """Whatever the page cache answers without waiting."""
    ALL = enum.auto()
    """Everything small: the file lives in memory."""
    NOTHING = enum.auto()
    """Nobody can tell what waits."""


class FileDevice(BlockDevice):
    """The bytes of a regular file or block device.

    Without ``size`` the path must exist and its size is taken. With ``size`` a missing file is created sparse
    (unless ``create`` is false), an empty one is grown, and one of another size is refused; a block device may
    be larger. Opening blocks shortly. `UnavailableError` when another process (or another device of this one)
    has it open, `InvalidRequestError` when path and size make no sense.

    Concurrent calls are allowed.
    """

    _access = os.O_RDWR
    _lock = staticmethod(lock_exclusive)

    def __init__(self, path: str | os.PathLike[str], size: int | None = None, *, create: bool = True) -> None:
        self.path = Path(path)
        self._file = _open(self.path, self._access, may_create=create and size is not None)
        try:
            self._fd = self._file.fileno()
            self._lock(self._fd, str(self.path))
            self.size = self._settle_size(size)
            inline = _probe(self._fd)
        except OSError as error:
            self._file.close()
            raise os_error(error, f"open {self.path}") from error
        except SiloError:
            self._file.close()
            raise
        self._nowait = os.RWF_NOWAIT if inline is _Inline.CACHED else 0
        limits = (_INLINE_READ_MAX, _INLINE_WRITE_MAX, _INLINE_ZERO_MAX)
        self._inline_read_max, self._inline_write_max, self._inline_zero_max = (
            limits if inline is not _Inline.NOTHING else (-1, -1, -1)
        )
        self._zero_modes = [PUNCH_HOLE, ZERO_RANGE]
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="silo-file")
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="silo-flush")
        self._flush_asked = 0
        self._flush_done = 0
        self._flush_error: OSError | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"FileDevice({str(self.path)!r}, {self.size})"

    # ------------------------------------------------------------------------------------- inline

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        if length > self._inline_read_max:
            self._check_open()
            return None
        buffer = bytearray(length) if length <= _CLEARED_READ_MAX else np.empty(length, np.uint8).data
        try:
            if os.preadv(self._fd, (buffer,), offset, self._nowait) == length:
                return buffer
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._error(error, "read") from error
        return None  # only the beginning is cached, or the file was cut short: read() tells which

    def copy_nowait(self, offset: int, into: memoryview) -> bool:
        if len(into) > self._inline_read_max:
            self._check_open()
            return False
        try:
            return os.preadv(self._fd, (into,), offset, self._nowait) == len(into)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._error(error, "read") from error

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        if length > self._inline_write_max:
            self._check_open()
            return False
        try:
            if (
                (offset | length) & _PAGE_MASK
                and self._nowait
                and not self._edges_cached(offset, offset + length)
            ):
                return False
            if os.pwrite(self._fd, data, offset) != length:
                pwrite_all(self._fd, data, offset)
        except OSError as error:
            raise self._error(error, "write") from error
        return True

    def zero_nowait(self, offset: int, length: int) -> bool:
        self._check_open()
        if length > (self._inline_zero_max if self._zero_modes else self._inline_write_max):
            return False
        try:
            self._zero_blocking(self._fd, offset, length)
        except OSError as error:
            raise self._error(error, "zero") from error
        return True

    def _edges_cached(self, offset: int, end: int) -> bool:
        """Whether the pages that a write covers only in part can be changed without reading them first."""
        probe = bytearray(1)
        try:
            if offset & _PAGE_MASK:
                os.preadv(self._fd, (probe,), offset, os.RWF_NOWAIT)
            if end & _PAGE_MASK:
                os.preadv(self._fd, (probe,), end - 1, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        return True

    # ---------------------------------------------------------------------------------- in threads

    async def read(self, offset: int, length: int) -> Buffer:
        return await self._run(self._threads, "read", self._read_blocking, self._fd, offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._run(self._threads, "write", pwrite_all, self._fd, data, offset)

    async def zero(self, offset: int, length: int) -> None:
        await self._run(self._threads, "zero", self._zero_blocking, self._fd, offset, length)

    async def flush(self) -> None:
        """As the port says. After one failure every later call fails, until the file is opened anew."""
        self._flush_asked += 1
        await self._run(self._flusher, "flush", self._flush_blocking, self._fd, self._flush_asked)

    async def data_extents(self) -> Sequence[tuple[int, int]]:
        """Where the file system keeps data; for a block device, all of it."""
        return await self._run(self._threads, "map", self._extents_blocking, self._fd)

    async def aclose(self) -> None:
        """Wait for every call in a thread, then close the file and give up its lock. Does not flush."""
        if not self._closed:
            self._closed = True
            self._fd = -1
            await run_to_completion(None, self._close_blocking)

    async def _run(self, pool: ThreadPoolExecutor, verb: str, call: Callable[[*Ts], T], *args: *Ts) -> T:
        self._check_open()
        try:
            return await run_to_completion(pool, call, *args)
        except OSError as error:
            raise self._error(error, verb) from error

    def _read_blocking(self, fd: int, offset: int, length: int) -> bytes:
        data = os.pread(fd, length, offset)
        while len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                raise UnavailableError(
                    f"{self.path} ends at byte {offset + len(data)} instead of {self.size}",
                    hint="something cut it short while it was served",
                )
            data += more
        return data

    def _zero_blocking(self, fd: int, offset: int, length: int) -> None:
        if length == 0:
            return
        for mode in tuple(self._zero_modes):
            try:
                return fallocate(fd, mode, offset, length)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    self._zero_modes = [other for other in self._zero_modes if other != mode]
                elif error.errno != errno.EINVAL:  # which is a block device's word for misaligned
                    raise
        for start in range(offset, offset + length, _ZERO_STEP):
            pwrite_all(fd, zeros(min(_ZERO_STEP, offset + length - start)), start)

    def _flush_blocking(self, fd: int, ticket: int) -> None:
        if self._flush_error is not None:
            raise UnavailableError(
                f"an earlier flush of {self.path} failed ({self._flush_error.strerror}); "
                "what was written before it may be lost",
                hint="check the disk, then reopen the device and compare its content",
            ) from self._flush_error
        if self._flush_done >= ticket:
            return
        covered = self._flush_asked  # all of these were asked before the call below starts
        try:
            os.fdatasync(fd)
        except OSError as error:
            self._flush_error = error  # kept here, because a cancelled caller never sees it
            raise
        self._flush_done = covered

    def _extents_blocking(self, fd: int) -> list[tuple[int, int]]:
        extents: list[tuple[int, int]] = []
        position = 0
        try:
            while position < self.size:
                start = os.lseek(fd, position, os.SEEK_DATA)
                position = min(os.lseek(fd, start, os.SEEK_HOLE), self.size)
                if start < position:
                    extents.append((start, position - start))
        except OSError as error:
            if error.errno == errno.EINVAL:  # not a file that knows about holes
                return [(0, self.size)]
            if error.errno != errno.ENXIO:  # which says that the rest is a hole
                raise
        return extents

    def _close_blocking(self) -> None:
        self._threads.shutdown()
        self._flusher.shutdown()
        try:
            self._file.close()
        except OSError as error:
            raise os_error(error, f"close {self.path}") from error

    # ------------------------------------------------------------------------------------- opening

    def _settle_size(self, wanted: int | None) -> int:
        status = os.fstat(self._fd)
        is_file = stat.S_ISREG(status.st_mode)
        found = os.lseek(self._fd, 0, os.SEEK_END)
        if is_file and found == 0 and wanted is not None and wanted > 0:
            os.ftruncate(self._fd, wanted)
            os.fsync(self._fd)
            sync_directory(self.path.parent)
            return wanted
        if found == 0:
            raise InvalidRequestError(f"{self.path} is empty", hint="give the size that it shall have")
        if wanted is None or wanted == found or (not is_file and 0 < wanted < found):
            return found if wanted is None else wanted
        raise InvalidRequestError(
            f"{self.path} has {found} bytes, not the {wanted} asked for",
            hint="leave the size out to take it as it is",
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the device on {self.path} was closed")

    def _error(self, error: OSError, verb: str) -> SiloError:
        if self._closed:
            return ClosedError(f"the device on {self.path} was closed")
        return os_error(error, f"{verb} {self.path}")


def _open(path: Path, access: int, *, may_create: bool) -> io.FileIO:
    flags = access | os.O_CLOEXEC
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if not may_create:
            raise InvalidRequestError(
                f"{path} does not exist", hint="give a size to have it created, or correct the path"
            ) from error
        mode = stat.S_IFREG
        flags |= os.O_CREAT
    except OSError as error:
        raise os_error(error, f"look at {path}") from error
    if stat.S_ISBLK(mode):
        flags |= os.O_EXCL if access == os.O_RDWR else 0
    elif not stat.S_ISREG(mode):
        raise InvalidRequestError(f"{path} is neither a regular file nor a block device")
    try:
        return io.FileIO(os.open(path, flags, 0o600), "r+b" if access == os.O_RDWR else "rb")
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UnavailableError(
                f"{path} is mounted or otherwise in use", hint="unmount it first"
            ) from error
        raise os_error(error, f"open {path}") from error


def _probe(fd: int) -> _Inline:
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return _Inline.CACHED
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
            raise
        return _Inline.ALL if filesystem_magic(fd) in EPHEMERAL_FILESYSTEMS else _Inline.NOTHING
    return _Inline.CACHED
