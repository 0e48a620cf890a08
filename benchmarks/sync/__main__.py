"""``python -m benchmarks.sync``: what sync and restore cost, beside the bare store client and other layouts."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
from rich.console import Console

from benchmarks.common.machine import Machine, describe_machine
from benchmarks.common.table import Table, print_table, to_markdown
from benchmarks.common.turns import Sample, take_turns
from benchmarks.sync.deltas import run_model
from benchmarks.sync.guest import guest_latency
from benchmarks.sync.layouts import run_layouts
from benchmarks.sync.measure import cut_once, noise, put_bare, sync_whole
from benchmarks.sync.plot import plot_layouts
from benchmarks.sync.reading import first_byte_trips, lazy_reads
from benchmarks.sync.report import Measured, tables
from benchmarks.sync.stores import Opener, open_directory, s3_server
from benchmarks.sync.traces import RANDOM
from silo.settings import parse_size

PARTS = ("whole", "steady", "granularity", "reading", "guest")
DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
DIRTY_CHUNKS = 128
MIB = 1 << 20
CHAINS = {"whole chunks": 0, "1": 1, "2": 2, "4": 4, "8": 8, "without bound": 1 << 30}


def main() -> int:
    """Measure what the command line asks for."""
    options = _parse()
    console = Console()
    machine = describe_machine(())
    measured = Measured()
    with ExitStack() as stack:
        open_bucket = stack.enter_context(s3_server()) if {"whole", "reading"} & set(options.parts) else None
        for part in options.parts:
            _measure(part, options, measured, open_bucket)
    about = _about(machine)
    console.print(about)
    shown = tables(measured)
    for table in shown:
        print_table(table, console)
    if options.json:
        document = {"machine": attrs.asdict(machine), **attrs.asdict(measured)}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    if options.write_docs:
        write_docs(about, shown, measured, DOCS)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="few and small runs: a smoke test, no numbers worth quoting")
    add(
        "--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}"
    )
    add("--rounds", type=int, metavar="COUNT", help="alternations, and steady cuts (7)")
    add("--size", metavar="SIZE", help="of the disk that is stored whole (256M)")
    add("--disk", type=Path, metavar="DIR", help="where stores and state are put (a temporary directory)")
    add("--json", metavar="FILE", help="write everything, samples included")
    add("--write-docs", action="store_true", help=f"write {DOCS}/sync.md, and a plot if matplotlib is there")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.size = parse_size(options.size or ("32M" if options.quick else "256M"))
    return options


def _measure(part: str, options: argparse.Namespace, measured: Measured, open_bucket: Opener | None) -> None:
    rounds, disk, quick = options.rounds, options.disk, options.quick
    if part == "whole":
        content = noise(options.size, 1)
        media = {"a store in a directory": open_directory} | (
            {"an S3 server": open_bucket} if open_bucket else {}
        )
        for medium, open_store in media.items():

            def one(name: str, _round: int, open_store: Opener = open_store) -> Sample:
                return (sync_whole if name == "silo" else put_bare)(open_store, content, disk)

            measured.whole[medium] = take_turns(("silo", "bare"), rounds, one)
    elif part == "steady":
        size = min(options.size, 64 * MIB)
        measured.steady = cut_once(open_directory, size, DIRTY_CHUNKS, rounds, 1, disk)
        measured.dirty_chunks = DIRTY_CHUNKS
    elif part == "granularity":
        size, writes = (32 * MIB, 64) if quick else (256 * MIB, 512)
        measured.layouts, measured.restores = run_layouts(size, writes, 2 if quick else 5, disk)
        measured.deltas = {
            kind: {
                name: run_model(
                    kind, chain=chain, writes=writes, size=size, cuts=20 if quick else 120, seed=1
                )
                for name, chain in CHAINS.items()
            }
            for kind in RANDOM
        }
    elif part == "reading" and open_bucket is not None:
        measured.lazy = lazy_reads(open_bucket, 64 * MIB, 5 if quick else 30, rounds, disk)
        measured.trips = first_byte_trips(disk)
    elif part == "guest" and shutil.which("fio") is not None:
        measured.guest = guest_latency(rounds, 0.5 if quick else 2.0, disk)


def _about(machine: Machine) -> str:
    return (
        f"{machine.cores} × {machine.cpu}, {machine.memory_gib} GiB, Linux {machine.kernel}, Python {machine.python}. "
        f"Load average {machine.load[0]:.1f} → {os.getloadavg()[0]:.1f}. Median, with minimum and maximum in brackets."
    )


NOTES = "## What the tables say, and what they do not"
"""From here on the page is written by hand, and stays."""


def write_docs(about: str, shown: Sequence[Table], measured: Measured, directory: Path) -> None:
    """The page about sync: the tables of this run and a picture, above what stands there about them."""
    page = directory / "sync.md"
    _, _, notes = page.read_text().partition(NOTES) if page.exists() else ("", "", "\n")
    picture = plot_layouts(measured.layouts, directory / "sync.svg")
    body = [
        "# Sync",
        "",
        "Written by `python -m benchmarks.sync --write-docs`. How to read it: [README](README.md).",
        "",
        about,
        "",
        *(["![Bytes and requests of several layouts](sync.svg)", ""] if picture else []),
        *(to_markdown(table) for table in shown),
    ]
    page.write_text("\n".join(body) + "\n" + NOTES + notes)


if __name__ == "__main__":
    sys.exit(main())
