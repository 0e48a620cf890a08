"""What a layer around a device is: something that says, verb by verb, what it does.

A layer that inherited a pass-through for every verb would let a verb slip past that it does not know: the day
the port grows one, a checking layer stops checking and a delaying one stops delaying, silently. So `Layer` passes
nothing through by inheritance. A subclass must name every verb of the port, or it cannot even be defined; where
it has nothing to add it says so: ``data_extents = Layer.data_extents``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from silo.abc import BlockDevice, Buffer

__all__ = ["Chance", "Layer"]

Chance = Callable[[], float]
"""Numbers from 0 up to but not including 1, such as ``random.Random(seed).random``. The caller keeps the seed."""


class Layer(BlockDevice):
    """A device in front of ``inner``, which it owns: closing the layer closes what is below it.

    Defining a subclass that leaves out a verb raises `TypeError`.
    """

    def __init__(self, inner: BlockDevice) -> None:
        self.inner = inner
        self.size = inner.size

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        above = cls.__mro__[: cls.__mro__.index(Layer)]
        named = {name for base in above for name in vars(base)}
        missing = sorted(BlockDevice.__abstractmethods__ - named)
        if missing:
            raise TypeError(f"{cls.__name__} does not say what it does on {', '.join(missing)}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return self.inner.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return self.inner.write_nowait(offset, data)

    def zero_nowait(self, offset: int, length: int) -> bool:
        return self.inner.zero_nowait(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        return await self.inner.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        await self.inner.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        await self.inner.zero(offset, length)

    async def flush(self) -> None:
        await self.inner.flush()

    async def data_extents(self) -> Sequence[tuple[int, int]]:
        return await self.inner.data_extents()

    async def aclose(self) -> None:
        await self.inner.aclose()
