"""The contract of `silo.abc.BlockDevice`, executable.

::

    async def make_device():
        return MyDevice(size=1 << 20)

    await check_device(make_device)

Every function below that is called ``_check_...`` holds a device to one sentence of the contract, which is its
docstring. It depends on no test framework: a breach raises ``AssertionError`` with what was seen.

What it cannot do is prove absence: a device that goes on writing after a cancellation is caught when that write
lands during the check. Errors of the medium are not provoked; `silo.devices.faulty` does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import blake3

from silo.abc import BlockDevice, Buffer
from silo.errors import ClosedError

__all__ = ["check_device"]

MakeDevice = Callable[[], Awaitable[BlockDevice]]
Reopen = Callable[[BlockDevice], Awaitable[BlockDevice]]

SIZE_MIN = 256 << 10
_AREA = 2 << 20
"""How much of the beginning of a large device is exercised."""
_MODEL_STEPS = 300
_CANCELLATIONS = 12
_TURNS = 50
"""Turns of the event loop in which something left behind would show."""


async def check_device(make_device: MakeDevice, *, reopen: Reopen | None = None, seed: int = 0) -> None:
    """Raise ``AssertionError`` when the devices that ``make_device`` makes break the contract.

    Every call of ``make_device`` must return a device of its own that reads as zeros, of at least 256 KiB.
    ``reopen`` takes a closed device and opens the same medium again; without it durability is not looked at.
    ``seed`` chooses the data and the order of calls; the message of a failed check names it.
    """
    checks = [
        _check_size,
        _check_pairs_do_the_same,
        _check_any_alignment,
        _check_views_live_side_by_side,
        _check_read_is_stable,
        _check_write_keeps_no_buffer,
        _check_zero,
        _check_neighbours_are_left_alone,
        _check_overlapping_writes_mix_only_what_was_written,
        _check_cancelled_mutation_has_ended,
        _check_cancelled_read_leaves_nothing,
        _check_data_extents,
        _check_against_model,
        _check_flush,
        _check_closed,
    ]
    for check in checks:
        numbers = _Numbers(f"{check.__name__} {seed}")
        with _noted(f"{check.__name__}, seed {seed}: {check.__doc__}"):
            async with _closing(await make_device()) as device:
                await check(device, numbers)
    if reopen is not None:
        numbers = _Numbers(f"durable {seed}")
        with _noted(f"_check_durable, seed {seed}: {_check_durable.__doc__}"):
            await _check_durable(make_device, reopen, numbers)


# ------------------------------------------------------------------------------------------------- the checks


async def _check_size(device: BlockDevice, numbers: _Numbers) -> None:
    """``size`` is a positive number of bytes, all of which can be read, and new devices read as zeros."""
    _expect(isinstance(device.size, int) and device.size >= SIZE_MIN, f"size is {device.size!r}")
    for offset in (0, device.size // 2, device.size - 4096):
        _expect_bytes(await device.read(offset, 4096), bytes(4096), f"a new device at {offset}")


async def _check_pairs_do_the_same(device: BlockDevice, numbers: _Numbers) -> None:
    """``X_nowait`` does what ``X`` does, or does nothing and says so."""
    for offset in (0, 4096, 65536 - 512, device.size - 8192):
        old, new = numbers.data(8192), numbers.data(8192)
        await device.write(offset, old)
        seen = device.read_nowait(offset, 8192)
        _expect(seen is None or bytes(seen) == old, f"read_nowait at {offset} differs from what was written")
        done = device.write_nowait(offset, new)
        _expect(isinstance(done, bool), f"write_nowait answered {done!r}")
        _expect_bytes(
            await device.read(offset, 8192), new if done else old, f"after write_nowait said {done}"
        )
        left = new if done else old
        done = device.zero_nowait(offset + 512, 1024)
        _expect(isinstance(done, bool), f"zero_nowait answered {done!r}")
        left = left[:512] + bytes(1024) + left[1536:] if done else left
        _expect_bytes(await device.read(offset, 8192), left, f"after zero_nowait said {done}")


async def _check_any_alignment(device: BlockDevice, numbers: _Numbers) -> None:
    """Bytes can be read and written at any offset, in any number, up to the last one."""
    for offset, length in ((1, 1), (511, 2), (4095, 4098), (65535, 3), (70001, 65537), (device.size - 1, 1)):
        data = numbers.data(length)
        await _write(device, offset, data, numbers)
        _expect_bytes(await device.read(offset, length), data, f"{offset}+{length}")
        room = bytearray(length)
        if device.copy_nowait(offset, memoryview(room)):
            _expect_bytes(room, data, f"{offset}+{length} copied without waiting")
        if (seen := device.read_nowait(offset, length)) is not None:
            _expect_bytes(seen, data, f"{offset}+{length} without waiting")


async def _check_views_live_side_by_side(device: BlockDevice, numbers: _Numbers) -> None:
    """A buffer from ``read_nowait`` is valid until its own extent is written or the caller awaits."""
    first, second = numbers.data(4096), numbers.data(4096)
    await device.write(0, first)
    await device.write(4096, second)
    views = [device.read_nowait(0, 4096), device.read_nowait(4096, 4096), device.read_nowait(0, 512)]
    device.write_nowait(8192, numbers.data(4096))
    for view, data in zip(views, (first, second, first[:512]), strict=True):
        if view is not None:
            _expect_bytes(view, data, "a view after other calls without waiting")


async def _check_read_is_stable(device: BlockDevice, numbers: _Numbers) -> None:
    """The result of ``read`` is stable: nobody writes to it later."""
    old = numbers.data(65536)
    await device.write(0, old)
    results = [await device.read(0, 65536), await device.read(4096, 4096)]
    await device.write(0, numbers.data(65536))
    device.write_nowait(0, numbers.data(65536))
    await device.zero(0, 65536)
    _expect_bytes(results[0], old, "an earlier result after later writes")
    _expect_bytes(results[1], old[4096:8192], "an earlier result after later writes")


async def _check_write_keeps_no_buffer(device: BlockDevice, numbers: _Numbers) -> None:
    """``write`` and ``write_nowait`` take any buffer and do not look at it after they have ended."""
    data = numbers.data(8192)
    for kind in (bytes, bytearray, memoryview):
        await device.zero(0, 16384)
        await device.write(0, kind(data))
        _expect_bytes(await device.read(0, 8192), data, f"written from {kind.__name__}")
    reused = bytearray(data)
    done = device.write_nowait(8192, memoryview(reused))
    await device.write(0, memoryview(reused))
    reused[:] = bytes(8192)
    _expect_bytes(await device.read(0, 8192), data, "after the caller used its buffer again")
    if done:
        _expect_bytes(await device.read(8192, 8192), data, "after the caller used its buffer again")


async def _check_zero(device: BlockDevice, numbers: _Numbers) -> None:
    """``zero`` makes exactly the extent read as zeros, and it can be written again."""
    length = min(device.size, _AREA)
    for offset, count in ((0, length), (4096, 65536), (100, 1), (4000, 70000), (65537, 131072 - 65537)):
        data = numbers.data(length)
        await device.write(0, data)
        if not (count <= 65536 and device.zero_nowait(offset, count)):
            await device.zero(offset, count)
        expected = data[:offset] + bytes(count) + data[offset + count :]
        _expect_bytes(await device.read(0, length), expected, f"zeroed {offset}+{count}")
    await device.zero(0, device.size)
    await device.write(100, b"again")
    _expect_bytes(await device.read(99, 7), b"\0again\0", "written after zeroing the whole device")


async def _check_neighbours_are_left_alone(device: BlockDevice, numbers: _Numbers) -> None:
    """Concurrent writes that do not overlap never disturb each other's bytes, whatever their alignment."""
    length = min(device.size, _AREA) // 2
    expected = bytearray(length)
    async with asyncio.TaskGroup() as group:
        offset = 0
        while offset < length:
            count = min(1 + numbers.below(9000), length - offset)
            if numbers.below(4):
                expected[offset : offset + count] = data = numbers.data(count)
                group.create_task(device.write(offset, data))
            else:
                group.create_task(device.zero(offset, count))
            offset += count
    _expect_bytes(await device.read(0, length), expected, "many small neighbours")


