"""The mapped states: kept for the next process of the same boot, and for nobody else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from silo.checkpoint import owner_tag
from silo.chunkmap import FROZEN, LOCKED, MIGRATION_DIRTY, SYNC_DIRTY, SYNC_IN_CUT, Residency
from silo.errors import CorruptionError
from silo.geometry import Geometry
from silo.mapfile import MapFile

GEOMETRY = Geometry(20 * 4096 + 512, 4096)
OWNER = owner_tag("vm1", "disk")
BOOT = "6fd1a2a8-30e5-4a5c-8c7d-26a8a7a0a3f1"
STATES = bytes([Residency.PRESENT]) * 21


def create(path: Path, states: bytes = STATES) -> MapFile:
    return MapFile.create(path, GEOMETRY, OWNER, BOOT, states)


def test_stores_survive_without_any_sync_or_close(tmp_path: Path) -> None:
    """Another mapping of the file sees each of them at once, as another process would."""
    first = create(tmp_path / "map")
    first.states[20] = Residency.ABSENT_PEER
    second = MapFile.reopen(tmp_path / "map", GEOMETRY, OWNER, BOOT)
    assert second is not None
    assert bytes(second.states) == bytes([Residency.PRESENT]) * 20 + bytes([Residency.ABSENT_PEER])
    first.close()
    second.close()


def test_what_meant_the_dead_process_is_cleared(tmp_path: Path) -> None:
    created = create(tmp_path / "map")
    created.states[0] |= LOCKED | FROZEN
    created.states[1] |= SYNC_IN_CUT | MIGRATION_DIRTY
    created.states[2] |= SYNC_DIRTY | FROZEN
    created.close()
    found = MapFile.reopen(tmp_path / "map", GEOMETRY, OWNER, BOOT)
    assert found is not None
    present = Residency.PRESENT
    assert list(found.states[:4]) == [
        present,
        present | SYNC_DIRTY | MIGRATION_DIRTY,
        present | SYNC_DIRTY,
        present,
    ]
    found.close()


@pytest.mark.parametrize(
    ("geometry", "owner", "boot"),
    [
        (GEOMETRY, OWNER, "another boot of the machine"),
        (GEOMETRY, owner_tag("vm1", "other"), BOOT),
        (Geometry(GEOMETRY.size, 8192), OWNER, BOOT),
        (Geometry(GEOMETRY.size - 512, 4096), OWNER, BOOT),
    ],
)
def test_nobody_else_gets_it(tmp_path: Path, geometry: Geometry, owner: bytes, boot: str) -> None:
    create(tmp_path / "map").close()
    assert MapFile.reopen(tmp_path / "map", geometry, owner, boot) is None


def test_a_missing_or_torn_file_is_worth_nothing(tmp_path: Path) -> None:
    path = tmp_path / "map"
    assert MapFile.reopen(path, GEOMETRY, OWNER, BOOT) is None
    create(path).close()
    whole = path.read_bytes()
    for length in (0, 1, 100, 4095, 4096, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert MapFile.reopen(path, GEOMETRY, OWNER, BOOT) is None
    for position in range(0, 4096, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x40
        path.write_bytes(damaged)
        assert MapFile.reopen(path, GEOMETRY, OWNER, BOOT) is None
    path.write_bytes(whole)
    found = MapFile.reopen(path, GEOMETRY, OWNER, BOOT)
    assert found is not None
    found.close()


def test_a_residency_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    created = create(tmp_path / "map")
    created.states[5] = 7
    created.close()
    with pytest.raises(CorruptionError, match="does not exist"):
        MapFile.reopen(tmp_path / "map", GEOMETRY, OWNER, BOOT)


def test_space_is_taken_beforehand_and_the_file_is_ours(tmp_path: Path) -> None:
    """A full disk must show when the map is made, not as a signal in the middle of a guest's write."""
    large = Geometry(1 << 40)
    created = MapFile.create(tmp_path / "map", large, OWNER, BOOT, bytes(large.chunk_count))
    status = os.stat(tmp_path / "map")
    assert status.st_blocks * 512 >= large.chunk_count
    assert stat.S_IMODE(status.st_mode) == 0o600
    created.close()


def test_closing_leaves_a_view_alone(tmp_path: Path) -> None:
    created = create(tmp_path / "map")
    view = np.frombuffer(created.states, dtype=np.uint8)
    created.close()
    assert view.tobytes() == STATES


def test_reading_copies_what_is_there_and_changes_nothing(tmp_path: Path) -> None:
    created = create(tmp_path / "map")
    created.states[3] |= LOCKED | SYNC_IN_CUT
    before = (tmp_path / "map").read_bytes()
    assert MapFile.read(tmp_path / "map", GEOMETRY, OWNER, BOOT) == bytes(created.states)
    assert (tmp_path / "map").read_bytes() == before
    created.close()
    for geometry, owner, boot in (
        (Geometry(20 * 4096, 4096), OWNER, BOOT),
        (GEOMETRY, owner_tag("vm1", "other"), BOOT),
        (GEOMETRY, OWNER, "another boot of the machine"),
    ):
        assert MapFile.read(tmp_path / "map", geometry, owner, boot) is None
    os.truncate(tmp_path / "map", 4097)
    assert MapFile.read(tmp_path / "map", GEOMETRY, OWNER, BOOT) is None
    assert MapFile.read(tmp_path / "missing", GEOMETRY, OWNER, BOOT) is None
