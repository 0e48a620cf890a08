"""What the sync benchmark counts, and what it makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sync.__main__ import write_docs
from benchmarks.sync.deltas import run_model
from benchmarks.sync.layouts import run_layouts
from benchmarks.sync.measure import cut_once, noise, put_bare, sync_whole
from benchmarks.sync.reading import lazy_reads
from benchmarks.sync.report import Measured, cut_table, tables, whole_table
from benchmarks.sync.stores import PlainStore, open_directory
from benchmarks.sync.traces import BLOCK, RANDOM, untar_cuts
from silo.clock import SystemClock
from silo.sync.probe import probe_store
from tests.support.tools import require_tool

MIB = 1 << 20


async def test_every_request_is_counted(tmp_path: Path) -> None:
    store = open_directory(tmp_path)
    await store.put("a", [b"12345", memoryview(b"678")])
    etag = await store.put_if("b", [b"9"], match=None)
    assert etag is not None
    assert await store.put_if("b", [b"10"], match="another") is None
    await store.get("a", start=2, length=3)
    assert (store.puts, store.put_bytes, store.gets, store.get_bytes) == (3, 11, 1, 3)
    await store.aclose()


def test_both_contenders_store_the_disk(tmp_path: Path) -> None:
    content = noise(2 * MIB, 1)
    ours = sync_whole(open_directory, content, tmp_path)
    bare = put_bare(open_directory, content, tmp_path)
    assert 1.0 <= ours["put_ratio"] < 1.1
    assert ours["mb_s"] > 0
    assert bare["mb_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_steady_cut_puts_what_is_dirty(tmp_path: Path) -> None:
    """One segment and the head: a bar of the format, not of this machine."""
    samples = cut_once(open_directory, 4 * MIB, 32, 2, 1, tmp_path)
    assert [sample["puts"] for sample in samples] == [2, 2]
    assert all(1.0 <= sample["put_ratio"] <= 1.05 for sample in samples)


def test_a_read_of_an_absent_chunk_and_a_bare_get_take_turns(tmp_path: Path) -> None:
    samples = lazy_reads(open_directory, 4 * MIB, 3, 2, tmp_path)
    assert [len(taken) for taken in samples.values()] == [2, 2]
    assert all(sample["p50_ms"] > 0 for taken in samples.values() for sample in taken)


@pytest.mark.parametrize("kind", RANDOM)
def test_longer_chains_upload_less_and_ask_for_more(kind: str) -> None:
    outcomes = [
        run_model(kind, chain=chain, writes=64, size=32 * MIB, cuts=60, seed=1)
        for chain in (0, 1, 4, 1 << 30)
    ]
    uploads = [outcome.upload_ratio for outcome in outcomes]
    requests = [outcome.gets_per_chunk for outcome in outcomes]
    assert uploads == sorted(uploads, reverse=True)
    assert requests == sorted(requests)
    assert requests[0] == 1.0


def test_an_archive_is_unpacked_in_whole_blocks(tmp_path: Path) -> None:
    require_tool("mke2fs")
    cuts = list(untar_cuts(tmp_path))
    writes = [write for cut in cuts for write in cut]
    assert len(cuts) > 1
    assert all(offset % BLOCK == 0 and len(content) % BLOCK == 0 for offset, content in writes)
    assert sum(len(content) for _, content in writes) > 8 * MIB
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_layouts_side_by_side(tmp_path: Path) -> None:
    """Smaller chunks upload less; only one object per chunk needs a PUT for each."""
    layouts, restored = run_layouts(4 * MIB, 16, 2, tmp_path)
    uniform = {one.layout: one for one in layouts if one.workload == "uniform"}
    ratios = [uniform[f"silo, {size} KiB"].upload_ratio for size in (4, 16, 64, 256)]
    assert ratios == sorted(ratios)
    assert uniform["silo, 64 KiB"].puts == 4
    assert uniform["object per chunk, 64 KiB"].puts > 16
    assert [one.chunk_size >> 10 for one in restored] == [4, 16, 64, 256]
    measured = Measured(layouts=layouts, restores=restored)
    write_docs("a machine", tables(measured), measured, tmp_path)
    assert "object per chunk" in (tmp_path / "sync.md").read_text()


def test_tables() -> None:
    ours, bare = {"mb_s": 400.0, "cpu_s_per_gib": 2.0}, {"mb_s": 500.0, "cpu_s_per_gib": 1.0}
    assert whole_table("a store", {"silo": [ours], "bare": [bare]}).rows[-1] == (
        "silo ÷ bare",
        "0.80 [0.80-0.80]",
        "2.00 [2.00-2.00]",
    )
    table = cut_table([{"puts": 2.0, "put_ratio": 1.01, "cut_ms": 20.0}], 128)
    assert table.rows[0] == ("PUTs per cut", "2 [2-2]")
    assert "128" in table.title


async def test_the_store_in_a_dictionary_compares_and_swaps() -> None:
    """What is measured on it would be worth nothing otherwise."""
    store = PlainStore()
    await probe_store(store, SystemClock())
    assert store.puts > 0
