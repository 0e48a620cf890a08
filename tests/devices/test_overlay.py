"""The overlay: contract, copy-up, zeroing, what is left after failures and between others, a model."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.abc import BlockDevice
from silo.chunkmap import Residency
from silo.devices.checked import CheckedDevice
from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.memory import MemoryDevice
from silo.devices.overlay import COPY_UP_INLINE_MAX, OverlayDevice
from silo.devices.overlay_folder import fresh_cells
from silo.errors import ClosedError, CorruptionError, InvalidRequestError, UnavailableError
from silo.geometry import Geometry
from silo.testing.check_device import check_device
from silo.volumestate import EphemeralState
from tests.support.held import HeldDevice, everything_else, interleaved
from tests.support.overlays import CELL, KeptMap, make_overlay, memory_with

BLOCK = 512
BELOW, ZERO, OWNED = Residency.ABSENT_STORE, Residency.ZERO_UNPUNCHED, Residency.PRESENT
GOLDEN = random.Random(3).randbytes(4 * CELL + 3 * BLOCK)
"""Four cells and a short one."""


def cells_of(overlay: OverlayDevice) -> list[Residency]:
    return [overlay._map.residency(cell) for cell in range(overlay.cells.chunk_count)]


def content_of(overlay: OverlayDevice) -> bytes:
    return bytes(overlay.read_nowait(0, overlay.size))


# ---- the contract ---------------------------------------------------------------------------------------


async def in_memory() -> BlockDevice:
    return make_overlay(MemoryDevice((1 << 20) + BLOCK), cell_size=65536)


async def in_small_cells() -> BlockDevice:
    return make_overlay(MemoryDevice(1 << 20))


async def beyond_a_small_base() -> BlockDevice:
    """Most of it has no base at all, and one cell lies half over it."""
    return make_overlay(MemoryDevice(100 << 10), MemoryDevice(1 << 20), cell_size=65536)


async def over_content_that_was_zeroed() -> BlockDevice:
    """Nothing of what the base holds may shine through."""
    overlay = make_overlay(memory_with(random.Random(1).randbytes(1 << 20)), cell_size=65536)
    await overlay.zero(0, overlay.size)
    return overlay


async def stacked() -> BlockDevice:
    middle = make_overlay(memory_with(random.Random(2).randbytes(1 << 20)), cell_size=65536)
    await middle.zero(0, middle.size)
    await middle.write(70_000, b"to be covered")
    upper = make_overlay(middle, cell_size=16384)
    await upper.zero(65536, 65536)
    return upper


async def where_everything_waits() -> BlockDevice:
    base = HeldDevice(1 << 20, slow="read")
    return make_overlay(base, HeldDevice(1 << 20, slow="read write zero"), cell_size=65536)


@pytest.mark.parametrize(
    "make",
    [
        in_memory,
        in_small_cells,
        beyond_a_small_base,
        over_content_that_was_zeroed,
        stacked,
        where_everything_waits,
    ],
)
async def test_contract(make: Callable[[], Awaitable[BlockDevice]]) -> None:
    async def checked() -> BlockDevice:
        return CheckedDevice(await make())

    await check_device(checked)


async def test_closing_closes_what_is_below() -> None:
    base, data = MemoryDevice(CELL), MemoryDevice(CELL)
    await make_overlay(base, data).aclose()
    for device in (base, data):
        with pytest.raises(ClosedError):
            device.read_nowait(0, 1)


@pytest.mark.parametrize("offset", [0, 100, CELL, len(GOLDEN)])
async def test_an_empty_extent_is_allowed(offset: int) -> None:
    overlay = make_overlay(memory_with(GOLDEN))
    assert bytes(overlay.read_nowait(offset, 0)) == b""
    assert bytes(await overlay.read(offset, 0)) == b""
    assert overlay.write_nowait(offset, b"")
    await overlay.write(offset, b"")
    assert overlay.zero_nowait(offset, 0)
    await overlay.zero(offset, 0)
    assert content_of(overlay) == GOLDEN


# ---- copy-up --------------------------------------------------------------------------------------------


async def test_a_new_overlay_reads_as_its_base_and_zeros_beyond() -> None:
    overlay = make_overlay(memory_with(GOLDEN), MemoryDevice(8 * CELL))
    assert content_of(overlay) == GOLDEN + bytes(8 * CELL - len(GOLDEN))
    assert await overlay.read(0, overlay.size) == content_of(overlay)
    for offset, length in ((len(GOLDEN) - 10, 20), (len(GOLDEN), 10), (5 * CELL - 1, 1), (5 * CELL, CELL)):
        expected = (GOLDEN[offset:] + bytes(length))[:length]
        assert bytes(overlay.read_nowait(offset, length)) == expected
        assert bytes(await overlay.read(offset, length)) == expected
    assert cells_of(overlay) == [BELOW] * 5 + [ZERO] * 3


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("offset", "length", "owned"),
    [
        (0, 1, [0]),
        (CELL + 512, 512, [1]),
        (CELL - 1, 2, [0, 1]),
        (CELL // 2, 3 * CELL, [0, 1, 2, 3]),
        (4 * CELL + 100, 200, [4]),
        (len(GOLDEN) - 1, 1, [4]),
    ],
)
async def test_a_partial_write_copies_the_rest_of_its_cells_up(
    fast: bool, offset: int, length: int, owned: list[int]
) -> None:
    base = memory_with(GOLDEN)
    overlay = make_overlay(base, HeldDevice(len(GOLDEN), slow="" if fast else "write"))
    new = random.Random(offset).randbytes(length)
    assert overlay.write_nowait(offset, new) is fast
    if not fast:
        assert content_of(overlay) == GOLDEN, "declined means that nothing was done"
        await overlay.write(offset, new)
    assert content_of(overlay) == GOLDEN[:offset] + new + GOLDEN[offset + length :]
    assert [cell for cell, residency in enumerate(cells_of(overlay)) if residency == OWNED] == owned
    assert bytes(base.read_nowait(0, len(GOLDEN))) == GOLDEN


@pytest.mark.parametrize("fast", [True, False])
async def test_a_covering_write_does_not_read_the_base(fast: bool) -> None:
    base = FaultyDevice(memory_with(GOLDEN))
    base.fail(Verb.READ, for_ever=True)
    overlay = make_overlay(base, HeldDevice(len(GOLDEN), slow="" if fast else "write"))
    for offset, length in ((0, CELL), (2 * CELL, 2 * CELL), (4 * CELL, 3 * BLOCK)):
        if not (fast and overlay.write_nowait(offset, b"n" * length)):
            await overlay.write(offset, b"n" * length)
    assert cells_of(overlay) == [OWNED, BELOW, OWNED, OWNED, OWNED]
    assert base.pending == 1
    assert base.calls == 0


async def test_a_copy_up_that_would_wait_for_the_base_is_declined() -> None:
    """And so is a read; what is owned or zero does not need the base."""
    overlay = make_overlay(HeldDevice(4 * CELL, slow="read", inner=memory_with(GOLDEN[: 4 * CELL])))
    assert overlay.read_nowait(0, 10) is None
    assert overlay.read_nowait(CELL - 1, 2) is None
    assert not overlay.write_nowait(10, b"new")
    assert not overlay.zero_nowait(10, 3)
    assert cells_of(overlay) == [BELOW] * 4
    await overlay.write(10, b"new")
    assert bytes(overlay.read_nowait(9, 5)) == GOLDEN[9:10] + b"new" + GOLDEN[13:14]
    assert overlay.write_nowait(20, b"more")
    assert overlay.zero_nowait(CELL, CELL)
    assert bytes(overlay.read_nowait(CELL, CELL)) == bytes(CELL)
    assert overlay.write_nowait(CELL, b"again")


async def test_a_large_copy_up_is_not_done_inline() -> None:
    cell = 2 * COPY_UP_INLINE_MAX
    overlay = make_overlay(memory_with(b"o" * cell), cell_size=cell)
    assert not overlay.write_nowait(0, b"n")
    assert overlay.write_nowait(0, b"n" * (cell // 2))


async def test_two_overlays_over_one_base() -> None:
    base = memory_with(GOLDEN)
    one, two = make_overlay(base), make_overlay(base)
    await one.write(0, b"one")
    await two.zero(0, CELL)
    assert content_of(one) == b"one" + GOLDEN[3:]
    assert content_of(two) == bytes(CELL) + GOLDEN[CELL:]
    assert bytes(base.read_nowait(0, len(GOLDEN))) == GOLDEN


# ---- zeroing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
async def test_zeroing_whole_cells_touches_neither_base_nor_data(fast: bool) -> None:
    base = FaultyDevice(memory_with(GOLDEN))
    base.fail(Verb.READ, for_ever=True)
    data = HeldDevice(len(GOLDEN), slow="" if fast else "write zero")
    overlay = make_overlay(base, data)
    assert overlay.zero_nowait(CELL, 2 * CELL)
    await overlay.zero(3 * CELL, CELL + 3 * BLOCK)
    assert cells_of(overlay) == [BELOW, ZERO, ZERO, ZERO, ZERO]
    assert data.log == []


async def test_zeroing_gives_back_what_was_owned() -> None:
    data = MemoryDevice(8 << 20)
    overlay = make_overlay(MemoryDevice(8 << 20), data, cell_size=65536)
    await overlay.write(0, b"x" * (8 << 20))
    await overlay.zero(0, 4 << 20)
    assert await data.data_extents() == [(4 << 20, 4 << 20)]
    assert overlay.zero_nowait(4 << 20, 2 << 20)
    assert await data.data_extents() == [(6 << 20, 2 << 20)]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("states", [[BELOW] * 3, [OWNED] * 3, [ZERO] * 3, [BELOW, OWNED, ZERO]])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, CELL), (100, 200), (CELL - 5, 10), (100, 2 * CELL + 100), (CELL, CELL + 7), (5, CELL - 5)],
)
async def test_zeroing_any_extent(fast: bool, states: list[int], offset: int, length: int) -> None:
    """At both speeds, whatever the cells are; what is declined is left alone."""
    image = GOLDEN[: 3 * CELL]
    overlay = make_overlay(memory_with(image))
    for cell, state in enumerate(states):
        if state == OWNED:
            await overlay.write(cell * CELL, image[cell * CELL : (cell + 1) * CELL])
        elif state == ZERO:
            await overlay.zero(cell * CELL, CELL)
    before = content_of(overlay)
    if not (fast and overlay.zero_nowait(offset, length)):
        assert content_of(overlay) == before
        await overlay.zero(offset, length)
    assert content_of(overlay) == before[:offset] + bytes(length) + before[offset + length :]


@pytest.mark.parametrize("states", [BELOW, OWNED])
async def test_a_large_extent_is_zeroed_in_steps(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others run in between; the form without waiting leaves it to the other one."""
    monkeypatch.setattr("silo.devices.overlay.ZERO_STEP", 2)
    overlay = make_overlay(memory_with(GOLDEN))
    if states == OWNED:
        await overlay.write(0, GOLDEN)
    assert not overlay.zero_nowait(CELL, 3 * CELL)
    await overlay.zero(CELL + 5, 3 * CELL)
    assert cells_of(overlay) == [states, OWNED, ZERO, ZERO, OWNED]
    assert content_of(overlay) == GOLDEN[: CELL + 5] + bytes(3 * CELL) + GOLDEN[4 * CELL + 5 :]


