"""From samples to tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from benchmarks.common.table import Table
from benchmarks.common.turns import Sample, Summary, ratio, summarise
from benchmarks.sync.deltas import Outcome
from benchmarks.sync.layouts import Layout, Restored

__all__ = ["Measured", "cut_table", "layout_table", "tables", "whole_table"]

CUTS_PER_MONTH = 30 * 24 * 360
"""At one cut every ten seconds."""

PUT_PRICE = 0.005 / 1000
"""Dollars, as most S3 providers ask."""

TIB = 1 << 40
RAM_PER_CHUNK = 9
"""One byte of state, two counters of heat; see silo/chunkmap.py and silo/heatmap.py."""
SLOT = 56


@attrs.define
class Measured:
    """Everything that a run has found; what was not asked for stays empty."""

    whole: dict[str, dict[str, list[Sample]]] = attrs.field(factory=dict)
    """By medium, then ``silo`` and ``bare``."""
    steady: list[Sample] = attrs.field(factory=list)
    dirty_chunks: int = 0
    layouts: list[Layout] = attrs.field(factory=list)
    restores: list[Restored] = attrs.field(factory=list)
    deltas: dict[str, dict[str, Outcome]] = attrs.field(factory=dict)
    """By workload, then by what bounds the chain."""
    lazy: dict[str, list[Sample]] = attrs.field(factory=dict)
    trips: Sample = attrs.field(factory=dict)
    guest: dict[str, list[Sample]] = attrs.field(factory=dict)


def tables(measured: Measured) -> list[Table]:
    """What there is, as tables."""
    found = [whole_table(medium, samples) for medium, samples in measured.whole.items()]
    if measured.steady:
        found.append(cut_table(measured.steady, measured.dirty_chunks))
    if measured.layouts:
        found += [
            layout_table(measured.layouts),
            _chunk_table(measured.layouts, measured.restores),
            _delta_table(measured.deltas),
        ]
    if measured.lazy:
        found.append(_reading_table(measured.lazy, measured.trips))
    if measured.guest:
        found.append(_guest_table(measured.guest))
    return found


def whole_table(medium: str, samples: Mapping[str, Sequence[Sample]]) -> Table:
    """``silo`` and ``bare``: a whole disk to the store."""
    rows = [
        (name, _spread(_of(taken, "mb_s"), 0), _spread(_of(taken, "cpu_s_per_gib"), 2))
        for name, taken in samples.items()
    ]
    rate = ratio(samples["silo"], samples["bare"], "mb_s")
    cpu = ratio(samples["silo"], samples["bare"], "cpu_s_per_gib")
    rows.append(("silo ÷ bare", _spread(rate, 2), _spread(cpu, 2)))
    return Table(f"A whole disk of noise to {medium}", ("", "MB/s", "CPU s/GiB"), rows)


def cut_table(samples: Sequence[Sample], dirty_chunks: int) -> Table:
    """Steady cuts."""
    rows = [
        ("PUTs per cut", _spread(_of(samples, "puts"), 0)),
        ("bytes PUT ÷ bytes of dirty chunks", _spread(_of(samples, "put_ratio"), 3)),
        ("cut to commit, ms", _spread(_of(samples, "cut_ms"), 0)),
    ]
    return Table(f"Steady cuts of {dirty_chunks} dirty chunks", ("", "median [range]"), rows)


def layout_table(layouts: Sequence[Layout]) -> Table:
    """Layouts side by side, workload by workload."""
    rows = [
        (
            f"{one.workload}: {one.layout}",
            f"{one.upload_ratio:.2f}",
            f"{one.puts / one.cuts:.0f}",
            f"{one.puts / one.cuts * CUTS_PER_MONTH * PUT_PRICE:,.0f}",
            f"{one.cpu_s / one.written * 2**30:.1f}",
            f"{one.cpu_s / one.put_bytes * 2**30:.1f}",
        )
        for one in sorted(layouts, key=lambda one: one.workload)
    ]
    headings = (
        "writes: layout",
        "bytes PUT ÷ written",
        "PUTs per cut",
        "$ a month for PUTs",
        "CPU s/GiB written",
        "CPU s/GiB PUT",
    )
    return Table("Layouts at the same interval", headings, rows)


def _chunk_table(layouts: Sequence[Layout], restores: Sequence[Restored]) -> Table:
    rows = [
        (
            f"{one.chunk_size >> 10} KiB",
            f"{TIB // one.chunk_size * RAM_PER_CHUNK / 2**20:,.0f}",
            f"{TIB // one.chunk_size * SLOT / 2**20:,.0f}",
            *(f"{_upload(layouts, kind, one.chunk_size):.2f}" for kind in ("uniform", "zipf", "untar")),
            f"{one.first_cpu_s_per_gib:.1f}",
            f"{one.cpu_s_per_gib:.1f}",
            f"{one.wall_s:.2f}",
            f"{one.gets}",
        )
        for one in restores
    ]
    headings = (
        "chunk",
        "MiB of memory per TiB",
        "MiB of map file per TiB",
        "uniform",
        "zipf",
        "untar",
        "first sync, CPU s/GiB",
        "restore, CPU s/GiB",
        "restore, s",
        "restore, GETs",
    )
    return Table("What a chunk size costs (bytes PUT ÷ written by workload)", headings, rows)


def _upload(layouts: Sequence[Layout], workload: str, chunk_size: int) -> float:
    chosen = [
        one.upload_ratio
        for one in layouts
        if (one.workload, one.chunk_size) == (workload, chunk_size) and one.layout.startswith("silo")
    ]
    return chosen[0] if chosen else float("nan")


def _delta_table(deltas: Mapping[str, Mapping[str, Outcome]]) -> Table:
    rows = [
        (
            f"{workload}: {chain}",
            f"{one.upload_ratio:.2f}",
            f"{one.gets_per_chunk:.1f}",
            f"{one.space_ratio:.2f}",
        )
        for workload, chains in deltas.items()
        for chain, one in chains.items()
    ]
    headings = ("writes: deltas per 64 KiB chunk", "bytes PUT ÷ written", "GETs per chunk", "space ÷ content")
    return Table("Sub-chunk deltas, modelled", headings, rows)


def _reading_table(lazy: Mapping[str, Sequence[Sample]], trips: Sample) -> Table:
    rows = [
        ("chunk that is only in the store, p50 in ms", _spread(_of(lazy["silo"], "p50_ms"), 2)),
        ("bare ranged GET of as many bytes, p50 in ms", _spread(_of(lazy["bare"], "p50_ms"), 2)),
        ("silo ÷ bare", _spread(ratio(lazy["silo"], lazy["bare"], "p50_ms"), 2)),
        ("round trips to the first byte of a restore", f"{trips['restore_trips']:.1f}"),
        ("round trips until a new host serves it, probe and claim included", f"{trips['open_trips']:.1f}"),
    ]
    return Table("Reading from an S3 server", ("", "median [range]"), rows)


def _guest_table(guest: Mapping[str, Sequence[Sample]]) -> Table:
    rows = [
        (
            quantity.removesuffix("_us").replace("_", " "),
            _spread(_of(guest["idle"], quantity), 0),
            _spread(_of(guest["syncing"], quantity), 0),
            _spread(ratio(guest["syncing"], guest["idle"], quantity), 2),
        )
        for quantity in ("read_p50_us", "read_p99_us", "write_p50_us", "write_p99_us")
    ]
    return Table("A guest's 4 KiB requests, in µs", ("", "idle", "syncing", "syncing ÷ idle"), rows)


def _of(samples: Sequence[Sample], quantity: str) -> Summary:
    return summarise([sample[quantity] for sample in samples])


def _spread(summary: Summary, digits: int) -> str:
    return f"{summary.median:.{digits}f} [{summary.low:.{digits}f}-{summary.high:.{digits}f}]"
