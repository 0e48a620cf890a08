"""A device in anonymous memory: the fastest one, and gone with the process.

The memory is one private mapping without reservation, so a device of 1 TiB costs address space and one byte
per 2 MiB until somebody writes. Pages appear when they are first written; reading an untouched page maps the
kernel's shared page of zeros. Zeroing gives whole pages back.

``read_nowait`` returns a view of the live memory, without a copy. Which regions were ever written is kept in
one byte per region, because asking the kernel (``mincore``, ``pagemap``) costs the size of the device.
"""

from __future__ import annotations

import asyncio
import mmap
import platform
from collections.abc import Sequence

import numpy as np

from silo.abc import BlockDevice, Buffer
from silo.errors import ClosedError, InvalidRequestError
from silo.files import os_error

__all__ = ["MemoryDevice"]

_REGION_SHIFT = 21
_REGION = 1 << _REGION_SHIFT
_ZERO_STEP = 64 << 20
"""How much is given back between two turns of the event loop: a few milliseconds when all of it was written."""
_UNLOCKED_COPY_MIN = 128 << 10
"""From here on numpy copies: it lets other threads run meanwhile, which a slice does not."""
_ADVISE_MIN = 32 << 10
"""Below this, overwriting is cheaper than a system call plus the page faults of the next write."""


def _map_noreserve() -> int:
    """The flag's number, which Python names only from 3.14 on; 0 on machines where we do not know it."""
    known = 0x4000 if platform.machine() in {"x86_64", "aarch64", "riscv64", "s390x"} else 0
    return int(getattr(mmap, "MAP_NORESERVE", known))


class MemoryDevice(BlockDevice):
    """``size`` bytes of memory, all zeros at first.

    Everything but a large `zero` is done without awaiting, so concurrent calls are trivially allowed.
    `CapacityError` or `UnavailableError` when the system refuses so much address space.
    """

    def __init__(self, size: int) -> None:
        if size <= 0:
            raise InvalidRequestError(f"a device of {size} bytes makes no sense")
        self.size = size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _map_noreserve()
        try:
            self._map = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            raise os_error(error, f"map {size} bytes of memory") from error
        self._view = memoryview(self._map)
        self._written = bytearray((size + _REGION - 1) >> _REGION_SHIFT)
        self._closed = False

    def __repr__(self) -> str:
        return f"MemoryDevice({self.size})"

    def read_nowait(self, offset: int, length: int) -> memoryview:
        try:
            return self._view[offset : offset + length]
        except ValueError:
            self._check_open()
            raise

    def copy_nowait(self, offset: int, into: memoryview) -> bool:
        if len(into) < _UNLOCKED_COPY_MIN:
            into[:] = self.read_nowait(offset, len(into))
        else:
            source = np.frombuffer(self.read_nowait(offset, len(into)), dtype=np.uint8)
            np.copyto(np.frombuffer(into, dtype=np.uint8), source)
        return True

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        end = offset + len(data)
        try:
            self._view[offset:end] = data
        except ValueError:
            self._check_open()
            raise
        first, last = offset >> _REGION_SHIFT, (end - 1) >> _REGION_SHIFT
        if first == last:
            self._written[first] = 1
        else:
            self._written[first : last + 1] = b"\1" * (last + 1 - first)
        return True

    def zero_nowait(self, offset: int, length: int) -> bool:
        self._check_open()
        if length > _ZERO_STEP:
            return False
        self._zero(offset, offset + length)
        return True

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.read_nowait(offset, length))

    async def write(self, offset: int, data: Buffer) -> None:
        self.write_nowait(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        end = offset + length
        self._check_open()
        for start in range(offset, end, _ZERO_STEP):
            if start != offset:
                await asyncio.sleep(0)
                self._check_open()
            self._zero(start, min(start + _ZERO_STEP, end))

    async def flush(self) -> None:
        """Nothing to do: memory is this device's medium."""
        self._check_open()

    def flush_nowait(self) -> bool:
        self._check_open()
        return True

    async def data_extents(self) -> Sequence[tuple[int, int]]:
        """The regions of 2 MiB that were ever written, joined where they are neighbours."""
        self._check_open()
        extents: list[tuple[int, int]] = []
        first = self._written.find(1)
        while first >= 0:
            limit = self._written.find(0, first)
            end = self.size if limit < 0 else limit << _REGION_SHIFT
            extents.append((first << _REGION_SHIFT, end - (first << _REGION_SHIFT)))
            first = -1 if limit < 0 else self._written.find(1, limit)
        return extents

    async def aclose(self) -> None:
        """Release the memory, as soon as the last view that `read_nowait` handed out is gone."""
        if not self._closed:
            self._closed = True
            self._view.release()
            del self._map

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the memory device was closed")

    def _zero(self, offset: int, end: int) -> None:
        for region in range(offset >> _REGION_SHIFT, (end + _REGION - 1) >> _REGION_SHIFT):
            if self._written[region]:
                start = region << _REGION_SHIFT
                limit = min(start + _REGION, self.size)
                self._zero_written(max(offset, start), min(end, limit))
                if offset <= start and limit <= end:
                    self._written[region] = 0

    def _zero_written(self, offset: int, end: int) -> None:
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        limit = end // mmap.PAGESIZE * mmap.PAGESIZE
        if limit - first < _ADVISE_MIN:
            first = limit = end
        else:
            self._map.madvise(mmap.MADV_DONTNEED, first, limit - first)
        self._view[offset:first] = bytes(first - offset)
        self._view[limit:end] = bytes(end - limit)
