"""``python -m benchmarks.migration``: groups that move between two processes, and nbdcopy beside them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import attrs
from rich.console import Console

from benchmarks.common.machine import describe_machine
from benchmarks.common.table import print_table
from benchmarks.common.turns import Sample, take_turns
from benchmarks.migration.document import page
from benchmarks.migration.pair import migrate_once
from benchmarks.migration.report import Measured, tables
from benchmarks.migration.rival import copy_once
from benchmarks.migration.scenarios import bulk, downtime, evacuation, moved
from silo.settings import parse_size

PARTS = ("bulk", "downtime", "moved", "evacuation")
TOOLS = ("nbdkit", "nbdcopy")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "benchmarks" / "migration.md"


def main() -> int:
    """Measure what the command line asks for."""
    options = _parse()
    console = Console()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing and "bulk" in options.parts:
        console.print(f"missing: {', '.join(missing)} (Debian: apt-get install nbdkit libnbd-bin)")
        return 1
    machine = describe_machine(TOOLS)
    console.print(
        f"{machine.cores} × {machine.cpu}, {machine.memory_gib} GiB, Linux {machine.kernel}, "
        f"Python {machine.python}; {', '.join(machine.tools.values())}. Median, with minimum and maximum in brackets."
    )
    measured = _read(options.json)
    for part in options.parts:  # each is shown when it is there: a run that is stopped was not for nothing
        load = os.getloadavg()[0]
        found = attrs.evolve(
            _measure(part, options),
            circumstances={part: f"{options.rounds} rounds, load average {load:.1f} at the start"},
        )
        for table in tables(found):
            print_table(table, console)
        console.print(f"Load average {load:.1f} → {os.getloadavg()[0]:.1f}.\n")
        measured = measured.joined(found)
        if options.json:
            document = {"machine": attrs.asdict(machine), **attrs.asdict(measured)}
            Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    if options.write_docs:
        DOCS.write_text(page(machine, measured))
    return 0


def _read(file: str | None) -> Measured:
    """The parts that earlier runs have left in the file."""
    if file is None or not Path(file).exists():
        return Measured()
    return Measured.from_dict(json.loads(Path(file).read_text()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.migration", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="few and small runs: a smoke test, no numbers worth quoting")
    add(
        "--parts", nargs="*", default=PARTS, choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}"
    )
    add("--rounds", type=int, metavar="COUNT", help="alternations; downtime takes two runs more (7)")
    add("--size", metavar="SIZE", help="of the disk that moves as a whole (256M)")
    add("--disk", type=Path, metavar="DIR", help="for state, stores and images (a temporary directory)")
    add("--json", metavar="FILE", help="write everything, samples included; parts that are there are kept")
    add("--write-docs", action="store_true", help=f"write {DOCS.relative_to(ROOT)}")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.size = parse_size(options.size or ("32M" if options.quick else "256M"))
    return options


def _measure(part: str, options: argparse.Namespace) -> Measured:
    rounds, disk = options.rounds, options.disk
    if part == "bulk":
        whole = {"silo": bulk(options.size), "silo, TLS": bulk(options.size, tls=True)}

        def one_bulk(name: str, _round: int) -> Sample:
            return copy_once(whole["silo"]) if name == "nbdcopy" else migrate_once(whole[name], disk)

        return Measured(bulk=take_turns((*whole, "nbdcopy"), rounds, one_bulk))
    if part == "downtime":
        return Measured(downtime=[migrate_once(downtime(), disk) for _ in range(rounds + 2)])
    if part == "moved":
        scenario = moved()
        return Measured(
            moved=[migrate_once(scenario, disk) for _ in range(min(rounds, 3))], moved_scenario=scenario
        )
    sparse = {name: evacuation(large=name == "large", quick=options.quick) for name in ("small", "large")}

    def one_evacuation(name: str, _round: int) -> Sample:
        return migrate_once(sparse[name], disk)

    return Measured(evacuation=take_turns(tuple(sparse), rounds, one_evacuation))


if __name__ == "__main__":
    sys.exit(main())
