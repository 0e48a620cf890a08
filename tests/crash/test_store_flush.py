"""``flush = "store"`` on a real daemon: what an fsync has confirmed survives the loss of host and disk."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest

from silo.clock import SystemClock
from silo.exports.nbd_client import NbdClient
from silo.sync.store_url import open_store
from tests.support.daemons import Daemon
from tests.support.seeds import seeds
from tests.support.sync import restored

pytestmark = pytest.mark.crash

BLOCK = 4096
WRITERS = 4
PER_WRITER = 64


async def test_a_confirmed_fsync_survives_the_loss_of_the_host(tmp_path: Path) -> None:
    """Writers flush after every write, on connections of their own; then the process, its disk and its state go."""
    (seed,) = seeds(1)
    chance = random.Random(seed)
    confirmed: dict[int, int] = {}
    written: dict[int, int] = {}
    socket = f"unix:{tmp_path}/vm1.sock"
    store = tmp_path / "store"
    daemon = Daemon(
        tmp_path / "host", "--group", "vm1", "--volume", f"disk={tmp_path}/host/disk.img,size=8M",
        "--listen", socket, "--store", f"file://{store}", "--sync-interval", "1h", "--flush", "store",
    )  # fmt: skip

    async def write_on(writer: int) -> None:
        async with await NbdClient.connect(socket) as client:
            stamp = 0
            while True:
                stamp += 1
                block = chance.randrange(PER_WRITER) * WRITERS + writer
                content = (stamp * WRITERS + writer).to_bytes(8, "little") * (BLOCK // 8)
                written[block] = stamp * WRITERS + writer
                await client.write(block * BLOCK, content)
                await client.flush()
                confirmed[block] = stamp * WRITERS + writer

    await daemon.start()
    writers = [asyncio.create_task(write_on(writer)) for writer in range(WRITERS)]
    async with asyncio.timeout(60):
        while sum(stamp > WRITERS * 8 for stamp in confirmed.values()) < 20:
            await asyncio.sleep(0.01)
    kept = dict(confirmed)
    await daemon.kill()
    for task in writers:
        task.cancel()
    await asyncio.wait(writers)
    shutil.rmtree(tmp_path / "host")
    found = (await restored(open_store(f"file://{store}", SystemClock()), SystemClock()))["disk"]
    assert len(kept) > 20
    for block, stamp in kept.items():
        have = int.from_bytes(found[block * BLOCK : block * BLOCK + 8], "little")
        assert stamp <= have <= written[block], f"block {block} lost {stamp}, it has {have}; seed {seed}"
        assert found[block * BLOCK : (block + 1) * BLOCK] == have.to_bytes(8, "little") * (BLOCK // 8)
