"""Runs of neighbouring payloads."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from silo.sync.runs import Run, plan_runs

spans = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(1, 60)), max_size=30, unique_by=lambda span: span[0]
)


def test_neighbours_share_a_request() -> None:
    """Back to back, across a small gap, and not across a large one; the order given does not matter."""
    found = plan_runs([(300, 10), (0, 10), (10, 20), (35, 5)], gap=5, size=100)
    assert found == [Run(0, 40, (1, 2, 3)), Run(300, 310, (0,))]


def test_a_run_ends_at_its_size() -> None:
    assert plan_runs([(0, 40), (40, 40), (80, 40)], gap=0, size=100) == [
        Run(0, 80, (0, 1)),
        Run(80, 120, (2,)),
    ]
    assert plan_runs([(0, 400)], gap=0, size=100) == [Run(0, 400, (0,))]
    assert plan_runs([], gap=0, size=100) == []


@given(spans, st.integers(0, 50), st.integers(1, 300))
def test_every_span_lies_in_exactly_one_run(spans: list[tuple[int, int]], gap: int, size: int) -> None:
    """Nothing is lost, nothing is fetched twice, and no run is longer than allowed."""
    runs = plan_runs(spans, gap=gap, size=size)
    assert sorted(member for run in runs for member in run.members) == list(range(len(spans)))
    for run in runs:
        assert len(run.members) == 1 or run.size <= size
        for member in run.members:
            offset, length = spans[member]
            assert run.start <= offset
            assert offset + length <= run.end
