"""Devices that can only be read: what many overlays lie over at once.

Writing, zeroing and trimming are refused with `InvalidRequestError`, whatever is below. A flush has nothing to do.

A `ReadOnlyFile` is opened for reading and locked shared: any number of them may have one file open, in this process
and in others, while a `silo.devices.file.FileDevice` on it is refused, and refuses them. Programs other than Silo
are not kept from writing to the file; `ReadOnlyFile.fingerprint` tells afterwards that they did.
"""

from __future__ import annotations

import os
import stat

from silo.abc import BlockDevice, Buffer
from silo.devices.file import FileDevice
from silo.devices.layer import Layer
from silo.errors import ClosedError, InvalidRequestError, SiloError
from silo.files import lock_shared

__all__ = ["ReadOnlyDevice", "ReadOnlyFile"]


class ReadOnlyDevice(Layer):
    """``inner``, which nobody changes through this layer. Concurrent calls are allowed."""

    def __init__(self, inner: BlockDevice) -> None:
        super().__init__(inner)
        self._closed = False

    read_nowait = Layer.read_nowait
    read = Layer.read
    data_extents = Layer.data_extents

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        raise self._refusal()

    def zero_nowait(self, offset: int, length: int) -> bool:
        raise self._refusal()

    async def write(self, offset: int, data: Buffer) -> None:
        raise self._refusal()

    async def zero(self, offset: int, length: int) -> None:
        raise self._refusal()

    async def flush(self) -> None:
        """Nothing to do: nothing was written."""
        if self._closed:
            raise self._refusal()

    async def aclose(self) -> None:
        self._closed = True
        await self.inner.aclose()

    async def fingerprint(self) -> str:
        """Changes when the content may have changed; empty when nobody can tell, as here."""
        return ""

    def _refusal(self) -> SiloError:
        if self._closed:
            return ClosedError(f"{self.inner!r} was closed")
        return InvalidRequestError(f"{self.inner!r} can only be read")


class ReadOnlyFile(ReadOnlyDevice):
    """The bytes of an existing file or block device. Opening blocks shortly.

    `InvalidRequestError` when there is no such file, `UnavailableError` when somebody has it open for writing.
    """

    inner: _SharedFile

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.path.exists(path):
            raise InvalidRequestError(f"{os.fspath(path)} does not exist", hint="correct the path")
        super().__init__(_SharedFile(path))

    async def fingerprint(self) -> str:
        """Changes when the file was changed, as far as the file system tells: size, times, inode.

        Empty for a block device, of which nothing is known. What is there now is made durable first, so that a
        power loss cannot take back what the fingerprint stands for.
        """
        return await self.inner.fingerprint()


class _SharedFile(FileDevice):
    """A file device without the right to write."""

    _access = os.O_RDONLY
    _lock = staticmethod(lock_shared)

    async def fingerprint(self) -> str:
        """As `ReadOnlyFile.fingerprint`."""
        return await self._run(self._threads, "look at", _fingerprint_blocking, self._fd)


def _fingerprint_blocking(fd: int) -> str:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return ""
    if not os.fstatvfs(fd).f_flag & os.ST_RDONLY:
        os.fsync(fd)  # first, because it may be what gives the last stores through a mapping their time
    status = os.fstat(fd)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
