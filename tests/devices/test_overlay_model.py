"""Two overlays, one over the other, against a row of bytes."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from silo.devices.overlay_folder import fresh_cells
from silo.geometry import Geometry
from tests.support.held import HeldDevice
from tests.support.overlays import (
    CELL,
    GOLDEN,
    KeptMap,
    make_overlay,
    memory_with,
)

BLOCK = 512

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
