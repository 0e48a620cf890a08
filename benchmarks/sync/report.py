"""From samples to tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.common.table import Table
from benchmarks.common.turns import Sample, Summary, ratio, summarise

__all__ = ["cut_table", "whole_table"]


def whole_table(samples: Mapping[str, Sequence[Sample]]) -> Table:
    """``silo`` and ``bare``: a whole disk to the store."""
    rows = [
        (name, _spread(_of(taken, "mb_s"), 0), _spread(_of(taken, "cpu_s_per_gib"), 2))
        for name, taken in samples.items()
    ]
    rate = ratio(samples["silo"], samples["bare"], "mb_s")
    cpu = ratio(samples["silo"], samples["bare"], "cpu_s_per_gib")
    rows.append(("silo ÷ bare", _spread(rate, 2), _spread(cpu, 2)))
    return Table("A whole disk to a store in a directory", ("", "MB/s", "CPU s/GiB"), rows)


def cut_table(samples: Sequence[Sample], dirty_chunks: int) -> Table:
    """Steady cuts."""
    rows = [
        ("PUTs per cut", _spread(_of(samples, "puts"), 0)),
        ("bytes PUT ÷ bytes of dirty chunks", _spread(_of(samples, "put_ratio"), 3)),
        ("cut to commit, ms", _spread(_of(samples, "cut_ms"), 0)),
    ]
    return Table(f"Steady cuts of {dirty_chunks} dirty chunks", ("", "median [range]"), rows)


def _of(samples: Sequence[Sample], quantity: str) -> Summary:
    return summarise([sample[quantity] for sample in samples])


def _spread(summary: Summary, digits: int) -> str:
    return f"{summary.median:.{digits}f} [{summary.low:.{digits}f}-{summary.high:.{digits}f}]"
