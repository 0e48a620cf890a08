"""A device whose calls stop where a test wants them, to pin one interleaving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import attrs

from silo.abc import BlockDevice, Buffer
from silo.devices.layer import Layer
from silo.devices.memory import MemoryDevice
from silo.testing.loop import explore
from tests.support.seeds import seeds


@attrs.define(eq=False)
class Held:
    """A call that has begun and will have its effect when `release` is called, or never when it is cancelled."""

    verb: str
    offset: int
    _go: asyncio.Event = attrs.field(factory=asyncio.Event)

    def release(self) -> None:
        """Let it have its effect and end."""
        self._go.set()


class HeldDevice(Layer):
    """A device that is slow on command: the verbs in ``slow`` decline their ``_nowait`` form, and those in ``hold``
    stop before their effect. In memory, unless ``inner`` is given.

    `next` waits for the next held call. ``log`` names every call that had an effect, in order.
    """

    def __init__(
        self, size: int, *, slow: str = "", hold: str = "", inner: BlockDevice | None = None
    ) -> None:
        super().__init__(inner or MemoryDevice(size))
        self.slow = set(slow.split())
        self.hold = set(hold.split())
        self.log: list[tuple[str, int]] = []
        self._held: asyncio.Queue[Held] = asyncio.Queue()

    async def next(self, verb: str) -> Held:
        """The next call that stopped; it must be a ``verb``."""
        held = await self._held.get()
        assert held.verb == verb, f"{held.verb} at {held.offset} came first"
        return held

    async def _begin(self, verb: str, offset: int) -> None:
        if verb in self.hold:
            held = Held(verb, offset)
            self._held.put_nowait(held)
            await held._go.wait()
        else:
            await asyncio.sleep(0)
        self.log.append((verb, offset))

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return None if "read" in self.slow else self.inner.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if "write" in self.slow:
            return False
        self.log.append(("write", offset))
        return self.inner.write_nowait(offset, data)

    def zero_nowait(self, offset: int, length: int) -> bool:
        if "zero" in self.slow:
            return False
        self.log.append(("zero", offset))
        return self.inner.zero_nowait(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        await self._begin("read", offset)
        return await self.inner.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._begin("write", offset)
        await self.inner.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        await self._begin("zero", offset)
        await self.inner.zero(offset, length)

    async def flush(self) -> None:
        await self._begin("flush", 0)
        await self.inner.flush()

    data_extents = Layer.data_extents
    aclose = Layer.aclose


async def everything_else() -> None:
    """Let all other tasks run until none of them can: a second of virtual time is for ever here."""
    await asyncio.sleep(1)


def interleaved(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async test on the deterministic loop, where `everything_else` works, in a few orders of its tasks."""

    def run() -> None:
        explore(lambda clock: test(), seeds=seeds(5))

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    run.__module__ = test.__module__
    return run
