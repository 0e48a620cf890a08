"""A layer that takes its time, so that things overlap which on a fast device never would.

Every call waits through ``asyncio.sleep``, which the simulated loop turns into virtual time. The ``_nowait`` calls
decline with a given probability: a device that always waits would leave the fast path untested.
"""

from __future__ import annotations

import asyncio

import attrs

from silo.abc import BlockDevice, Buffer
from silo.devices.layer import Chance, Layer

__all__ = ["DelayedDevice", "Delays"]


@attrs.frozen(kw_only=True)
class Delays:
    """How long each kind of call waits, in seconds, and how often the fast path is refused."""

    read_s: float = 0.0
    write_s: float = 0.0
    """For `zero` as well."""
    flush_s: float = 0.0
    jitter: float = 0.0
    """The share of each wait that is left to chance: 0.5 means from half of it to one and a half."""
    decline: float = 1.0
    """The probability that a ``_nowait`` call does nothing, from 0 to 1."""


class DelayedDevice(Layer):
    """``inner``, later. Mutations and flushes wait before they happen and after, so their effect comes in between.

    A call that is cancelled in the first wait has changed nothing, in the second everything.
    """

    def __init__(self, inner: BlockDevice, delays: Delays, chance: Chance) -> None:
        super().__init__(inner)
        self.delays = delays
        self._chance = chance
        self._closed = False

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return None if self._declines() else self.inner.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return not self._declines() and self.inner.write_nowait(offset, data)

    def zero_nowait(self, offset: int, length: int) -> bool:
        return not self._declines() and self.inner.zero_nowait(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        await self._wait(self.delays.read_s)
        return await self.inner.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._wait(self.delays.write_s / 2)
        await self.inner.write(offset, data)
        await self._wait(self.delays.write_s / 2)

    async def zero(self, offset: int, length: int) -> None:
        await self._wait(self.delays.write_s / 2)
        await self.inner.zero(offset, length)
        await self._wait(self.delays.write_s / 2)

    async def flush(self) -> None:
        await self._wait(self.delays.flush_s / 2)
        await self.inner.flush()
        await self._wait(self.delays.flush_s / 2)

    data_extents = Layer.data_extents

    async def aclose(self) -> None:
        self._closed = True
        await self.inner.aclose()

    def _declines(self) -> bool:
        """Whether to say no; a closed device has the last word, which is an error."""
        return not self._closed and self._chance() < self.delays.decline

    async def _wait(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s * (1 + self.delays.jitter * (2 * self._chance() - 1)))