async def test_stale_data_does_not_come_back() -> None:
    """Whatever the data still holds under a zero cell: a partial write does not bring it to light."""
    data = FaultyDevice(MemoryDevice(CELL))
    overlay = make_overlay(memory_with(b"o" * CELL), data)
    overlay.zero_nowait(0, CELL)
    data.fail(Verb.WRITE, torn=CELL // 2)
    with pytest.raises(UnavailableError):
        overlay.write_nowait(0, b"x" * CELL)
    assert bytes(data.read_nowait(0, 1)) == b"x"
    assert content_of(overlay) == bytes(CELL)
    assert overlay.write_nowait(CELL - 1, b"y")
    assert content_of(overlay) == bytes(CELL - 1) + b"y"


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


async def change(overlay: OverlayDevice, offset: int, new: bytes) -> None:
    """Write, or zero when it is zeros; fast if possible."""
    if any(new):
        if not overlay.write_nowait(offset, new):
            await overlay.write(offset, new)
    elif not overlay.zero_nowait(offset, len(new)):
        await overlay.zero(offset, len(new))


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


# ---- what it says of itself -----------------------------------------------------------------------------


async def test_data_extents_tell_of_all_layers() -> None:
    mib = 1 << 20
    base = MemoryDevice(16 * mib)  # which knows of its content in regions of 2 MiB
    for region in (0, 2, 4, 6):
        base.write_nowait(region * 2 * mib, b"x")
    middle = make_overlay(base, cell_size=65536)
    assert await middle.data_extents() == [(region * 2 * mib, 2 * mib) for region in (0, 2, 4, 6)]
    await middle.zero(0, mib + 100)
    await middle.zero(8 * mib, 2 * mib)
    await middle.write(2 * mib, b"y")
    upper = make_overlay(middle, MemoryDevice(20 * mib), cell_size=mib)
    await upper.write(19 * mib + 1, b"z")
    assert await upper.data_extents() == [
        (mib, mib + 65536),  # the edge that was copied up, the rest of the region, what the middle owns
        (4 * mib, 2 * mib),
        (12 * mib, 2 * mib),
        (19 * mib, mib),
    ]


@pytest.mark.parametrize("seed", range(30))
async def test_outside_of_all_extents_everything_is_zero(seed: int) -> None:
    chance = random.Random(seed)
    base = PatchyDevice(16 * CELL, chance)
    overlay = make_overlay(base)
    for _ in range(chance.randrange(12)):
        offset = chance.randrange(0, 16 * CELL, BLOCK)
        length = min(chance.randrange(1, 20) * BLOCK, 16 * CELL - offset)
        await change(overlay, offset, chance.choice([bytes(length), chance.randbytes(length)]))
    content = bytearray(content_of(overlay))
    end = 0
    for offset, length in await CheckedDevice(overlay).data_extents():
        assert offset >= end
        end = offset + length
        content[offset:end] = bytes(length)
    assert not any(content)


class PatchyDevice(MemoryDevice):
    """Knows its extents to the block."""

    def __init__(self, size: int, chance: random.Random) -> None:
        super().__init__(size)
        edges = sorted(chance.sample(range(0, size, BLOCK), 12))
        self.patches = [(low, high - low) for low, high in zip(edges[::2], edges[1::2], strict=True)]
        for offset, length in self.patches:
            self.write_nowait(offset, chance.randbytes(length))

    async def data_extents(self) -> list[tuple[int, int]]:
        return self.patches


@pytest.mark.parametrize(
    "states", [[1, 0, 0], [2, 0, 0], [5, 0, 0], [3, 4, 0]], ids=["peer", "zero", "unknown", "no base"]
)
def test_a_map_that_no_overlay_can_have_is_refused(states: list[int]) -> None:
    cells = Geometry(3 * CELL, CELL)
    with pytest.raises(CorruptionError, match="what cannot be"):
        OverlayDevice(
            MemoryDevice(2 * CELL), MemoryDevice(3 * CELL), cells, EphemeralState(cells, bytes(states))
        )
    with pytest.raises(InvalidRequestError, match="cannot have data of 4096 bytes"):
        OverlayDevice(MemoryDevice(CELL), MemoryDevice(CELL), cells, EphemeralState(cells, bytes(3)))


# ---- the model ------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "zero", "read", "flush", "process dies", "power fails"]),
        st.integers(0, len(GOLDEN) - 1),
        st.one_of(st.integers(1, 3 * CELL), st.sampled_from([1, BLOCK, CELL, 2 * CELL])),
        st.booleans(),
    ),
    max_size=40,
)


