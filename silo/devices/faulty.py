"""A layer that fails on command: the n-th read, write, zero or flush from now, whole or half done.

A test scripts it with `FaultyDevice.fail`, or sweeps: run again and again with ``fail(nth=1)``, ``fail(nth=2)``
and so on, until a run ends before its fault strikes (``pending`` still says so).

What survives a power loss is another question; see `silo.devices.volatile`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import attrs

from silo.abc import BlockDevice, Buffer
from silo.devices.layer import Layer
from silo.errors import InvalidRequestError, SiloError, UnavailableError

__all__ = ["FaultyDevice", "Verb"]


class Verb(enum.Enum):
    """What can fail. A ``_nowait`` call counts as its verb, unless it declines."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    FLUSH = "flush"


def _broken() -> SiloError:
    return UnavailableError("the device failed as it was told to")


@attrs.define(eq=False)
class _Fault:
    verb: Verb | None
    """``None`` means any."""
    spared: int
    """How many matching calls still succeed."""
    torn: int
    for_ever: bool
    error: Callable[[], SiloError]


class FaultyDevice(Layer):
    """``inner``, until a fault strikes. ``calls`` counts the calls that were tried, faults included."""

    def __init__(self, inner: BlockDevice) -> None:
        super().__init__(inner)
        self.calls = 0
        self._faults: list[_Fault] = []

    def fail(
        self,
        verb: Verb | None = None,
        *,
        nth: int = 1,
        torn: int = 0,
        for_ever: bool = False,
        error: Callable[[], SiloError] = _broken,
    ) -> None:
        """Let the ``nth`` call of ``verb`` from now on raise ``error()``; with ``for_ever`` all later ones too.

        ``torn`` applies to writes and zeroing: so many bytes of it are done before the error. A fault that is not
        ``for_ever`` strikes once. With several faults, each counts the calls that are spared on its own.
        """
        if nth < 1:
            raise InvalidRequestError(f"there is no call number {nth}; the next one is 1")
        self._faults.append(_Fault(verb, nth - 1, torn, for_ever, error))

    @property
    def pending(self) -> int:
        """How many faults have not struck yet, those that last for ever included."""
        return len(self._faults)

    def heal(self) -> None:
        """Forget every fault that has not struck."""
        self._faults.clear()

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        self._raise_due(Verb.READ)
        data = self.inner.read_nowait(offset, length)
        if data is not None:
            self._count(Verb.READ)
        return data

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if fault := self._due(Verb.WRITE):
            self.inner.write_nowait(offset, data[: fault.torn])
            raise self._struck(fault)
        done = self.inner.write_nowait(offset, data)
        if done:
            self._count(Verb.WRITE)
        return done

    def zero_nowait(self, offset: int, length: int) -> bool:
        if fault := self._due(Verb.ZERO):
            self.inner.zero_nowait(offset, min(fault.torn, length))
            raise self._struck(fault)
        done = self.inner.zero_nowait(offset, length)
        if done:
            self._count(Verb.ZERO)
        return done

    async def read(self, offset: int, length: int) -> Buffer:
        self._raise_due(Verb.READ)
        self._count(Verb.READ)
        return await self.inner.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        if fault := self._due(Verb.WRITE):
            error = self._struck(fault)
            await self.inner.write(offset, data[: fault.torn])
            raise error
        self._count(Verb.WRITE)
        await self.inner.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        if fault := self._due(Verb.ZERO):
            error = self._struck(fault)
            await self.inner.zero(offset, min(fault.torn, length))
            raise error
        self._count(Verb.ZERO)
        await self.inner.zero(offset, length)

    async def flush(self) -> None:
        self._raise_due(Verb.FLUSH)
        self._count(Verb.FLUSH)
        await self.inner.flush()

    data_extents = Layer.data_extents
    aclose = Layer.aclose

    def _due(self, verb: Verb) -> _Fault | None:
        """The fault that the next call of ``verb`` must suffer."""
        for fault in self._faults:
            if fault.verb in {None, verb} and fault.spared == 0:
                return fault
        return None

    def _raise_due(self, verb: Verb) -> None:
        if fault := self._due(verb):
            raise self._struck(fault)

    def _struck(self, fault: _Fault) -> SiloError:
        self.calls += 1
        if not fault.for_ever:
            self._faults.remove(fault)
        return fault.error()

    def _count(self, verb: Verb) -> None:
        self.calls += 1
        for fault in self._faults:
            if fault.verb in {None, verb}:
                fault.spared -= 1
