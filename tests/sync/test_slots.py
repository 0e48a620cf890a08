"""The sparse array of slots, against a plain one."""

from __future__ import annotations

import errno
import os
from contextlib import closing

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from silo.errors import CapacityError
from silo.sync.mappage import SLOT
from silo.sync.slots import PIECE, SparseSlots

COUNT = 2000  # seven pieces, the last one partly used
edges = st.one_of(
    st.integers(0, COUNT), st.sampled_from([n * PIECE // 56 + d for n in range(1, 7) for d in (0, 1)])
)
runs = st.tuples(edges, edges).map(sorted).filter(lambda run: run[0] < run[1])
steps = st.lists(
    st.tuples(st.sampled_from(["put", "fill", "clear", "clear"]), runs, st.integers(1, 250)), max_size=8
)


def slot(value: int) -> np.ndarray:
    made = np.zeros(1, dtype=SLOT)
    made["kind"], made["digest"], made["offset"] = value, value, value
    return made


@given(steps)
def test_it_is_an_array(script: list[tuple[str, list[int], int]]) -> None:
    """Written, filled and cleared at every boundary; read one by one, in runs and picked out."""
    model = np.zeros(COUNT, dtype=SLOT)
    with closing(SparseSlots(COUNT)) as slots:
        for verb, (first, limit), value in script:
            if verb == "put":
                chosen = np.arange(first, limit, 1 + value % 7)
                slots.put(chosen, np.repeat(slot(value), len(chosen)))
                model[chosen] = slot(value)
            elif verb == "fill":
                slots.fill(first, limit, slot(value))
                model[first:limit] = slot(value)
            else:
                slots.clear(first, limit)
                model[first:limit] = np.zeros(1, dtype=SLOT)
            assert slots.read(0, COUNT).tobytes() == model.tobytes()
        assert slots.kinds(5, COUNT - 5).tobytes() == model["kind"][5 : COUNT - 5].tobytes()
        some = np.arange(0, COUNT, 37)
        assert slots.gather(some).tobytes() == model[some].tobytes()
        for index in range(0, COUNT, 91):
            found = slots.get(index)
            assert (bytes(56) if found is None else found.tobytes()) == model[index].tobytes()
        assert not slots.is_hole(0, COUNT) or not model["kind"].any()


def test_holes_cost_nothing_and_are_given_back() -> None:
    """Reading does not fill them; clearing makes them."""
    with closing(SparseSlots(1 << 24)) as slots:
        slots.read(0, 1 << 20)
        slots.kinds(0, 1 << 20)
        assert slots.get(12345) is None
        assert slots.file_bytes == 0
        slots.fill(0, 1 << 16, slot(7))
        assert slots.file_bytes >= 56 << 16
        slots.clear(0, 1 << 16)
        assert slots.file_bytes <= PIECE
        assert slots.is_hole(1000, 1 << 24)


def test_without_room_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(SparseSlots(COUNT)) as slots:
        slots.put(np.array([1]), slot(1))

        def full(*arguments: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        slots.put(np.array([2]), slot(2))  # its piece is there
        for write in (lambda: slots.put(np.array([2, 1900]), slot(3)), lambda: slots.fill(2, 1900, slot(3))):
            with pytest.raises(CapacityError, match="No space left"):
                write()
        assert slots.kinds(0, COUNT).nonzero()[0].tolist() == [1, 2]
        assert int(slots.kinds(2, 3)[0]) == 2
