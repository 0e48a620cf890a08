"""What the migration benchmark makes of its samples, what it writes on the disks, and how it talks to its hosts."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from benchmarks.common.machine import describe_machine
from benchmarks.migration.document import page
from benchmarks.migration.host_child import Rewriter
from benchmarks.migration.pair import migrate_once
from benchmarks.migration.report import Measured, moved_ratio, tables
from benchmarks.migration.scenario import (
    BLOCK,
    CHUNK,
    Scenario,
    block_content,
    chunk_content,
    chunks_of_blocks,
    used_blocks,
)
from benchmarks.migration.scenarios import bulk, downtime, evacuation, moved
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.group import Group

MIB = 1 << 20


def test_used_blocks_are_spread_over_the_disk() -> None:
    scenario = Scenario(name="sparse", size=64 * MIB, unsynced=4 * MIB)
    assert used_blocks(scenario) == [0, 16 * MIB, 32 * MIB, 48 * MIB]
    assert used_blocks(Scenario(name="empty", size=MIB)) == []


@pytest.mark.parametrize(
    "scenario",
    [
        bulk(32 * MIB),
        downtime(),
        moved(),
        evacuation(large=True, quick=False),
        evacuation(large=False, quick=True),
    ],
)
def test_used_blocks_are_distinct_and_inside(scenario: Scenario) -> None:
    blocks = used_blocks(scenario)
    assert len(set(blocks)) == len(blocks) == scenario.used // BLOCK
    assert all(0 <= offset <= scenario.size - BLOCK and offset % BLOCK == 0 for offset in blocks)
    assert scenario.store or not scenario.synced


def test_content_is_a_function_of_seed_place_and_version() -> None:
    scenario = Scenario(name="a", size=4 * MIB, unsynced=4 * MIB)
    other = Scenario(name="a", size=4 * MIB, unsynced=4 * MIB, seed=2)
    assert block_content(scenario, 0) == block_content(scenario, 0)
    contents = [block_content(scenario, 0), block_content(scenario, BLOCK), block_content(other, 0)]
    assert len(set(contents)) == 3
    assert len({chunk_content(scenario, 5, version) for version in range(4)}) == 4
    assert len(chunk_content(scenario, 5, 1)) == CHUNK


def test_a_scenario_survives_the_command_line() -> None:
    assert Scenario.from_json(moved().to_json()) == moved()


def test_chunks_of_blocks_cover_them() -> None:
    chunks = list(chunks_of_blocks([0, 3 * BLOCK]))
    assert len(chunks) == 2 * BLOCK // CHUNK
    assert chunks[-1] * CHUNK == 4 * BLOCK - CHUNK


async def test_the_rewriter_knows_what_it_wrote() -> None:
    """Every version it reports is what the disk holds, also for chunks that it came back to."""
    scenario = Scenario(name="a", size=4 * MIB, unsynced=MIB)
    volume = Group("bench", SystemClock()).add("disk", MemoryDevice(scenario.size))
    rewriter = Rewriter(scenario, volume)
    for _ in range(20):
        await rewriter.write()
    assert rewriter.writes == 20
    assert sum(rewriter.versions.values()) == 20
    assert max(rewriter.versions.values()) == 2
    for chunk, version in rewriter.versions.items():
        assert bytes(await volume.read(chunk * CHUNK, CHUNK)) == chunk_content(scenario, chunk, version)


def test_moved_bytes_are_set_against_what_had_to_move() -> None:
    scenario = Scenario(name="a", size=64 * MIB, synced=4 * MIB, unsynced=4 * MIB, store=True)
    sample = {"bytes_peer": 6.0 * MIB, "bytes_store": 4.0 * MIB, "rewritten_bytes": 2.0 * MIB}
    assert moved_ratio(sample, scenario) == 1.0
    assert moved_ratio({**sample, "bytes_peer": 7.0 * MIB}, scenario) == pytest.approx(1.1)


def test_only_what_was_measured_is_shown() -> None:
    one = {"mb_s": 300.0, "cpu_s_per_gib": 2.0}
    other = {"mb_s": 600.0, "cpu_s_per_gib": 1.0}
    (table,) = tables(Measured(bulk={"silo": [one], "nbdcopy": [other]}))
    assert table.rows[-1] == ("silo ÷ nbdcopy", "0.50 [0.50-0.50]", "2.00 [2.00-2.00]")
    quick, slow = {"evacuated_ms": 100.0}, {"evacuated_ms": 110.0}
    shown = tables(
        Measured(
            downtime=[{"downtime_ms": value} for value in (5.0, 7.0, 30.0)],
            moved=[{"bytes_peer": 1.0, "bytes_store": 1.0, "rewritten_bytes": 0.0}],
            moved_scenario=Scenario(name="a", size=2 * MIB, unsynced=MIB),
            evacuation={"small": [quick], "large": [slow]},
        )
    )
    assert [table.title.partition(" ")[0] for table in shown] == ["Downtime", "Bytes", "Evacuation"]
    assert shown[0].rows[0] == ("downtime, ms", "7.0 [5.0-30.0]", "3")
    assert shown[2].rows[-1] == ("large ÷ small", "1.10 [1.10-1.10]")
    assert all(len(row) == len(table.headings) for table in shown for row in table.rows)
    assert tables(Measured()) == []


def test_two_hosts_move_a_disk_and_it_is_verified(tmp_path: Path) -> None:
    """The whole measurement, small: with a store, a guest that writes meanwhile, and bytes that add up."""
    scenario = Scenario(
        name="small",
        size=8 * MIB,
        synced=2 * MIB,
        unsynced=2 * MIB,
        store=True,
        dirty_chunks=3,
        rewrites_per_s=50,
    )
    sample = migrate_once(scenario, tmp_path)
    assert sample["downtime_ms"] > 0
    assert sample["evacuated_ms"] >= sample["downtime_ms"]
    assert sample["bytes_peer"] >= scenario.unsynced
    assert sample["bytes_peer"] + sample["bytes_store"] >= scenario.used
    assert moved_ratio(sample, scenario) <= 1.1
    assert list(tmp_path.iterdir()) == []


def test_the_page_says_which_bars_are_reached() -> None:
    """From samples that went through JSON; parts that were not measured are not there."""
    plain, tls, rival = ([{"mb_s": rate, "cpu_s_per_gib": 1.0}] for rate in (300.0, 120.0, 200.0))
    measured = Measured(
        bulk={"silo": plain, "silo, TLS": tls, "nbdcopy": rival},
        moved=[{"bytes_peer": 1.0, "bytes_store": 1.0, "rewritten_bytes": 0.0}],
        moved_scenario=Scenario(name="a", size=2 * MIB, unsynced=MIB),
        circumstances={"bulk": "1 rounds"},
    )
    document = {"machine": {}, **attrs.asdict(measured)}
    assert Measured.from_dict(json.loads(json.dumps(document))) == measured
    text = page(describe_machine(()), measured)
    assert "silo ÷ nbdcopy at least 0.8. Found 1.50: reached" in text
    assert "TLS ÷ plain at least 0.5. Found 0.40: **not reached**" in text
    assert "Downtime" not in text
    assert "Measured with 1 rounds." in text


def test_two_hosts_move_a_disk_over_tls(tmp_path: Path) -> None:
    """As without: every byte is compared."""
    sample = migrate_once(bulk(2 * MIB, tls=True), tmp_path)
    assert sample["bytes_peer"] == 2 * MIB


def test_parts_are_joined() -> None:
    """Whatever order they were measured in; a part that is not there replaces nothing."""
    bulk_part = Measured(bulk={"silo": [{"mb_s": 1.0}]})
    downtime_part = Measured(downtime=[{"downtime_ms": 1.0}])
    joined = bulk_part.joined(downtime_part)
    assert joined == downtime_part.joined(bulk_part)
    assert (joined.bulk, joined.downtime) == (bulk_part.bulk, downtime_part.downtime)