async def _check_overlapping_writes_mix_only_what_was_written(device: BlockDevice, numbers: _Numbers) -> None:
    """Overlapping concurrent writes are not ordered: every byte comes from one of them."""
    length = 32768
    writes = [numbers.data(length) for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        for data in writes:
            group.create_task(device.write(512, data))
    found = bytes(await device.read(512, length))
    strangers = [i for i in range(length) if found[i] not in {data[i] for data in writes}]
    _expect(not strangers, f"{len(strangers)} bytes come from none of the writes")
    _expect_bytes(await device.read(512, length), found, "read again after all writes ended")


async def _check_cancelled_mutation_has_ended(device: BlockDevice, numbers: _Numbers) -> None:
    """A mutation that was cancelled changes nothing afterwards."""
    length = min(device.size, 16 << 20)
    for attempt in range(_CANCELLATIONS):
        old, new = numbers.data(1) * length, numbers.data(1) * length
        write, zero = functools.partial(device.write, 0, old), functools.partial(device.zero, 0, length)
        await _cancelled(write if attempt % 3 else zero, after_turns=attempt // 3)
        await device.write(0, new)
        await _turns()
        _expect_bytes(await device.read(0, length), new, f"cancelled after {attempt // 3} turns of the loop")


async def _check_cancelled_read_leaves_nothing(device: BlockDevice, numbers: _Numbers) -> None:
    """A cancelled ``read`` or ``flush`` leaves nothing behind: the device goes on as before."""
    data = numbers.data(65536)
    await device.write(0, data)
    for after_turns in range(4):
        await _cancelled(functools.partial(device.read, 0, 65536), after_turns=after_turns)
        await _cancelled(device.flush, after_turns=after_turns)
    _expect_bytes(await device.read(0, 65536), data, "after cancelled reads and flushes")
    await device.flush()


async def _check_data_extents(device: BlockDevice, numbers: _Numbers) -> None:
    """``data_extents`` are ascending and disjoint, and the device reads as zeros outside of them."""
    for offset in (0, 70000, device.size - 5000):
        await device.write(offset, numbers.data(5000))
    await device.write(100_000, numbers.data(50_000))
    await device.zero(110_000, 20_000)
    area = min(device.size, _AREA)
    end = 0
    for offset, length in [*await device.data_extents(), (device.size, 0)]:
        _expect(offset >= end, f"the extent at {offset} begins before {end}, where the last one ended")
        _expect(length > 0 or offset == device.size, f"the extent at {offset} is empty")
        for gap in ((end, min(offset, area)), (max(end, device.size - area), offset)):
            if gap[0] < gap[1]:
                found = await device.read(gap[0], gap[1] - gap[0])
                _expect_bytes(found, bytes(gap[1] - gap[0]), f"outside of all extents, at {gap[0]}")
        end = offset + length
    _expect(end <= device.size, f"the last extent ends at {end}, beyond the device")


async def _check_against_model(device: BlockDevice, numbers: _Numbers) -> None:
    """Whatever the order of the calls, the device holds what a row of bytes would hold."""
    length = min(device.size, _AREA)
    model = bytearray(length)
    for step in range(_MODEL_STEPS):
        offset = numbers.below(length)
        count = 1 + numbers.below(min(length - offset, 1 << (1 + numbers.below(18))))
        action = numbers.below(8)
        if action < 4:
            data = numbers.data(count)
            await _write(device, offset, data, numbers)
            model[offset : offset + count] = data
        elif action < 6:
            if not (numbers.below(2) and device.zero_nowait(offset, count)):
                await device.zero(offset, count)
            model[offset : offset + count] = bytes(count)
        elif action == 6:
            await device.flush()
        found: Buffer | None = device.read_nowait(offset, count) if numbers.below(2) else None
        if found is None:
            found = await device.read(offset, count)
        _expect_bytes(found, model[offset : offset + count], f"step {step} at {offset}+{count}")
    _expect_bytes(await device.read(0, length), model, "at the end")


async def _check_flush(device: BlockDevice, numbers: _Numbers) -> None:
    """``flush`` may be called at any time, by many at once, and changes no byte."""
    data = numbers.data(65536)
    await device.flush()
    async with asyncio.TaskGroup() as group:
        for offset in range(0, 65536, 4096):
            group.create_task(device.write(offset, data[offset : offset + 4096]))
            group.create_task(device.flush())
    await device.flush()
    _expect_bytes(await device.read(0, 65536), data, "after concurrent flushes")


async def _check_closed(device: BlockDevice, numbers: _Numbers) -> None:
    """``aclose`` may be called twice, and every other call after it raises `ClosedError`."""
    await device.write(0, numbers.data(4096))
    await device.aclose()
    await device.aclose()
    at_once: dict[str, Callable[[], object]] = {
        "read_nowait": lambda: device.read_nowait(0, 512),
        "write_nowait": lambda: device.write_nowait(0, bytes(512)),
        "zero_nowait": lambda: device.zero_nowait(0, 512),
    }
    for name, call in at_once.items():
        with _raises_closed(name):
            call()
    awaited: dict[str, Callable[[], Awaitable[object]]] = {
        "read": lambda: device.read(0, 512),
        "write": lambda: device.write(0, bytes(512)),
        "zero": lambda: device.zero(0, 512),
        "flush": device.flush,
        "data_extents": device.data_extents,
    }
    for name, verb in awaited.items():
        with _raises_closed(name):
            await verb()


async def _check_durable(make_device: MakeDevice, reopen: Reopen, numbers: _Numbers) -> None:
    """What ``flush`` made durable is there when the medium is opened again."""
    device = await make_device()
    length = min(device.size, _AREA)
    data = bytearray(numbers.data(length))
    await device.write(0, data)
    await device.zero(5000, 70000)
    data[5000:75000] = bytes(70000)
    await device.flush()
    await device.aclose()
    async with _closing(await reopen(device)) as again:
        _expect(again.size == device.size, f"the size was {device.size} and is {again.size}")
        _expect_bytes(await again.read(0, length), data, "after opening again")


# -------------------------------------------------------------------------------------------------- their tools


class _Numbers:
    """Bytes and numbers that look like chance and are a function of the seed."""

    def __init__(self, seed: str) -> None:
        self._seed = seed.encode()
        self._drawn = 0

    def data(self, length: int) -> bytes:
        self._drawn += 1
        return blake3.blake3(self._seed + self._drawn.to_bytes(8, "little")).digest(length=length)

    def below(self, limit: int) -> int:
        return int.from_bytes(self.data(8), "little") % limit


async def _write(device: BlockDevice, offset: int, data: Buffer, numbers: _Numbers) -> None:
    if not (numbers.below(2) and device.write_nowait(offset, data)):
        await device.write(offset, data)


async def _cancelled(call: Callable[[], Awaitable[object]], *, after_turns: int) -> None:
    """Run a call in a task and cancel it after some turns of the loop; it may have ended by then."""

    async def run() -> None:
        await call()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(run())
        for _ in range(after_turns + 1):  # the first turn starts it, unless the loop likes to shuffle
            await asyncio.sleep(0)
        task.cancel()


async def _turns() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def _closing(device: BlockDevice) -> AsyncIterator[BlockDevice]:
    try:
        yield device
    finally:
        await device.aclose()


@contextlib.contextmanager
def _noted(note: str) -> Iterator[None]:
    """Whatever is raised inside becomes an ``AssertionError`` that says which check it was."""
    try:
        yield
    except Exception as error:
        failure = (
            error if isinstance(error, AssertionError) else AssertionError(f"the device raised {error!r}")
        )
        failure.add_note(note)
        raise failure from error.__cause__ if failure is error else error


@contextlib.contextmanager
def _raises_closed(name: str) -> Iterator[None]:
    try:
        yield
    except ClosedError:
        return
    raise AssertionError(f"{name} did not raise ClosedError after aclose")


def _expect(condition: bool, message: str) -> None:
    """An ``assert`` that ``python -O`` does not remove."""
    if not condition:
        raise AssertionError(message)


def _expect_bytes(found: Buffer, expected: Buffer, where: str) -> None:
    found, expected = bytes(found), bytes(expected)
    _expect(len(found) == len(expected), f"{where}: {len(found)} bytes instead of {len(expected)}")
    if found != expected:
        wrong = next(i for i in range(len(found)) if found[i] != expected[i])
        raise AssertionError(
            f"{where}: byte {wrong} is {found[wrong]:#04x} instead of {expected[wrong]:#04x}"
        )
