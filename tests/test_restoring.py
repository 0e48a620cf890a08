"""Restoring a volume into a file: all of it, or nothing at all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from silo import FileDevice, Host
from silo.clock import SystemClock
from silo.errors import CorruptionError, InvalidRequestError, SiloError
from silo.restoring import restore_volume

MIB = 1 << 20
SIZE = 2 * MIB


async def stored(path: Path) -> tuple[str, bytes]:
    """A store with one volume, and its content."""
    store, content = f"file://{path}/store", SystemClock().token(MIB) + bytes(MIB)
    async with Host(path / "state") as host:
        disk = FileDevice(path / "disk.img", SIZE)
        group = await host.open_group("vm1", {"disk": disk}, store=store)
        await group.volumes["disk"].write(0, content[:MIB])
    return store, content


async def test_a_volume_is_restored_and_progress_told(tmp_path: Path) -> None:
    """Byte by byte, up to the end."""
    told: list[tuple[int, int]] = []
    async with asyncio.timeout(30):
        store, content = await stored(tmp_path)
        to = tmp_path / "copy.img"
        found = await restore_volume(store, "vm1", "disk", to, lambda done, total: told.append((done, total)))
    assert to.read_bytes() == content
    assert found["size"] == SIZE
    assert found["generation"] == 1
    assert told[-1] == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("group", "volume", "kind"),
    [
        ("vm2", "disk", InvalidRequestError),
        ("vm1", "disc", InvalidRequestError),
        ("../store/vm1", "disk", SiloError),
    ],
)
async def test_what_is_not_there_leaves_no_file(tmp_path: Path, group: str, volume: str, kind: type) -> None:
    """Unknown groups and volumes, and names that are none."""
    async with asyncio.timeout(30):
        store, _ = await stored(tmp_path)
        with pytest.raises(kind):
            await restore_volume(store, group, volume, tmp_path / "none.img", lambda done, total: None)
    assert not (tmp_path / "none.img").exists()


async def test_a_damaged_store_leaves_no_file(tmp_path: Path) -> None:
    """A flipped bit in any stored chunk is found, and half a disk is not left behind."""
    async with asyncio.timeout(30):
        store, _ = await stored(tmp_path)
        segments = [
            path for path in (tmp_path / "store").rglob("*") if path.is_file() and "segments" in str(path)
        ]
        largest = max(segments, key=lambda path: path.stat().st_size)
        damaged = bytearray(largest.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        largest.write_bytes(damaged)
        with pytest.raises(CorruptionError):
            await restore_volume(store, "vm1", "disk", tmp_path / "none.img", lambda done, total: None)
    assert not (tmp_path / "none.img").exists()


async def test_an_existing_file_of_another_size_is_kept(tmp_path: Path) -> None:
    """It is refused, and not removed as if we had made it."""
    async with asyncio.timeout(30):
        store, _ = await stored(tmp_path)
        (tmp_path / "mine.img").write_bytes(b"mine")
        with pytest.raises(InvalidRequestError):
            await restore_volume(store, "vm1", "disk", tmp_path / "mine.img", lambda done, total: None)
    assert (tmp_path / "mine.img").read_bytes() == b"mine"
