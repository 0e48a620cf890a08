"""The overlay when calls fail, when they meet, and when they must be durable."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable

import pytest

from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.memory import MemoryDevice
from silo.devices.overlay import OverlayDevice
from silo.devices.overlay_folder import fresh_cells
from silo.errors import ClosedError, UnavailableError
from silo.geometry import Geometry
from tests.support.held import HeldDevice, everything_else, interleaved
from tests.support.overlays import (
    BELOW,
    CELL,
    GOLDEN,
    OWNED,
    ZERO,
    KeptMap,
    cells_of,
    change,
    content_of,
    make_overlay,
    memory_with,
)

BLOCK = 512


# ---- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("torn", [0, 1000, CELL])
async def test_a_failed_write_owns_nothing(fast: bool, torn: int) -> None:
    """The base shows through as before, though the data was written in part."""
    data = FaultyDevice(HeldDevice(len(GOLDEN), slow="" if fast else "write"))
    overlay = make_overlay(memory_with(GOLDEN), data)
    data.fail(Verb.WRITE, torn=torn)
    with pytest.raises(UnavailableError):
        if fast:
            overlay.write_nowait(CELL - 10, b"n" * 20)
        else:
            await overlay.write(CELL - 10, b"n" * 20)
    assert cells_of(overlay) == [BELOW] * 5
    assert content_of(overlay) == GOLDEN
    await overlay.write(CELL - 10, b"n" * 20)
    assert content_of(overlay) == GOLDEN[: CELL - 10] + b"n" * 20 + GOLDEN[CELL + 10 :]


@pytest.mark.parametrize("fast", [True, False])
async def test_a_failed_copy_up_owns_nothing(fast: bool) -> None:
    base = FaultyDevice(HeldDevice(len(GOLDEN), slow="" if fast else "read", inner=memory_with(GOLDEN)))
    data = HeldDevice(len(GOLDEN))
    overlay = make_overlay(base, data)
    base.fail(Verb.READ)
    with pytest.raises(UnavailableError):
        if fast:
            overlay.write_nowait(100, b"n")
        else:
            await overlay.write(100, b"n")
    assert data.log == []
    assert cells_of(overlay) == [BELOW] * 5
    await overlay.write(100, b"n")
    assert bytes(await overlay.read(0, len(GOLDEN))) == GOLDEN[:100] + b"n" + GOLDEN[101:]


@pytest.mark.parametrize("seed", range(20))
async def test_whichever_call_fails_every_block_is_old_or_new(seed: int) -> None:
    """Fail the first call to base (or data), then the second, and so on; what failed is repeated, and is done."""
    for nth in range(1, 100):
        chance = random.Random(seed)
        slow = chance.choice(["", "read", "write zero", "read write zero"])
        base = FaultyDevice(HeldDevice(len(GOLDEN), slow=slow, inner=memory_with(GOLDEN)))
        data = FaultyDevice(HeldDevice(len(GOLDEN), slow=slow))
        overlay = make_overlay(base, data)
        model = bytearray(GOLDEN)
        failing = data if seed % 2 else base
        failing.fail(nth=nth, torn=chance.randrange(0, 3 * CELL, BLOCK))
        for _ in range(12):
            offset = chance.randrange(0, len(GOLDEN), BLOCK)
            length = min(chance.randrange(1, 20) * BLOCK, len(GOLDEN) - offset)
            new = chance.choice([bytes(length), chance.randbytes(length)])
            old = bytes(model[offset : offset + length])
            try:
                await change(overlay, offset, new)
            except UnavailableError:
                found = bytes(await overlay.read(offset, length))
                for start in range(0, length, BLOCK):
                    block = slice(start, start + BLOCK)
                    assert found[block] in (old[block], new[block])
                await change(overlay, offset, new)
            model[offset : offset + length] = new
            with contextlib.suppress(UnavailableError):
                assert bytes(await overlay.read(0, len(GOLDEN))) == model
            if chance.random() < 0.2:
                with contextlib.suppress(UnavailableError):
                    await overlay.flush()
        left = failing.pending
        failing.heal()
        assert bytes(await overlay.read(0, len(GOLDEN))) == model
        if left:
            break
    assert 3 < nth < 99


# ---- between others -------------------------------------------------------------------------------------


@interleaved
async def test_two_partial_writers_of_one_cell_copy_it_up_once() -> None:
    base = HeldDevice(CELL, slow="read", hold="read", inner=memory_with(b"o" * CELL))
    overlay = make_overlay(base)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(overlay.write(0, b"one"))
        held = await base.next("read")
        tasks.create_task(overlay.write(100, b"two"))
        await everything_else()
        assert not overlay.write_nowait(200, b"three")
        assert bytes(await overlay_reads(overlay, base, 300, 5)) == b"ooooo", "readers do not wait"
        held.release()
    assert content_of(overlay) == b"one" + b"o" * 97 + b"two" + b"o" * (CELL - 103)


async def overlay_reads(overlay: OverlayDevice, base: HeldDevice, offset: int, length: int) -> bytes:
    """Read while reads of the base are held."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(overlay.read(offset, length))
        (await base.next("read")).release()
    return bytes(task.result())


