"""The page ``docs/benchmarks/migration.md``: what was measured, the tables, and whether the bars are reached."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.common.machine import Machine
from benchmarks.common.table import to_markdown
from benchmarks.common.turns import ratio, summarise
from benchmarks.migration.report import Measured, moved_ratio, tables

__all__ = ["page"]

HEAD = """# Migration

Written by `python -m benchmarks.migration --write-docs`; how to read it: [README](README.md). Median, with minimum and
maximum in brackets.
"""

METHOD = """## What is measured

Two real processes, a source and a target `Host`, are connected over loopback, by plain TCP where nothing else is said.
The disk is filled and, where that is said, stored before the clock starts. After the clock has stopped the target
compares every byte of the disk with what was written at the source; a run that does not agree has no number.
"""

EXPLAINED = {
    "bulk": """Incompressible bytes that only the source has, no store, memory to memory. Ours is
the time from the start of `migrate` until the source knows that the target has everything: connecting,
the TLS handshakes where there are any, a BLAKE3 digest of every chunk made and verified, the switchover
and its records on disk are inside. nbdcopy runs with its own defaults from one `nbdkit memory` to another
over plain TCP; starting and connecting is inside, no verification, no handover. CPU is that of all
processes that take part: two of ours, three of theirs. The three take turns.""",
    "downtime": """`MigrationReport.downtime_ms`: the source's clock, from before the workload is
suspended until TAKEN has arrived, without the time of the workload's own hooks (here there is no
workload). 64 MiB disk on a file, 32 MiB used and stored, 8 chunks dirty; store and register in a
directory on the same disk. CPU is that of the whole migration.""",
    "moved": """A 512 MiB disk in memory with 128 MiB used, half of it stored; a guest at the source
writes 200 whole chunks per second again while it moves. Counted is content: what the source has pushed,
on all lanes, and what the target has pulled from the store until it needed nothing more. Chunks written
again before they were sent for the first time need to move only once, so a ratio below 1 is possible.""",
    "evacuation": """Both disks in memory, with a store, 256 MiB written and not stored, the rest
never written: 16 GiB and 1 GiB. Time from the start of `migrate` until *evacuated*.""",
}

MISSING = """## Not measured

A real network and its round trips; disks on files at full rate; what a guest's reads and writes feel while its disk
moves; an S3 server as the register; memory. Guest load while the whole disk moves.
"""


def page(machine: Machine, measured: Measured) -> str:
    """The whole page."""
    where = (
        f"{machine.cores} × {machine.cpu}, {machine.memory_gib} GiB, Linux {machine.kernel}, "
        f"Python {machine.python}; {', '.join(machine.tools.values())}."
    )
    parts = [HEAD, where + "\n", METHOD]
    for part, explained in EXPLAINED.items():
        for table in tables(Measured().joined(_only(measured, part))):
            parts.append(to_markdown(table))
            parts.append(explained + "\n")
            parts += [f"{line}\n" for line in _verdicts(part, measured)]
            if part in measured.circumstances:
                parts.append(f"Measured with {measured.circumstances[part]}.\n")
    return "\n".join([*parts, MISSING])


def _only(measured: Measured, part: str) -> Measured:
    fields = {part: getattr(measured, part)}
    if part == "moved":
        fields["moved_scenario"] = measured.moved_scenario
    return Measured(**fields)


def _verdicts(part: str, measured: Measured) -> Iterator[str]:
    """Each bar, and which side of it the median is on."""
    if part == "bulk":
        rates = measured.bulk
        if {"silo", "nbdcopy"} <= rates.keys():
            found = ratio(rates["silo"], rates["nbdcopy"], "mb_s").median
            yield _verdict("silo ÷ nbdcopy", found, 0.8, at_least=True)
        if {"silo", "silo, TLS"} <= rates.keys():
            found = ratio(rates["silo, TLS"], rates["silo"], "mb_s").median
            yield _verdict("TLS ÷ plain", found, 0.5, at_least=True)
    elif part == "downtime":
        median = summarise([sample["downtime_ms"] for sample in measured.downtime]).median
        yield _verdict("downtime in ms", median, 10.0, at_least=False)
    elif part == "moved" and measured.moved_scenario is not None:
        scenario = measured.moved_scenario
        median = summarise([moved_ratio(sample, scenario) for sample in measured.moved]).median
        yield _verdict("moved ÷ (used + written again)", median, 1.1, at_least=False)
    elif part == "evacuation":
        found = ratio(measured.evacuation["large"], measured.evacuation["small"], "evacuated_ms").median
        yield _verdict("large ÷ small", found, 1.2, at_least=False)


def _verdict(what: str, found: float, bar: float, *, at_least: bool) -> str:
    reached = found >= bar if at_least else found <= bar
    limit = "at least" if at_least else "at most"
    return f"Bar: {what} {limit} {bar:g}. Found {found:.2f}: {'reached' if reached else '**not reached**'}."
