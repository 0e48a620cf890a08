"""What the NBD benchmark makes of its samples, and that its pieces fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.common.machine import Machine, busy_time, describe_machine
from benchmarks.common.table import Table, print_table, to_markdown
from benchmarks.nbd.contenders import CONTENDERS
from benchmarks.nbd.fio import Cell
from benchmarks.nbd.plot import plot_ratios
from benchmarks.nbd.report import QUANTITIES, Measured, best_ratio, ratio_table, tables, to_json
from benchmarks.nbd.rows import QUICK, ROWS, select
from silo.errors import InvalidRequestError

MACHINE = Machine("cpu", 2, 1.0, "6.1", "3.11", {"fio": "3"}, (0.0, 0.0, 0.0))


def sample(iops: float) -> dict[str, float]:
    return dict.fromkeys(QUANTITIES, 1.0) | {"iops": iops}


def measured() -> Measured:
    memory = [contender for contender in CONTENDERS if contender.medium == "memory"]
    rates = {"silo-memory": 30, "silo-memory-nomaps": 40, "nbdkit-memory": 20, "qemu-nbd-tmpfs": 10}
    samples = {name: [sample(rate), sample(rate + 1)] for name, rate in rates.items()}
    return Measured(ROWS[0], "unix", "memory", memory, samples)


def test_the_rival_is_the_strongest_one() -> None:
    found = best_ratio(measured(), "silo-memory")
    assert found is not None
    rival, summary = found
    assert rival == "nbdkit-memory"
    assert summary.low == pytest.approx(31 / 21)
    assert summary.high == pytest.approx(30 / 20)


def test_without_rivals_there_is_no_ratio() -> None:
    one = measured()
    alone = Measured(one.cell, one.transport, one.medium, [c for c in one.contenders if c.ours], one.samples)
    assert best_ratio(alone, "silo-memory") is None
    assert list(ratio_table([alone]).rows) == []


def test_tables_tell_everything() -> None:
    (table,) = tables([measured()])
    assert table.title == "memory over unix"
    assert len(table.rows) == 4
    assert all(len(row) == len(table.headings) for row in table.rows)
    large = Measured(Cell("big", "read", 1 << 20), "tcp", "memory", measured().contenders, measured().samples)
    (table,) = tables([large])
    assert "MiB/s" in table.rows[0][1]


def test_json_holds_all_samples() -> None:
    document = json.loads(json.dumps(to_json(MACHINE, (1, 1, 1), 2.0, [measured()])))
    (row,) = document["rows"]
    assert len(row["samples"]["nbdkit-memory"]) == 2
    assert row["ours_over_best"]["silo-memory"]["rival"] == "nbdkit-memory"
    assert row["median"]["qemu-nbd-tmpfs"]["iops"] == 10.5


def test_one_table_two_faces(tmp_path: Path) -> None:
    table = Table("Title", ("row", "number"), [("a", "1"), ("b", "2")])
    assert to_markdown(table) == "### Title\n\n| row | number |\n|---|---:|\n| a | 1 |\n| b | 2 |\n"
    with (tmp_path / "out").open("w") as file:
        print_table(table, Console(file=file, width=80))
    assert "Title" in (tmp_path / "out").read_text()


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """The same numbers give the same file, so that the documentation changes only when they do."""
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        assert plot_ratios([measured()], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert not plot_ratios([], tmp_path / "c.svg")


def test_rows_are_selected_by_pattern() -> None:
    assert [row.name for row in select(["4k-randread-*"])] == [
        "4k-randread-d1",
        "4k-randread-d32",
        "4k-randread-4x32",
    ]
    assert len(select(QUICK)) == len(QUICK)
    with pytest.raises(InvalidRequestError):
        select(["no-such-row"])


def test_the_machine_is_described() -> None:
    machine = describe_machine(["no-such-tool", "python3"])
    assert machine.cores > 0
    assert machine.tools["no-such-tool"] == "not installed"
    assert machine.tools["python3"].startswith("Python 3")
    before, after = busy_time(), busy_time()
    assert after.total_s >= before.total_s