@interleaved
async def test_zeroing_waits_for_a_copy_up_of_its_cell() -> None:
    """Or the copy-up would bring the base back after the cell was zeroed."""
    data = HeldDevice(CELL, slow="write", hold="write")
    overlay = make_overlay(memory_with(b"o" * CELL), data)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(overlay.write(0, b"new"))
        held = await data.next("write")
        assert not overlay.zero_nowait(0, CELL)
        zeroing = tasks.create_task(overlay.zero(0, CELL))
        await everything_else()
        assert not zeroing.done()
        held.release()
    assert content_of(overlay) == bytes(CELL)
    assert cells_of(overlay) == [ZERO]


@interleaved
async def test_a_covering_write_and_a_copy_up_do_not_cross() -> None:
    """The partial write must not put back what the covering one had replaced."""
    data = HeldDevice(CELL, slow="write", hold="write")
    overlay = make_overlay(memory_with(b"o" * CELL), data)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(overlay.write(0, b"c" * CELL))
        covering = await data.next("write")
        tasks.create_task(overlay.write(0, b"p"))
        await everything_else()
        covering.release()
        (await data.next("write")).release()
    assert content_of(overlay) == b"p" + b"c" * (CELL - 1)


@interleaved
async def test_zeroing_waits_for_writes_to_its_cells_that_are_under_way() -> None:
    """What they bring afterwards would not be zero; other writes to the same cells go on beside them."""
    data = HeldDevice(CELL, slow="write")
    overlay = make_overlay(memory_with(b"o" * CELL), data)
    await overlay.write(0, b"x" * CELL)
    data.hold = {"write"}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(overlay.write(0, b"first"))
        first = await data.next("write")
        assert not overlay.zero_nowait(0, CELL)
        zeroing = tasks.create_task(overlay.zero(0, CELL))
        tasks.create_task(overlay.write(100, b"second"))
        (await data.next("write")).release()
        await everything_else()
        assert not zeroing.done()
        assert bytes(overlay.read_nowait(100, 6)) == b"second"
        first.release()
    assert content_of(overlay) == bytes(CELL)


@interleaved
async def test_writes_across_cells_do_not_wait_for_one_another_for_ever() -> None:
    """Each takes all of its cells in one step."""
    overlay = make_overlay(
        HeldDevice(4 * CELL, slow="read"), HeldDevice(4 * CELL, slow="read write zero"), cell_size=CELL
    )
    async with asyncio.timeout(1000), asyncio.TaskGroup() as tasks:
        for first in (0, 1, 2, 1, 0, 2):
            tasks.create_task(overlay.write(first * CELL + 7, b"x" * (CELL + 100)))
            tasks.create_task(overlay.zero(first * CELL + 7, CELL + 100))
    assert not any(state & 8 for state in overlay._states)


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_cancelled_copy_up_leaves_the_cell_below_and_free(verb: str) -> None:
    @interleaved
    async def scenario() -> None:
        base = HeldDevice(CELL, slow="read", inner=memory_with(b"o" * CELL))
        data = HeldDevice(CELL, slow="write")
        held = base if verb == "read" else data
        held.hold = {verb}
        overlay = make_overlay(base, data)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(overlay.write(1, b"gone"))
            await held.next(verb)
            waiting = tasks.create_task(overlay.write(9, b"there"))
            await everything_else()
            held.hold = set()
            task.cancel()
        assert waiting.done()
        assert content_of(overlay) == b"o" * 9 + b"there" + b"o" * (CELL - 14)

    scenario()


