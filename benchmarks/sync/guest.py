"""What a guest notices of sync: latency of its requests while its disk is being stored, beside an idle syncer.

The server is a process of its own (`python -m benchmarks.sync.guest SOCKET`), as a daemon would be: a disk in memory,
a store in the same process that answers after 20 ms, and an upload limited to 100 MB/s. fio reads and writes 4 KiB at
random, one request at a time, over a Unix socket. In the turns called *syncing* one cut follows the other without a
pause, and before each a quarter of the disk is written again, so that there is always something to upload.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import silo
from benchmarks.common.turns import Sample, take_turns
from benchmarks.sync.measure import MIB, noise
from benchmarks.sync.stores import ForgetfulStore

__all__ = ["guest_latency"]

_SIZE = 256 * MIB
_LATENCY_S = 0.02
_RATE_BPS = 100e6
_WRITE = 64 << 10
"""Small, lest the guest waits for these rather than for sync."""
_START_TIMEOUT_S = 30.0


def guest_latency(rounds: int, runtime_s: float, parent: Path | None) -> dict[str, list[Sample]]:
    """``idle`` and ``syncing``: completion latencies of reads and of writes, in µs."""
    with tempfile.TemporaryDirectory(prefix="silo-bench-", dir=parent) as name:
        socket = Path(name) / "nbd.sock"
        with _serving(socket) as process:

            def measure(mode: str, round_index: int) -> Sample:
                _say(process, mode)
                found = _fio(socket, runtime_s, round_index)
                _say(process, "idle")
                return found

            return take_turns(("idle", "syncing"), rounds, measure)


@contextmanager
def _serving(socket: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "benchmarks.sync.guest", str(socket)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        _heard(process)
        yield process
    finally:
        process.terminate()
        process.wait(_START_TIMEOUT_S)


def _say(process: subprocess.Popen[str], mode: str) -> None:
    if process.stdin is None:
        raise RuntimeError("the server has no input")
    process.stdin.write(f"{mode}\n")
    process.stdin.flush()
    _heard(process)


def _heard(process: subprocess.Popen[str]) -> None:
    if process.stdout is None or not process.stdout.readline():
        raise RuntimeError("the server has ended")


def _fio(socket: Path, runtime_s: float, seed: int) -> Sample:
    argv = ["fio", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={socket}", "--thread", "--name=guest"]
    argv += ["--rw=randrw", "--bs=4k", "--iodepth=1", f"--size={_SIZE}", "--time_based", "--norandommap"]
    argv += [f"--runtime={runtime_s * 1000:.0f}ms", f"--randseed={seed}", "--percentile_list=50:99"]
    argv += ["--output-format=json", "--refill_buffers"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=runtime_s + 60, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return {
        f"{side}_{name}_us": job[side]["clat_ns"]["percentile"][key] / 1000
        for side in ("read", "write")
        for name, key in (("p50", "50.000000"), ("p99", "99.000000"))
    }


# ---- the server's process


async def _serve(socket: str) -> None:
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop.add_reader(sys.stdin.fileno(), lambda: lines.put_nowait(sys.stdin.readline().strip()))
    store = ForgetfulStore()
    settings = silo.SyncSettings(rpo_s=3600.0, rate_bps=_RATE_BPS, drain_timeout_s=5.0)
    with tempfile.TemporaryDirectory(prefix="silo-bench-") as state:
        async with silo.Host(state) as host:
            disk = silo.MemoryDevice(_SIZE)
            group = await host.open_group("bench", {"disk": disk}, store=store, sync=settings)
            content = noise(_SIZE // 4, 5)
            for number in range(_SIZE // MIB):
                await group.volumes["disk"].write(number * MIB, content[number % len(content)])
            await group.sync_now()
            store.latency_s = _LATENCY_S
            await host.export(group, f"unix:{socket}")
            print("ready", flush=True)
            await _obey(group, content, lines)


async def _obey(group: silo.HostedGroup, content: list[bytes], lines: asyncio.Queue[str]) -> None:
    mode = asyncio.Event()

    async def sync_on() -> None:
        for turn in itertools.count():
            await mode.wait()
            for number in range(len(content)):
                part = memoryview(content[(number + turn) % len(content)])  # never what was there before
                for start in range(0, MIB, _WRITE):
                    await group.volumes["disk"].write(number * MIB + start, part[start : start + _WRITE])
                    await asyncio.sleep(_WRITE / _RATE_BPS)
            await group.sync_now()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sync_on())
        while line := await lines.get():
            if line == "syncing":
                mode.set()
            else:
                mode.clear()
            print("done", flush=True)
        os._exit(0)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
