"""From samples to what people read: tables for the terminal and the documentation, a document for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from benchmarks.common.table import Table
from benchmarks.common.turns import Sample, Summary, ratio, summarise
from benchmarks.nbd.contenders import Contender
from benchmarks.nbd.fio import Cell

__all__ = ["Measured", "best_ratio", "ratio_table", "row_of", "tables"]

MIB_ROWS_FROM = 64 * 1024
"""From this request size on a row is told in MiB/s, below in thousands of requests per second."""
QUANTITIES = ("iops", "mib_s", "p50_us", "p99_us", "cpu_us", "others_cpu")


@attrs.frozen
class Measured:
    """One row over one transport on one medium: the samples of every contender, by round."""

    cell: Cell
    transport: str
    medium: str
    contenders: Sequence[Contender]
    samples: Mapping[str, Sequence[Sample]]

    def rivals(self) -> list[str]:
        """The servers of others."""
        return [contender.name for contender in self.contenders if not contender.ours]

    def ours(self) -> list[str]:
        """Our servers."""
        return [contender.name for contender in self.contenders if contender.ours]

    def summary(self, name: str, quantity: str) -> Summary:
        """One quantity of one contender over all rounds."""
        return summarise([sample[quantity] for sample in self.samples[name]])


def best_ratio(measured: Measured, name: str) -> tuple[str, Summary] | None:
    """The strongest rival of one of ours, and ours ÷ theirs in requests per second; None without rivals."""
    ratios = [
        (rival, ratio(measured.samples[name], measured.samples[rival], "iops")) for rival in measured.rivals()
    ]
    return min(ratios, key=lambda pair: pair[1].median) if ratios else None


def _rate(cell: Cell, summary: Summary, mib: Summary) -> str:
    if cell.request_size >= MIB_ROWS_FROM:
        return f"{mib.median:.0f} MiB/s [{mib.low:.0f}-{mib.high:.0f}]"
    thousands = summary.scaled(1e-3)
    return f"{thousands.median:.1f}k/s [{thousands.low:.1f}-{thousands.high:.1f}]"


def ratio_table(measured: Sequence[Measured]) -> Table:
    """Ours ÷ the better of the others, per row."""
    rows = []
    for one in measured:
        for name in one.ours():
            found = best_ratio(one, name)
            if found is not None:
                rival, summary = found
                rows.append(
                    (
                        f"{one.cell.name} {one.transport} {name}",
                        f"{summary.median:.2f}",
                        f"[{summary.low:.2f}-{summary.high:.2f}]",
                        rival,
                        f"{_cpu_ratio(one, name, rival):.2f}",
                    )
                )
    headings = ("row", "ours ÷ best", "range", "best", "CPU per request, ours ÷ theirs")
    return Table("Ratios", headings, rows)


def _cpu_ratio(measured: Measured, name: str, rival: str) -> float:
    return ratio(measured.samples[name], measured.samples[rival], "cpu_us").median


def tables(measured: Sequence[Measured]) -> list[Table]:
    """One table per medium and transport with everything that was measured."""
    found: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for one in measured:
        rows = found.setdefault((one.medium, one.transport), [])
        for contender in one.contenders:
            name = contender.name
            rows.append(
                (
                    f"{one.cell.name} {name}",
                    _rate(one.cell, one.summary(name, "iops"), one.summary(name, "mib_s")),
                    f"{one.summary(name, 'p50_us').median:.0f}",
                    f"{one.summary(name, 'p99_us').median:.0f}",
                    f"{one.summary(name, 'cpu_us').median:.1f}",
                    f"{one.summary(name, 'others_cpu').median:.0%}",
                )
            )
    headings = ("row and server", "rate", "p50 µs", "p99 µs", "server CPU µs/request", "CPU of others")
    return [
        Table(f"{medium} over {transport}", headings, rows) for (medium, transport), rows in found.items()
    ]


def row_of(one: Measured) -> dict[str, Any]:
    """Everything about a row, samples included, for other programs."""
    return {
        "row": one.cell.name,
        "transport": one.transport,
        "medium": one.medium,
        "samples": {name: [dict(sample) for sample in samples] for name, samples in one.samples.items()},
        "median": {
            name: {quantity: one.summary(name, quantity).median for quantity in QUANTITIES}
            for name in one.samples
        },
        "ours_over_best": {
            name: {"rival": found[0], **attrs.asdict(found[1])}
            for name in one.ours()
            if (found := best_ratio(one, name)) is not None
        },
    }
