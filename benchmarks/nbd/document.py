"""What was measured, as a document: written by one run or put together from many, and read again to be shown.

All rows together take longer than a machine can often be had alone. So a run may measure some rows and add them
to what earlier runs have found; a row that is measured again replaces its older self. Every part says under which
load and with how many rounds it was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks.common.machine import Machine
from benchmarks.common.table import Table
from benchmarks.nbd.contenders import CONTENDERS, TRANSPORTS
from benchmarks.nbd.report import Measured
from benchmarks.nbd.rows import ROWS

__all__ = ["as_dict", "describe", "joined", "load", "measured_of", "save", "tables_of"]

MEDIA = ("memory", "file")


def load(path: Path) -> dict[str, Any]:
    """The document at ``path``; an empty one when there is none."""
    if not path.exists():
        return {}
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def save(document: Mapping[str, Any], path: Path) -> None:
    """Write the document, for `load` and for other programs."""
    path.write_text(json.dumps(document, indent=1) + "\n")


def joined(older: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """Both together; where they have measured the same, the newer one counts."""
    rows = {_key(row): row for document in (older, newer) for row in document.get("rows", ())}
    tables = {table["title"]: table for document in (older, newer) for table in document.get("tables", ())}
    return {**older, **newer, "rows": list(rows.values()), "tables": list(tables.values())}


def _key(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """What a row is about, in the order of the report."""
    names = [cell.name for cell in ROWS]
    return MEDIA.index(row["medium"]), TRANSPORTS.index(row["transport"]), names.index(row["row"])


def measured_of(document: Mapping[str, Any]) -> list[Measured]:
    """The rows, in the order of the report."""
    found = []
    for row in sorted(document.get("rows", ()), key=_key):
        contenders = [contender for contender in CONTENDERS if contender.name in row["samples"]]
        cell = next(cell for cell in ROWS if cell.name == row["row"])
        found.append(Measured(cell, row["transport"], row["medium"], contenders, row["samples"]))
    return found


def tables_of(document: Mapping[str, Any]) -> list[Table]:
    """What was measured apart from the rows."""
    return [Table(**table) for table in document.get("tables", ())]


def describe(document: Mapping[str, Any]) -> list[str]:
    """The lines that stand above every table."""
    machine = Machine(**document["machine"])
    rows = document.get("rows", ())
    rounds = _span([len(samples) for row in rows for samples in row["samples"].values()])
    runtimes = _span([row["runtime_s"] for row in rows])
    loads = [load for row in rows for load in row["load"]]
    lines = [
        f"{machine.cores} × {machine.cpu}, {machine.memory_gib} GiB, Linux {machine.kernel}, "
        f"Python {machine.python}; {', '.join(machine.tools.values())}.",
    ]
    if rows:
        priority = sorted({row["priority"] for row in rows})
        lines.append(
            f"{rounds} rounds of {runtimes} s per cell, contenders taking turns, servers and clients at nice "
            f"{_span(priority)}; load average {min(loads):.1f} to {max(loads):.1f}. "
            "Median, with minimum and maximum in brackets."
        )
    return lines


def _span(values: Sequence[float]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def as_dict(table: Table) -> dict[str, Any]:
    """A table for the document."""
    return attrs.asdict(table)
