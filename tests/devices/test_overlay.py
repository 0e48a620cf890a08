"""The overlay: the contract, what is copied up, what zeroing leaves, what it says of itself."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest

from silo.abc import BlockDevice
from silo.devices.checked import CheckedDevice
from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.memory import MemoryDevice
from silo.devices.overlay import COPY_UP_INLINE_MAX, OverlayDevice
from silo.errors import ClosedError, CorruptionError, InvalidRequestError, UnavailableError
from silo.geometry import Geometry
from silo.testing.check_device import check_device
from silo.volumestate import EphemeralState
from tests.support.held import HeldDevice
from tests.support.overlays import (
    BELOW,
    CELL,
    GOLDEN,
    OWNED,
    ZERO,
    cells_of,
    change,
    content_of,
    make_overlay,
    memory_with,
)

BLOCK = 512


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
