"""Measuring several contenders on a machine that does not hold still.

Frequency scaling, other tenants and the page cache drift over minutes, and by more than the differences that
we want to see. So contenders are never measured one after the other: they take turns, one short measurement
each per round, and every round begins with another contender, so that no one always runs right after the
same neighbour. What is compared is one contender with another *within a round*, where the machine was nearly the
same for both; the ratio that is reported is the median of these, with the smallest and the largest beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import attrs

from silo.errors import InvalidRequestError

__all__ = ["Summary", "order_of_round", "ratio", "summarise", "take_turns"]

Sample = Mapping[str, float]
"""What one measurement yields: quantity to value."""


@attrs.frozen
class Summary:
    """The middle of several values, and how far they lie apart."""

    median: float
    low: float
    high: float
    count: int

    def scaled(self, factor: float) -> Summary:
        """The same in another unit."""
        return Summary(self.median * factor, self.low * factor, self.high * factor, self.count)


def summarise(values: Sequence[float]) -> Summary:
    """Median, minimum and maximum. Refuses an empty list: an absent number must not look like a zero."""
    if not values:
        raise InvalidRequestError("there is nothing to summarise")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def order_of_round(contenders: Sequence[str], round_index: int) -> list[str]:
    """Who is measured when: one circle, forwards and then backwards, entered a place further on after every pair."""
    start = round_index // 2 % len(contenders)
    order = [*contenders[start:], *contenders[:start]]
    return order[::-1] if round_index % 2 else order


def take_turns(
    contenders: Sequence[str], rounds: int, measure: Callable[[str, int], Sample]
) -> dict[str, list[Sample]]:
    """Call ``measure(contender, round_index)`` for everyone in every round; the samples of each, by round."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for round_index in range(rounds):
        for name in order_of_round(contenders, round_index):
            samples[name].append(measure(name, round_index))
    return samples


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample], quantity: str) -> Summary:
    """``ours / theirs`` of one quantity, round by round, summarised."""
    return summarise([a[quantity] / b[quantity] for a, b in zip(ours, theirs, strict=True)])
