"""``kill -9`` in the middle of everything that promises to survive it."""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from silo.chunkmap import SYNC_DIRTY
from silo.devices.file import FileDevice
from silo.statedir import StateDir
from silo.volumestate import Origin
from tests.crash.child import BLOCK, BLOCKS, GEOMETRY, record_of, stamp, states_of, step_of
from tests.support.source import ROOT

pytestmark = pytest.mark.crash

ROUNDS = 6


def run_and_kill(what: str, path: Path, acknowledgements: int) -> int:
    """Start a child, let it acknowledge so many steps, kill it; returns the last step that it acknowledged."""
    command = [sys.executable, "-m", "tests.crash.child", what, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(acknowledgements)]
        child.kill()
        lines += child.stdout.readlines()
    whole = [line for line in lines if line.endswith(b"\n")]
    assert len(whole) >= acknowledgements
    return int(whole[-1])


async def test_a_checkpoint_survives_whole(tmp_path: Path) -> None:
    """After every death the machine's restart finds the last acknowledged map, or the one under way."""
    draw = random.Random(1)
    found = 0
    for round_number in range(ROUNDS):
        acknowledged = run_and_kill("checkpoints", tmp_path, draw.randrange(1, 60))
        assert acknowledged > found
        async with contextlib.aclosing(StateDir(tmp_path, boot=f"after death {round_number}")) as state:
            group = await state.open_group("vm1")
            volume = await group.open_volume("disk", GEOMETRY, states_of(0))
            assert volume.origin is Origin.CHECKPOINT
            found = step_of(bytes(volume.buffer))
        assert acknowledged <= found <= acknowledged + 1


async def test_a_map_survives_the_process(tmp_path: Path) -> None:
    """Every mark that was made is there; the lock is free at once."""
    acknowledged = run_and_kill("maps", tmp_path, 100)
    async with contextlib.aclosing(StateDir(tmp_path, boot="the boot of the child")) as state:
        group = await state.open_group("vm1")
        volume = await group.open_volume("disk", GEOMETRY, states_of(0))
        assert volume.origin is Origin.MAP
        marked = [chunk for chunk, byte in enumerate(volume.buffer) if byte & SYNC_DIRTY]
    assert marked == list(range(len(marked)))
    assert len(marked) > acknowledged


async def test_a_record_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    draw = random.Random(2)
    for _ in range(ROUNDS):
        acknowledged = run_and_kill("records", tmp_path, draw.randrange(1, 60))
        async with contextlib.aclosing(StateDir(tmp_path)) as state:
            group = await state.open_group("vm1")
            content = await group.read_record("offer")
        assert content in (record_of(acknowledged), record_of(acknowledged + 1))


async def test_acknowledged_blocks_are_in_the_file(tmp_path: Path) -> None:
    """The page cache outlives the process: each block holds its last acknowledged stamp, or the one under way."""
    draw = random.Random(3)
    for round_number in range(ROUNDS):
        path = tmp_path / str(round_number)
        acknowledged = run_and_kill("blocks", path, draw.randrange(1, 500))
        async with contextlib.aclosing(FileDevice(path)) as device:
            for block in range(BLOCKS):
                found = bytes(await device.read(block * BLOCK, BLOCK))
                number, step = struct.unpack_from("<QQ", found)
                last = acknowledged - (acknowledged - block) % BLOCKS
                assert step in {max(last, 0), acknowledged + 1}
                assert found == (stamp(block, step) if step else bytes(BLOCK))
                assert number == (block if step else 0)
