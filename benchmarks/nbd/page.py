"""The page about NBD in the documentation: tables and a picture, written from what was measured, and what people say.

Whatever stands below `REMARKS` on the page was written by hand, and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.common.table import to_markdown
from benchmarks.nbd import document
from benchmarks.nbd.plot import plot_ratios
from benchmarks.nbd.report import ratio_table, tables

__all__ = ["REMARKS", "write_page"]

REMARKS: Final = "## What these numbers say\n"


def write_page(found: Mapping[str, Any], directory: Path) -> None:
    """Write ``nbd.md``, and ``nbd.svg`` if there is something to draw with."""
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / "nbd.md"
    older = page.read_text() if page.exists() else ""
    remarks = older[older.index(REMARKS) :] if REMARKS in older else ""
    measured = document.measured_of(found)
    picture = plot_ratios(measured, directory / "nbd.svg")
    shown = [ratio_table(measured), *document.tables_of(found), *tables(measured)]
    body = [
        "# NBD: Silo beside nbdkit and qemu-nbd",
        "",
        "Written by `python -m benchmarks.nbd --write-docs`. How to read it: [README](README.md).",
        "",
        *(f"{line}  " for line in document.describe(found)),
        "",
        *(["![Ours divided by the better of the others](nbd.svg)", ""] if picture else []),
        *(to_markdown(table) for table in shown),
        *([remarks] if remarks else []),
    ]
    page.write_text("\n".join(body))
