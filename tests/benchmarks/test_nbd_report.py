"""What the NBD benchmark makes of its samples, and that its pieces fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from rich.console import Console

from benchmarks.common.machine import Machine, busy_time, describe_machine
from benchmarks.common.table import Table, print_table, to_markdown
from benchmarks.nbd.contenders import CONTENDERS
from benchmarks.nbd.document import as_dict, describe, joined, load, measured_of, save, tables_of
from benchmarks.nbd.fio import Cell
from benchmarks.nbd.page import REMARKS, write_page
from benchmarks.nbd.plot import plot_ratios
from benchmarks.nbd.report import QUANTITIES, Measured, best_ratio, ratio_table, row_of, tables
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


def document_of(one: Measured) -> dict[str, Any]:
    facts = {"runtime_s": 1.0, "priority": 0, "load": [1.0, 2.0]}
    table = Table("Extra", ("row", "number"), (("a", "1"),))
    found = {"machine": attrs.asdict(MACHINE), "rows": [{**row_of(one), **facts}], "tables": [as_dict(table)]}
    return json.loads(json.dumps(found))


def test_a_document_holds_all_samples(tmp_path: Path) -> None:
    save(document_of(measured()), tmp_path / "out.json")
    found = load(tmp_path / "out.json")
    (row,) = found["rows"]
    assert len(row["samples"]["nbdkit-memory"]) == 2
    assert row["ours_over_best"]["silo-memory"]["rival"] == "nbdkit-memory"
    assert row["median"]["qemu-nbd-tmpfs"]["iops"] == 10.5
    (one,) = measured_of(found)
    assert ratio_table([one]) == ratio_table([measured()])
    assert "2 rounds of 1 s" in describe(found)[1]
    assert load(tmp_path / "none.json") == {}


def test_documents_are_put_together() -> None:
    """Rows of the newer one replace the same rows of the older one; all come in the order of the report."""
    older, newer = measured(), measured()
    other = Measured(ROWS[0], "tcp", "memory", older.contenders, older.samples)
    better = Measured(
        newer.cell,
        "unix",
        "memory",
        newer.contenders,
        dict(newer.samples) | {"silo-memory": [sample(60), sample(61)]},
    )
    both = joined(joined(document_of(other), document_of(older)), document_of(better))
    assert [(one.transport, one.samples["silo-memory"][0]["iops"]) for one in measured_of(both)] == [
        ("unix", 60),
        ("tcp", 30),
    ]
    assert [table.title for table in tables_of(both)] == ["Extra"]


def test_the_page_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    write_page(document_of(measured()), tmp_path)
    page = tmp_path / "nbd.md"
    assert REMARKS not in page.read_text()
    page.write_text(page.read_text() + REMARKS + "\nA remark.\n")
    before = page.read_text()
    write_page(document_of(measured()), tmp_path)
    assert page.read_text().endswith(REMARKS + "\nA remark.\n")
    write_page(document_of(measured()), tmp_path)
    assert page.read_text().count("A remark.") == 1
    assert before.count("### Ratios") == page.read_text().count("### Ratios") == 1


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
