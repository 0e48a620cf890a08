"""A layer that holds both of its neighbours to the contract of the port.

Above: extents inside the device, buffers of plain bytes. Below: as many bytes as were asked for, real answers
from the ``_nowait`` calls, extents in order, only `silo.SiloError`, `ClosedError` after closing and never before. Every
breach is an `InvariantError`: the bug is in Silo or in somebody's device, not in the request.

It checks what one call can show. What only several calls can show (that a write is read back) is the business
of ``silo.testing.check_device``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from silo.abc import BlockDevice, Buffer
from silo.devices.layer import Layer
from silo.errors import ClosedError, InvariantError, SiloError

__all__ = ["CheckedDevice"]


class CheckedDevice(Layer):
    """``inner``, watched. Raises `InvariantError` as soon as either side breaks the contract."""

    def __init__(self, inner: BlockDevice) -> None:
        super().__init__(inner)
        self._closed = False
        if not isinstance(inner.size, int) or inner.size <= 0:
            raise InvariantError(f"{inner!r} has a size of {inner.size!r}")

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        self._check_extent(offset, length)
        with self._watch("read_nowait"):
            data = self.inner.read_nowait(offset, length)
        if data is not None:
            self._check_data("read_nowait", data, length)
        return data

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self._check_extent(offset, self._length_of(data))
        with self._watch("write_nowait"):
            done = self.inner.write_nowait(offset, data)
        return self._check_flag("write_nowait", done)

    def zero_nowait(self, offset: int, length: int) -> bool:
        self._check_extent(offset, length)
        with self._watch("zero_nowait"):
            done = self.inner.zero_nowait(offset, length)
        return self._check_flag("zero_nowait", done)

    async def read(self, offset: int, length: int) -> Buffer:
        self._check_extent(offset, length)
        with self._watch("read"):
            data = await self.inner.read(offset, length)
        self._check_data("read", data, length)
        return data

    async def write(self, offset: int, data: Buffer) -> None:
        self._check_extent(offset, self._length_of(data))
        with self._watch("write"):
            await self.inner.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        self._check_extent(offset, length)
        with self._watch("zero"):
            await self.inner.zero(offset, length)

    async def flush(self) -> None:
        with self._watch("flush"):
            await self.inner.flush()

    async def data_extents(self) -> Sequence[tuple[int, int]]:
        with self._watch("data_extents"):
            extents = await self.inner.data_extents()
        end = 0
        for offset, length in extents:
            if offset < end or length <= 0 or offset + length > self.size:
                raise self._breach(
                    "data_extents", f"answered {offset}+{length} after an extent that ends at {end}"
                )
            end = offset + length
        return extents

    async def aclose(self) -> None:
        self._closed = True
        with self._only_silo_errors("aclose"):
            await self.inner.aclose()

    # ------------------------------------------------------------------------------ from above

    def _check_extent(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InvariantError(f"extent {offset}+{length} was let through to a device of {self.size} bytes")

    def _length_of(self, data: Buffer) -> int:
        view = memoryview(data)
        if view.itemsize != 1 or view.ndim != 1 or not view.c_contiguous:
            raise InvariantError("a write came with something that is not a row of bytes")
        return view.nbytes

    # ------------------------------------------------------------------------------ from below

    @contextlib.contextmanager
    def _watch(self, verb: str) -> Iterator[None]:
        """The call inside must fail with `ClosedError` if the device was closed before, and else must not."""
        closed_before = self._closed
        with self._only_silo_errors(verb):
            try:
                yield
            except ClosedError as error:
                if not self._closed:
                    raise self._breach(verb, "says that it is closed, and is not") from error
                raise
        if closed_before:
            raise self._breach(verb, "went on working after it was closed")
        if self.inner.size != self.size:
            raise self._breach(verb, f"changed its size from {self.size} to {self.inner.size}")

    @contextlib.contextmanager
    def _only_silo_errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except SiloError:
            raise
        except Exception as error:
            raise self._breach(verb, f"raised {error!r}, which is not in the tree of errors") from error

    def _check_data(self, verb: str, data: Buffer, length: int) -> None:
        if len(data) != length:
            raise self._breach(verb, f"answered {len(data)} bytes instead of {length}")

    def _check_flag(self, verb: str, done: bool) -> bool:
        if not isinstance(done, bool):
            raise self._breach(verb, f"answered {done!r} instead of True or False")
        return done

    def _breach(self, verb: str, what: str) -> InvariantError:
        return InvariantError(f"{self.inner!r}: {verb} {what}")
