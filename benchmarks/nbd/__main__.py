"""``python -m benchmarks.nbd``: our NBD server, nbdkit and qemu-nbd, taking turns under fio.

Every server runs all the time; only one of them has work. So nothing has to warm up between turns, and an idle
server costs nothing but its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from benchmarks.common.child import ListeningChild
from benchmarks.common.machine import describe_machine
from benchmarks.common.table import Table, print_table, to_markdown
from benchmarks.common.turns import Sample, take_turns
from benchmarks.nbd.contenders import CONTENDERS, Contender, Site
from benchmarks.nbd.fio import Cell, fill, run_cell
from benchmarks.nbd.plot import plot_ratios
from benchmarks.nbd.report import Measured, describe, ratio_table, tables, to_json
from benchmarks.nbd.rows import QUICK, ROWS, select
from benchmarks.nbd.tracking import tracking_table
from silo.settings import parse_duration, parse_size

TOOLS = ("nbdkit", "qemu-nbd", "fio")
DOCS = Path("docs/benchmarks")


def main() -> int:
    """Measure what the command line asks for."""
    options = _parse()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    console = Console(width=max(140, Console().width))
    if missing:
        console.print(f"missing: {', '.join(missing)} (Debian: apt-get install nbdkit qemu-utils fio)")
        return 1
    machine = describe_machine(TOOLS)
    measured: list[Measured] = []
    for transport in options.transports.split(","):
        for medium in options.media.split(","):
            contenders = _contenders(options, medium)
            with _running(options, transport, contenders) as servers:
                measured += [
                    _measure(options, console, cell, transport, medium, contenders, servers)
                    for cell in select(options.rows)
                ]
    load_after = os.getloadavg()
    lines = describe(machine, load_after, options.rounds, options.runtime_s)
    shown = [ratio_table(measured), *tables(measured)]
    if options.tracking:
        shown.insert(1, tracking_table(options.rounds))
    for line in lines:
        console.print(line)
    for table in shown:
        print_table(table, console)
    if options.json:
        document = to_json(machine, load_after, options.runtime_s, measured)
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    if options.write_docs:
        _write_docs(lines, shown, measured)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nbd", description=__doc__)
    add = parser.add_argument
    add(
        "--quick", action="store_true", help="a few rows, one transport, short runs: a smoke test, no numbers"
    )
    add("--rows", nargs="+", metavar="PATTERN", help=f"shell patterns of {', '.join(r.name for r in ROWS)}")
    add("--servers", nargs="+", metavar="NAME", help=f"some of {', '.join(c.name for c in CONTENDERS)}")
    add("--transports", metavar="LIST", help="unix,tcp")
    add("--media", default="memory,file", metavar="LIST", help="memory,file")
    add("--rounds", type=int, metavar="COUNT", help="alternations, 7 or more for numbers (7)")
    add("--runtime", metavar="DURATION", help="of each measurement (2s)")
    add("--size", default="1G", metavar="SIZE", help="of each export (1G)")
    add("--disk", default=None, metavar="DIR", help="where files are put (a temporary directory)")
    add("--json", metavar="FILE", help="write everything, samples included")
    add("--no-tracking", dest="tracking", action="store_false", help="leave out the cost of tracking")
    add("--write-docs", action="store_true", help=f"write {DOCS}/nbd.md, and a plot if matplotlib is there")
    options = parser.parse_args()
    quick = options.quick
    options.rows = options.rows or (QUICK if quick else ["*"])
    options.transports = options.transports or ("unix" if quick else "unix,tcp")
    options.rounds = options.rounds or (2 if quick else 7)
    options.runtime_s = parse_duration(options.runtime or ("0.5s" if quick else "2s"))
    options.size = parse_size(options.size)
    return options


def _contenders(options: argparse.Namespace, medium: str) -> list[Contender]:
    return [
        contender
        for contender in CONTENDERS
        if contender.medium == medium and (not options.servers or contender.name in options.servers)
    ]


@contextmanager
def _running(
    options: argparse.Namespace, transport: str, contenders: Sequence[Contender]
) -> Iterator[dict[str, ListeningChild]]:
    """All servers, started and written full once."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silo-bench-")))
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silo-bench-", dir=options.disk)))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silo-bench-", dir="/dev/shm")))
        site = Site(scratch, disk, memory, transport, options.size)
        servers = {}
        for contender in contenders:
            servers[contender.name] = stack.enter_context(contender.start(site))
            fill(servers[contender.name].uri(), options.size)
        yield servers


def _measure(
    options: argparse.Namespace,
    console: Console,
    cell: Cell,
    transport: str,
    medium: str,
    contenders: Sequence[Contender],
    servers: dict[str, ListeningChild],
) -> Measured:
    def measure(name: str, round_index: int) -> Sample:
        server = servers[name]
        server.check()
        seed = round_index + 1  # the same requests for everyone, others in every round
        return run_cell(cell, server.uri(), server.pid, options.size, options.runtime_s, seed)

    with console.status(f"{cell.name} over {transport}, {medium}"):
        samples = take_turns(list(servers), options.rounds, measure)
    return Measured(cell, transport, medium, contenders, samples)


def _write_docs(lines: Sequence[str], shown: Sequence[Table], measured: Sequence[Measured]) -> None:
    """The page about NBD: the same tables, and a picture of the ratios."""
    DOCS.mkdir(parents=True, exist_ok=True)
    picture = plot_ratios(measured, DOCS / "nbd.svg")
    body = [
        "# NBD: Silo beside nbdkit and qemu-nbd",
        "",
        "Written by `python -m benchmarks.nbd --write-docs`. How to read it: [README](README.md).",
        "",
        *(f"{line}  " for line in lines),
        "",
        *(["![Ours divided by the better of the others](nbd.svg)", ""] if picture else []),
        *(to_markdown(table) for table in shown),
    ]
    (DOCS / "nbd.md").write_text("\n".join(body))


if __name__ == "__main__":
    sys.exit(main())
