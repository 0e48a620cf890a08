"""What the sync benchmark counts, and what it makes of it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.sync.measure import CountingStore, cut_once, put_bare, sync_whole
from benchmarks.sync.report import cut_table, whole_table

MIB = 1 << 20


async def test_every_put_is_counted(tmp_path: Path) -> None:
    store = CountingStore(tmp_path / "store")
    await store.put("a", [b"12345", memoryview(b"678")])
    etag = await store.put_if("b", [b"9"], match=None)
    assert etag is not None
    assert await store.put_if("b", [b"10"], match="another") is None
    assert (store.puts, store.put_bytes) == (3, 11)
    await store.aclose()


def test_both_contenders_store_the_disk(tmp_path: Path) -> None:
    ours, bare = sync_whole(2 * MIB, 1, tmp_path), put_bare(2 * MIB, 1, tmp_path)
    assert 1.0 <= ours["put_ratio"] < 1.1
    assert ours["mb_s"] > 0
    assert bare["mb_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_steady_cut_puts_what_is_dirty(tmp_path: Path) -> None:
    """One segment and the head: a bar of the format, not of this machine."""
    samples = cut_once(4 * MIB, 32, 2, 1, tmp_path)
    assert [sample["puts"] for sample in samples] == [2, 2]
    assert all(1.0 <= sample["put_ratio"] <= 1.05 for sample in samples)


def test_tables() -> None:
    ours, bare = {"mb_s": 400.0, "cpu_s_per_gib": 2.0}, {"mb_s": 500.0, "cpu_s_per_gib": 1.0}
    assert whole_table({"silo": [ours], "bare": [bare]}).rows[-1] == (
        "silo ÷ bare",
        "0.80 [0.80-0.80]",
        "2.00 [2.00-2.00]",
    )
    table = cut_table([{"puts": 2.0, "put_ratio": 1.01, "cut_ms": 20.0}], 128)
    assert table.rows[0] == ("PUTs per cut", "2 [2-2]")
    assert "128" in table.title
