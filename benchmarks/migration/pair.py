"""A migration between two real processes, seen from the parent: start both, let them go, and read what it took."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.common.child import cpu_seconds
from benchmarks.common.turns import Sample
from benchmarks.migration.host_child import SOURCE_FILES, TARGET_FILES
from benchmarks.migration.scenario import CHUNK, Scenario
from silo.clock import SystemClock
from silo.errors import UnavailableError
from silo.p2p.tls_authority import Authority

__all__ = ["HostChild", "migrate_once"]

_ANSWER_TIMEOUT_S = 120.0


class HostChild:
    """One host. A context manager: leaving it ends the process."""

    def __init__(self, role: str, scenario: Scenario, directory: Path) -> None:
        self._log = directory / f"{role}.log"
        with self._log.open("wb") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.migration.host_child",
                    role,
                    str(directory),
                    scenario.to_json(),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )

    def tell(self, **values: Any) -> None:
        """One line to the host."""
        stdin = self.process.stdin
        if stdin is not None:
            stdin.write(json.dumps(values).encode() + b"\n")

    def expect(self, word: str) -> dict[str, Any]:
        """The host's next line, which must begin with this word. `UnavailableError` when it dies or hangs."""
        watchdog = threading.Timer(_ANSWER_TIMEOUT_S, self.process.kill)
        watchdog.start()
        try:
            line = self.process.stdout.readline() if self.process.stdout is not None else b""
        finally:
            watchdog.cancel()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if answer.get("said") != word:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise UnavailableError(f"a host said {answer or 'nothing'} instead of {word!r}: {tail}")
        return answer

    def cpu_s(self) -> float:
        """CPU time so far."""
        return cpu_seconds(self.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.process.kill()
        with self.process:  # closes the pipes, which ends the host, and waits for it
            pass


def migrate_once(scenario: Scenario, parent: Path | None = None) -> Sample:
    """Prepare, migrate, verify every byte afterwards. Nothing but the migration itself is inside the numbers."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="silo-bench-", dir=parent)))
        if scenario.tls:
            fleet = Authority(directory / "ca", SystemClock())
            fleet.make()
            for name, files in (("source", SOURCE_FILES), ("target", TARGET_FILES)):
                fleet.issue(name, ["127.0.0.1"], directory=directory / files)
        target = stack.enter_context(HostChild("target", scenario, directory))
        source = stack.enter_context(HostChild("source", scenario, directory))
        url = target.expect("listening")["url"]
        source.expect("ready")
        cpu = [-source.cpu_s(), -target.cpu_s()]
        begun = time.perf_counter()
        source.tell(to=url)
        source.expect("evacuated")
        cpu[0] += source.cpu_s()
        cpu[1] += target.cpu_s()
        hydrated = target.expect("hydrated")
        hydrated_s = time.perf_counter() - begun
        end = source.expect("report")
        target.tell(versions=end["versions"])
        target.expect("verified")
    report = end["report"]
    return {
        "mb_s": scenario.used / report["evacuated_ms"] / 1e3,
        "evacuated_ms": report["evacuated_ms"],
        "hydrated_ms": hydrated_s * 1e3,
        "downtime_ms": report["downtime_ms"],
        "source_cpu_s": cpu[0],
        "target_cpu_s": cpu[1],
        "cpu_s_per_gib": sum(cpu) / (max(scenario.used, 1) / (1 << 30)),
        "bytes_peer": report["bytes_peer"],
        "bytes_store": hydrated["bytes_store"],
        "rewritten_bytes": (end["writes"] - scenario.dirty_chunks) * CHUNK,
        "rounds": report["rounds"],
    }
