"""``python -m benchmarks``, which is ``make bench``: every benchmark in turn, small enough to end within ten minutes.

Each one is a program of its own, so that none finds memory, threads or caches that another has left; only the
tables come together here. For numbers worth quoting run them one by one on a machine that does nothing else: see
docs/benchmarks/README.md. A benchmark that fails does not keep the others from running, but the status tells.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

from benchmarks.common.table import Table, print_table
from benchmarks.nbd.tracking import tracking_table

__all__ = ["BUDGET_S", "NAMES", "PROGRAMS", "Program", "command_of", "main", "run"]

BUDGET_S = 590.0
"""For everything together. A benchmark that wants more than what the others have left is ended."""


@attrs.frozen
class Program:
    """What is run for a benchmark, and what is added for a smoke test."""

    module: str
    arguments: Sequence[str]
    quick: Sequence[str]


PROGRAMS: Mapping[str, Program] = {
    "nbd": Program("benchmarks.nbd", ("--quick", "--no-tracking"), ("--media", "memory")),
    "migration": Program("benchmarks.migration", ("--rounds", "5"), ("--rounds", "2", "--quick")),
    "sync": Program("benchmarks.sync", (), ("--quick",)),
}
NAMES = ("nbd", "tracking", "migration", "sync")
"""In the order in which they run. Tracking needs no other process, so it is measured in this one."""


def command_of(program: Program, *, quick: bool, document: Path) -> list[str]:
    """The command line of a program that writes its samples to ``document``."""
    added = program.quick if quick else ()
    return [sys.executable, "-m", program.module, *program.arguments, *added, "--json", str(document)]


def main() -> int:
    """Run what the command line asks for; 1 when any of it failed."""
    options = _parse()
    console = Console()
    documents: dict[str, Any] = {}
    failed: list[str] = []
    deadline = time.monotonic() + BUDGET_S
    for name in options.only:
        console.rule(name)
        if name == "tracking":
            table = tracking_table(2 if options.quick else 7)
            print_table(table, console)
            documents[name] = _rows_of(table)
            continue
        document = run(PROGRAMS[name], quick=options.quick, timeout_s=deadline - time.monotonic())
        if document is None:
            failed.append(name)
        else:
            documents[name] = document
    if options.json:
        Path(options.json).write_text(json.dumps(documents, indent=1) + "\n")
    if failed:
        console.print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help=f"some of {', '.join(NAMES)}")
    add("--quick", action="store_true", help="do they run at all; prints no numbers worth quoting")
    add("--json", metavar="FILE", help="write everything, samples included")
    return parser.parse_args()


def run(program: Program, *, quick: bool, timeout_s: float) -> Any:
    """The document of a program that prints its own tables; ``None`` when it failed or took too long."""
    with tempfile.TemporaryDirectory(prefix="silo-bench-") as scratch:
        document = Path(scratch) / "samples.json"
        command = command_of(program, quick=quick, document=document)
        with subprocess.Popen(command, start_new_session=True) as child:
            try:
                child.wait(max(0.0, timeout_s))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)  # its servers and clients, too
        return json.loads(document.read_text()) if child.returncode == 0 else None


def _rows_of(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.headings, row, strict=True)) for row in table.rows]


if __name__ == "__main__":
    sys.exit(main())
