"""``python -m benchmarks.nbd``: our NBD server, nbdkit and qemu-nbd, taking turns under fio.

Every server runs all the time; only one of them has work. So nothing has to warm up between turns, and an idle
server costs nothing but its memory. All rows take most of an hour; with ``--add`` they can be measured in pieces that
go into one document, and ``--from`` shows it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

from benchmarks.common.child import ListeningChild
from benchmarks.common.machine import describe_machine
from benchmarks.common.table import print_table
from benchmarks.common.turns import Sample, take_turns
from benchmarks.nbd import document
from benchmarks.nbd.contenders import CONTENDERS, TRANSPORTS, Contender, Site, make_certificates
from benchmarks.nbd.fio import Cell, fill, run_cell
from benchmarks.nbd.held import held_table
from benchmarks.nbd.page import write_page
from benchmarks.nbd.report import Measured, ratio_table, row_of, tables
from benchmarks.nbd.rows import QUICK, ROWS, TLS, select
from benchmarks.nbd.tracking import tracking_table
from silo.settings import parse_duration, parse_size

TOOLS = ("nbdkit", "qemu-nbd", "fio")
DOCS = Path("docs/benchmarks")


def main() -> int:
    """Measure what the command line asks for, or show what was measured before."""
    options = _parse()
    console = Console(width=max(140, Console().width))
    if options.shown:
        found = document.load(Path(options.shown))
    else:
        missing = [tool for tool in (*TOOLS, "openssl") if shutil.which(tool) is None]
        if missing:
            console.print(
                f"missing: {', '.join(missing)} (Debian: apt-get install nbdkit qemu-utils fio openssl)"
            )
            return 1
        found = _measure_all(options, console)
        if options.json:
            path = Path(options.json)
            found = document.joined(document.load(path), found) if options.add else found
            document.save(found, path)
    measured = document.measured_of(found)
    for line in document.describe(found):
        console.print(line)
    for table in (ratio_table(measured), *document.tables_of(found), *tables(measured)):
        print_table(table, console)
    if options.write_docs:
        write_page(found, DOCS)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nbd", description=__doc__)
    add = parser.add_argument
    add(
        "--quick", action="store_true", help="a few rows, one transport, short runs: a smoke test, no numbers"
    )
    add("--rows", nargs="+", metavar="PATTERN", help=f"shell patterns of {', '.join(r.name for r in ROWS)}")
    add("--servers", nargs="+", metavar="NAME", help=f"some of {', '.join(c.name for c in CONTENDERS)}")
    add("--transports", metavar="LIST", help=",".join(TRANSPORTS))
    add("--media", default="memory,file", metavar="LIST", help="memory,file")
    add("--rounds", type=int, metavar="COUNT", help="alternations, 7 or more for numbers (7)")
    add("--runtime", metavar="DURATION", help="of each measurement (1s)")
    add("--size", default="1G", metavar="SIZE", help="of each export (1G)")
    add("--disk", default=None, metavar="DIR", help="where files are put (a temporary directory)")
    add(
        "--nice",
        type=int,
        default=0,
        metavar="N",
        help="of servers and clients; -20 keeps the rest of a machine out",
    )
    add("--no-tracking", dest="tracking", action="store_false", help="leave out the cost of tracking")
    add("--no-held", dest="held", action="store_false", help="leave out the server's memory under load")
    add("--json", metavar="FILE", help="write everything, samples included")
    add("--add", action="store_true", help="to what the file of --json holds already")
    add("--from", dest="shown", metavar="FILE", help="measure nothing, show what such a file holds")
    add("--write-docs", action="store_true", help=f"write {DOCS}/nbd.md, and a plot if matplotlib is there")
    options = parser.parse_args()
    quick = options.quick
    options.rows = options.rows or (QUICK if quick else ["*"])
    options.transports = (options.transports or ("unix" if quick else ",".join(TRANSPORTS))).split(",")
    options.media = [medium for medium in options.media.split(",") if medium]
    options.rounds = options.rounds or (2 if quick else 7)
    options.runtime_s = parse_duration(options.runtime or ("0.5s" if quick else "1s"))
    options.size = parse_size(options.size)
    return options


def _measure_all(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.nice:
        os.setpriority(os.PRIO_PROCESS, 0, options.nice)  # children inherit it
    machine = describe_machine(TOOLS)
    rows: list[dict[str, Any]] = []
    for transport in options.transports:
        for medium in options.media if transport != "tls" else [m for m in options.media if m == "memory"]:
            contenders = _contenders(options, transport, medium)
            cells = select(options.rows, TLS if transport == "tls" else ROWS)
            if not cells or not contenders:
                continue
            with _running(options, transport, contenders) as (site, servers):
                for cell in cells:
                    load = os.getloadavg()[0]
                    one = _measure(options, console, cell, site, medium, contenders, servers)
                    load_after = os.getloadavg()[0]
                    facts = {
                        "runtime_s": options.runtime_s,
                        "priority": options.nice,
                        "load": [load, load_after],
                    }
                    rows.append({**row_of(one), **facts})
    shown = []
    if options.tracking:
        shown.append(tracking_table(options.rounds))
    if options.held:
        contenders = [c for c in _contenders(options, "unix", "file") if c.name != "qemu-nbd-file"]
        with _running(options, "unix", contenders) as (site, servers):
            held = [(name, server, site.client(server)) for name, server in servers.items()]
            shown.append(held_table(held, options.size, options.runtime_s))
    return {
        "machine": attrs.asdict(machine),
        "rows": rows,
        "tables": [document.as_dict(table) for table in shown],
    }


def _contenders(options: argparse.Namespace, transport: str, medium: str) -> list[Contender]:
    return [
        contender
        for contender in CONTENDERS
        if contender.medium == medium
        and (contender.maps or transport == "unix")  # what maps cost does not depend on the transport
        and (not options.servers or contender.name in options.servers)
    ]


@contextmanager
def _running(
    options: argparse.Namespace, transport: str, contenders: Sequence[Contender]
) -> Iterator[tuple[Site, dict[str, ListeningChild]]]:
    """All servers, started and written full once."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silo-bench-")))
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silo-bench-", dir=options.disk)))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silo-bench-", dir="/dev/shm")))
        site = Site(scratch, disk, memory, transport, options.size)
        make_certificates(site)
        servers = {}
        for contender in contenders:
            servers[contender.name] = stack.enter_context(contender.start(site))
            fill(site.client(servers[contender.name]), options.size)
        yield site, servers


def _measure(
    options: argparse.Namespace,
    console: Console,
    cell: Cell,
    site: Site,
    medium: str,
    contenders: Sequence[Contender],
    servers: dict[str, ListeningChild],
) -> Measured:
    def measure(name: str, round_index: int) -> Sample:
        server = servers[name]
        server.check()
        seed = round_index + 1  # the same requests for everyone, others in every round
        return run_cell(cell, site.client(server), server.pid, options.size, options.runtime_s, seed)

    with console.status(f"{cell.name} over {site.transport}, {medium}"):
        samples = take_turns(list(servers), options.rounds, measure)
    return Measured(cell, site.transport, medium, contenders, samples)


if __name__ == "__main__":
    sys.exit(main())