@interleaved
async def test_closing_waits_for_a_copy_up() -> None:
    """Nobody changes the map after the files were given up; who still waits for a cell is told."""
    data = HeldDevice(CELL, slow="write", hold="write")
    overlay = make_overlay(MemoryDevice(CELL), data)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(overlay.write(0, b"x"))
        held = await data.next("write")
        late = tasks.create_task(refused(overlay.write(1, b"y")))
        await everything_else()
        closing = tasks.create_task(overlay.aclose())
        await everything_else()
        assert not closing.done()
        held.release()
    assert late.result()
    assert cells_of(overlay) == [OWNED]


async def refused(call: Awaitable[None]) -> bool:
    try:
        await call
    except ClosedError:
        return True
    return False


# ---- durability -----------------------------------------------------------------------------------------


class LoggedMap(KeptMap):
    """Says when a checkpoint begins."""

    def __init__(self, fresh: bytearray, log: list[tuple[str, int]]) -> None:
        super().__init__(fresh, random.Random(0))
        self._log = log

    async def checkpoint(self, states: bytes) -> None:
        self._log.append(("checkpoint", bytes(states).count(OWNED)))
        self.durable = states


def with_log(size: int = 4 * CELL) -> tuple[OverlayDevice, HeldDevice, LoggedMap]:
    data = HeldDevice(size)
    kept = LoggedMap(fresh_cells(Geometry(size, CELL), size), data.log)
    return make_overlay(MemoryDevice(size), data, state=kept), data, kept


@interleaved
async def test_the_map_is_copied_before_the_data_is_flushed_and_durable_after() -> None:
    """A cell that becomes owned in between is not in the checkpoint: its content may not be on the medium."""
    overlay, data, _ = with_log()
    await overlay.write(0, b"x")
    data.log.clear()
    data.hold = {"flush"}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(overlay.flush())
        held = await data.next("flush")
        assert overlay.write_nowait(CELL, b"y")
        held.release()
    assert data.log == [("write", CELL), ("flush", 0), ("checkpoint", 1)]


async def test_only_changes_of_the_map_need_a_checkpoint() -> None:
    overlay, data, _ = with_log()
    await overlay.flush()
    for change_map in (lambda: overlay.write_nowait(0, b"x"), lambda: overlay.zero_nowait(0, CELL)):
        assert change_map()
        await overlay.flush()
        assert [verb for verb, _ in data.log[-2:]] == ["flush", "checkpoint"]
        await overlay.flush()
        assert data.log[-1][0] == "flush"
    assert overlay.zero_nowait(0, CELL)
    await overlay.flush()
    assert data.log[-1][0] == "flush", "it was zero already"


@pytest.mark.parametrize("what", ["flush", "checkpoint"])
async def test_a_failed_flush_is_owed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay, data, kept = with_log()
    assert overlay.write_nowait(0, b"x")

    async def fail(*args: object) -> None:
        raise UnavailableError("no")

    with monkeypatch.context() as patch:
        patch.setattr(*((data.inner, "flush") if what == "flush" else (kept, "checkpoint")), fail)
        with pytest.raises(UnavailableError):
            await overlay.flush()
    assert kept.durable.count(OWNED) == 0
    await overlay.flush()
    assert kept.durable.count(OWNED) == 1


@interleaved
async def test_a_second_flush_does_not_overtake_the_checkpoint_of_the_first() -> None:
    overlay, data, kept = with_log()
    assert overlay.write_nowait(0, b"x")
    data.hold = {"flush"}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(overlay.flush())
        held = await data.next("flush")
        second = tasks.create_task(overlay.flush())
        await everything_else()
        assert not second.done()
        data.hold = set()
        held.release()
        await second
        assert kept.durable.count(OWNED) == 1
