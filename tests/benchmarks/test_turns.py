"""Taking turns: everybody as often, in changing company, and ratios within a round."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from benchmarks.common.turns import order_of_round, ratio, summarise, take_turns
from silo.errors import InvalidRequestError


@pytest.mark.parametrize("count", range(1, 6))
def test_everybody_is_in_every_round_once(count: int) -> None:
    names = [f"contender{i}" for i in range(count)]
    for index in range(2 * count):
        assert sorted(order_of_round(names, index)) == names


def test_nobody_always_follows_the_same_neighbour() -> None:
    """Nor does anybody always come first."""
    names = ["a", "b", "c", "d"]
    orders = [order_of_round(names, index) for index in range(8)]
    assert {order[0] for order in orders} == set(names)
    followed = Counter((first, second) for order in orders for first, second in pairwise(order))
    for name in names:
        assert len([pair for pair in followed if pair[1] == name]) >= 2


def test_samples_are_kept_by_round() -> None:
    calls: list[tuple[str, int]] = []

    def measure(name: str, index: int) -> dict[str, float]:
        calls.append((name, index))
        return {"rate": index * (2.0 if name == "ours" else 1.0) + 1}

    samples = take_turns(["ours", "theirs"], 3, measure)
    assert sorted(calls) == [(name, index) for name in ("ours", "theirs") for index in range(3)]
    assert [sample["rate"] for sample in samples["ours"]] == [1, 3, 5]
    assert [sample["rate"] for sample in samples["theirs"]] == [1, 2, 3]


def test_ratios_are_within_rounds() -> None:
    """A machine that becomes ten times slower half way changes the rates, not the ratio."""
    ours = [{"rate": 20.0}, {"rate": 22.0}, {"rate": 2.0}]
    theirs = [{"rate": 10.0}, {"rate": 10.0}, {"rate": 1.0}]
    found = ratio(ours, theirs, "rate")
    assert (found.median, found.low, found.high, found.count) == (2.0, 2.0, 2.2, 3)


def test_nothing_is_not_zero() -> None:
    with pytest.raises(InvalidRequestError):
        summarise([])
