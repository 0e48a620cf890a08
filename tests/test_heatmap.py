"""Decayed counts, against counting every request with its age."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import InvalidRequestError
from silo.heatmap import HeatMap

HALF_LIFE_S = 10.0


@given(
    st.lists(st.tuples(st.floats(0, 400), st.integers(0, 3), st.booleans()), max_size=30),
    st.floats(0, 2000),
)
def test_forward_decay_is_decay(requests, pause_s):
    """Each request counts 2^(-age / half-life), whatever came between and however far the landmark has moved."""
    heat = HeatMap(4, now=0.0, half_life_s=HALF_LIFE_S)
    now = 0.0
    for delay_s, chunk, is_write in requests:
        now += delay_s
        heat.advance(now)
        (heat.writes if is_write else heat.reads)[chunk] += heat.weight
    end = now + pause_s
    heat.advance(end)
    expected = {True: np.zeros(4), False: np.zeros(4)}
    at = 0.0
    for delay_s, chunk, is_write in requests:
        at += delay_s
        expected[is_write][chunk] += 2 ** -((end - at) / HALF_LIFE_S)
    assert np.allclose(heat.write_heat(), expected[True], rtol=1e-4, atol=1e-12)
    assert np.allclose(heat.read_heat(), expected[False], rtol=1e-4, atol=1e-12)


def test_a_part_of_the_chunks():
    """Only the chunks asked for are decayed and returned."""
    heat = HeatMap(8)
    heat.reads[5] += heat.weight
    heat.writes[6] += heat.weight
    assert heat.read_heat(4, 6).tolist() == [0.0, 1.0]
    assert heat.write_heat(5).tolist() == [0.0, 1.0, 0.0]


def test_years_do_not_overflow():
    """After a pause of any length the old is cold and the new counts one."""
    heat = HeatMap(2, half_life_s=1.0)
    heat.reads[0] += heat.weight
    for now in (1e3, 1e6, 1e9):
        heat.advance(now)
        heat.reads[1] += heat.weight
    assert heat.read_heat()[0] == pytest.approx(0.0, abs=1e-12)
    assert heat.read_heat()[1] == pytest.approx(1.0)


def test_adopted_heat_is_worth_what_it_was():
    """Counts from another host are added to ours and decay with them."""
    here, there = HeatMap(2, half_life_s=1.0), HeatMap(2, half_life_s=1.0)
    there.advance(5.0)
    there.reads[1] += 3 * there.weight
    there.writes[0] += there.weight
    here.advance(7.0)
    here.reads[1] += here.weight
    here.adopt(there.read_heat(), there.write_heat())
    assert here.read_heat().tolist() == [0.0, 4.0]
    here.advance(8.0)
    assert here.read_heat().tolist() == [0.0, 2.0]
    assert here.write_heat().tolist() == [0.5, 0.0]


@pytest.mark.parametrize("half_life_s", [0, -1])
def test_a_half_life_is_positive(half_life_s):
    """Zero would divide by zero, less would heat up with age."""
    with pytest.raises(InvalidRequestError):
        HeatMap(1, half_life_s=half_life_s)
