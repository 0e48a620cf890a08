"""``python -m benchmarks.sync``: how fast a disk is stored, beside the bare store client; what a steady cut PUTs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import attrs
from rich.console import Console

from benchmarks.common.machine import describe_machine
from benchmarks.common.table import print_table
from benchmarks.common.turns import Sample, take_turns
from benchmarks.sync.measure import cut_once, put_bare, sync_whole
from benchmarks.sync.report import cut_table, whole_table
from silo.settings import parse_size

DIRTY_CHUNKS = 128


def main() -> int:
    """Measure what the command line asks for."""
    options = _parse()
    console = Console()
    machine = describe_machine(())

    def whole(name: str, round_index: int) -> Sample:
        measure = sync_whole if name == "silo" else put_bare
        return measure(options.size, round_index + 1, options.disk)

    samples = take_turns(("silo", "bare"), options.rounds, whole)
    steady = cut_once(min(options.size, 64 << 20), DIRTY_CHUNKS, options.rounds, 1, options.disk)
    console.print(
        f"{machine.cores} × {machine.cpu}, {machine.memory_gib} GiB, Linux {machine.kernel}, Python {machine.python}. "
        f"Load average {machine.load[0]:.1f} → {os.getloadavg()[0]:.1f}. Median, with minimum and maximum in brackets."
    )
    for table in (whole_table(samples), cut_table(steady, DIRTY_CHUNKS)):
        print_table(table, console)
    if options.json:
        document = {"machine": attrs.asdict(machine), "whole": samples, "steady": steady}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="few and small runs: a smoke test, no numbers worth quoting")
    add("--rounds", type=int, metavar="COUNT", help="alternations, and steady cuts (7)")
    add("--size", metavar="SIZE", help="of the disk (256M)")
    add("--disk", type=Path, metavar="DIR", help="where the stores are put (a temporary directory)")
    add("--json", metavar="FILE", help="write everything, samples included")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.size = parse_size(options.size or ("32M" if options.quick else "256M"))
    return options


if __name__ == "__main__":
    sys.exit(main())
