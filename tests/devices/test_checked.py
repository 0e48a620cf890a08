"""The layer that watches both sides. Every misbehaving device here breaks one sentence of the contract."""

from __future__ import annotations

import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from silo.abc import BlockDevice, Buffer
from silo.devices.checked import CheckedDevice
from silo.devices.faulty import FaultyDevice
from silo.devices.memory import MemoryDevice
from silo.errors import ClosedError, InvariantError, UnavailableError
from silo.testing.check_device import check_device

SIZE = 1 << 20


class Odd(MemoryDevice):
    """A device whose answers can be replaced one by one."""

    def __init__(self, **answers: Any) -> None:
        super().__init__(SIZE)
        self.answers = answers

    def __repr__(self) -> str:
        return "Odd"

    def _answer(self, verb: str, real: Any) -> Any:
        answer = self.answers.get(verb, real)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def read_nowait(self, offset: int, length: int) -> Any:
        return self._answer("read_nowait", super().read_nowait(offset, length))

    def write_nowait(self, offset: int, data: Buffer) -> Any:
        return self._answer("write_nowait", super().write_nowait(offset, data))

    def zero_nowait(self, offset: int, length: int) -> Any:
        return self._answer("zero_nowait", super().zero_nowait(offset, length))

    async def read(self, offset: int, length: int) -> Any:
        return self._answer("read", b"x" * length)

    async def data_extents(self) -> Sequence[tuple[int, int]]:
        return self._answer("data_extents", [(0, SIZE)])

    async def flush(self) -> None:
        self._answer("flush", None)


async def test_contract() -> None:
    async def make() -> CheckedDevice:
        return CheckedDevice(MemoryDevice(SIZE))

    await check_device(make)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (SIZE, 1), (SIZE - 1, 2)])
async def test_extents_outside_are_caught_on_the_way_down(offset: int, length: int) -> None:
    device = CheckedDevice(MemoryDevice(SIZE))
    for call in (device.read_nowait, device.zero_nowait):
        with pytest.raises(InvariantError, match="was let through"):
            call(offset, length)
    for verb in (device.read, device.zero):
        with pytest.raises(InvariantError, match="was let through"):
            await verb(offset, length)
    if length > 0:
        with pytest.raises(InvariantError, match="was let through"):
            device.write_nowait(offset, bytes(length))
        with pytest.raises(InvariantError, match="was let through"):
            await device.write(offset, bytes(length))
    await device.aclose()


async def test_buffers_that_are_not_rows_of_bytes_are_caught() -> None:
    device = CheckedDevice(MemoryDevice(SIZE))
    for data in (memoryview(array.array("H", [1, 2])), memoryview(bytes(16))[::2]):
        with pytest.raises(InvariantError, match="row of bytes"):
            device.write_nowait(0, data)
    await device.aclose()


BREACHES: list[tuple[dict[str, Any], Callable[[BlockDevice], Any]]] = [
    ({"read_nowait": b"short"}, lambda d: d.read_nowait(0, 512)),
    ({"read_nowait": ValueError("not ours")}, lambda d: d.read_nowait(0, 512)),
    ({"read_nowait": ClosedError("not closed at all")}, lambda d: d.read_nowait(0, 512)),
    ({"write_nowait": None}, lambda d: d.write_nowait(0, bytes(512))),
    ({"zero_nowait": 1}, lambda d: d.zero_nowait(0, 512)),
    ({"read": b"too long"}, lambda d: d.read(0, 4)),
    ({"flush": OSError(5, "not translated")}, lambda d: d.flush()),
    ({"data_extents": [(4096, 4096), (0, 512)]}, lambda d: d.data_extents()),
    ({"data_extents": [(0, 4096), (4095, 512)]}, lambda d: d.data_extents()),
    ({"data_extents": [(0, 0)]}, lambda d: d.data_extents()),
    ({"data_extents": [(SIZE - 512, 513)]}, lambda d: d.data_extents()),
]


@pytest.mark.parametrize(("answers", "call"), BREACHES)
async def test_breaches_are_caught_on_the_way_up(
    answers: dict[str, Any], call: Callable[[BlockDevice], Any]
) -> None:
    device = CheckedDevice(Odd(**answers))
    with pytest.raises(InvariantError, match="Odd"):
        result = call(device)
        if hasattr(result, "__await__"):
            await result
    await device.aclose()


async def test_a_device_that_works_after_closing_is_caught() -> None:
    device = CheckedDevice(Odd())
    await device.aclose()
    with pytest.raises(InvariantError, match="went on working"):
        await device.read(0, 512)


async def test_a_device_that_changes_its_size_is_caught() -> None:
    inner = Odd()
    device = CheckedDevice(inner)
    inner.size = 2 * SIZE
    with pytest.raises(InvariantError, match="changed its size"):
        await device.flush()
    await device.aclose()


async def test_errors_of_our_tree_pass() -> None:
    faulty = FaultyDevice(MemoryDevice(SIZE))
    device = CheckedDevice(faulty)
    faulty.fail()
    with pytest.raises(UnavailableError, match="told to"):
        await device.flush()
    await device.aclose()
