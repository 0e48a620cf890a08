"""The whole demo on a small disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from silo.clock import SystemClock
from silo.demo.play import DemoSettings, play

MIB = 1 << 20


@pytest.mark.slow
async def test_the_small_demo_ends_verified(tmp_path: Path, require_tool) -> None:
    """Every byte is right, the first host was killed only after it said that it may be, and the numbers add up."""
    for tool in ("mke2fs", "debugfs", "e2fsck"):
        require_tool(tool)
    told: list[str] = []
    settings = DemoSettings(used=24 * MIB, guest_file=4 * MIB, warm_up_s=0.2, keep=tmp_path / "demo")
    report = await play(settings, SystemClock(), told.append)
    assert report.verified, f"seed {report.seed}"
    assert report.downtime_ms > 0
    assert report.guest_ops > 0
    assert report.bytes_peer + report.bytes_store > 0
    evacuated = max(number for number, text in enumerate(told) if text.endswith("evacuated"))
    killed = told.index("killing the first host")
    hydrated = next(number for number, text in enumerate(told) if "pulls the rest" in text)
    assert evacuated < killed < hydrated
    assert (tmp_path / "demo" / "b" / "disks").is_dir()