@given(steps=STEPS, slow=st.sets(st.sampled_from(["read", "write", "zero"])), patch=st.integers(0, 255))
async def test_against_a_row_of_bytes(
    steps: list[tuple[str, int, int, bool]], slow: set[str], patch: int
) -> None:
    """Two overlays, one over the other; the upper one changes, and restarts with what it had written down."""
    words = " ".join(slow)
    middle = make_overlay(HeldDevice(len(GOLDEN), slow=words, inner=memory_with(GOLDEN)))
    await middle.write(2 * CELL - 100, bytes([patch]) * 200)
    await middle.zero(3 * CELL, 100)
    model = bytearray(await middle.read(0, len(GOLDEN))) + bytes(CELL)
    flushed = bytes(model)
    data = HeldDevice(len(model), slow=words)
    kept = KeptMap(fresh_cells(Geometry(len(model), CELL), middle.size), random.Random(0))
    overlay = make_overlay(middle, data, state=kept)
    for number, (action, offset, length, fast) in enumerate(steps):
        stop = min(offset + length, len(model))
        if action == "write":
            new = random.Random(number).randbytes(stop - offset)
            if not (fast and overlay.write_nowait(offset, new)):
                await overlay.write(offset, new)
            model[offset:stop] = new
        elif action == "zero":
            if not (fast and overlay.zero_nowait(offset, stop - offset)):
                await overlay.zero(offset, stop - offset)
            model[offset:stop] = bytes(stop - offset)
        elif action == "flush":
            await overlay.flush()
            flushed = bytes(model)
        elif action != "read":
            kept = kept.restart(power=action == "power fails")
            overlay = make_overlay(middle, data, state=kept)
            if action == "power fails":  # where nothing was flushed, any older content of a cell may be back
                model[:] = await overlay.read(0, len(model))
                touched = touched_since_flush(steps[:number])
                assert all(
                    model[at : at + CELL] == flushed[at : at + CELL]
                    for at in range(0, len(model), CELL)
                    if at // CELL not in touched
                )
        found = overlay.read_nowait(offset, stop - offset) if fast else None
        assert (
            bytes(await overlay.read(offset, stop - offset) if found is None else found) == model[offset:stop]
        )
    assert bytes(await overlay.read(0, len(model))) == model


def touched_since_flush(steps: list[tuple[str, int, int, bool]]) -> set[int]:
    """The cells that were written to or zeroed since the last flush."""
    cells: set[int] = set()
    for action, offset, length, _ in steps:
        if action in ("write", "zero"):
            cells.update(range(offset // CELL, (offset + length - 1) // CELL + 1))
        elif action == "flush":
            cells.clear()
    return cells
