"""What moves a disk without us: nbdcopy from one nbdkit memory server to another, over loopback TCP.

nbdcopy verifies nothing, and copies a disk that nobody writes to. It uses its own defaults: as many connections,
threads and requests in flight as its authors chose.
"""

from __future__ import annotations

import resource
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common.child import ListeningChild, cpu_seconds, listen_tcp
from benchmarks.common.turns import Sample
from benchmarks.migration.scenario import Scenario, block_content, used_blocks

__all__ = ["copy_once"]

_COPY_TIMEOUT_S = 300.0


def copy_once(scenario: Scenario) -> Sample:
    """Fill one server, copy it to a fresh one. Only the copying is inside the numbers."""
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="silo-bench-", dir="/dev/shm"))
        )
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(scenario.size)
            for offset in used_blocks(scenario):
                file.seek(offset)
                file.write(block_content(scenario, offset))
        servers = [
            stack.enter_context(
                ListeningChild(
                    ["nbdkit", "-f", "memory", str(scenario.size)], listen_tcp(), directory / f"{name}.log"
                )
            )
            for name in ("source", "target")
        ]
        source, target = servers
        _nbdcopy(str(image), source.uri())
        image.unlink()
        cpu = -_children_s() - cpu_seconds(source.pid) - cpu_seconds(target.pid)
        begun = time.perf_counter()
        _nbdcopy(source.uri(), target.uri())
        elapsed_s = time.perf_counter() - begun
        cpu += _children_s() + cpu_seconds(source.pid) + cpu_seconds(target.pid)
    return {
        "mb_s": scenario.used / elapsed_s / 1e6,
        "evacuated_ms": elapsed_s * 1e3,
        "cpu_s_per_gib": cpu / (scenario.used / (1 << 30)),
    }


def _nbdcopy(source: str, target: str) -> None:
    subprocess.run(["nbdcopy", source, target], check=True, timeout=_COPY_TIMEOUT_S)


def _children_s() -> float:
    """CPU time of our children that have ended, which nbdcopy is and the servers are not."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
