"""The state directory: locks, names, records, volumes, and what a crash in between leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from silo import files
from silo.chunkmap import Residency
from silo.errors import ClosedError, CorruptionError, InvalidRequestError, UnavailableError
from silo.geometry import Geometry
from silo.records import Identity
from silo.statedir import StateDir
from silo.volumestate import Origin

GEOMETRY = Geometry(8 * 4096, 4096)
ABSENT = bytes(8)
IDENTITY = Identity(group="vm1", epoch=1, incarnation="0" * 16)


async def test_what_is_written_is_there_after_reopening(tmp_path: Path) -> None:
    async with contextlib.aclosing(StateDir(tmp_path / "deep" / "state")) as state:
        assert await state.groups() == []
        group = await state.open_group("vm1")
        assert await group.read_identity() is None
        assert await group.read_record("offer") is None
        await group.write_identity(IDENTITY)
        await group.write_record("offer", b"first")
        await group.write_record("offer", bytearray(b"second"))
        await group.write_record("handover", memoryview(b"x" * 100_000))
        volume = await group.open_volume("disk", GEOMETRY, ABSENT)
        volume.buffer[0] = Residency.PRESENT
        await state.open_group("vm2")
    async with contextlib.aclosing(StateDir(tmp_path / "deep" / "state")) as state:
        assert await state.groups() == ["vm1", "vm2"]
        group = await state.open_group("vm1")
        assert await group.read_identity() == IDENTITY
        assert await group.record_names() == ["handover", "offer"]
        assert await group.read_record("offer") == b"second"
        assert await group.read_record("handover") == b"x" * 100_000
        await group.delete_record("offer")
        await group.delete_record("offer")
        assert await group.read_record("offer") is None
        assert await group.volume_names() == ["disk"]
        volume = await group.open_volume("disk", GEOMETRY, ABSENT)
        assert (volume.origin, volume.buffer[0]) == (Origin.MAP, Residency.PRESENT)


async def test_a_group_is_open_once(tmp_path: Path) -> None:
    """In one process and between two; the refusal names the holder, and other groups are free."""
    first, second = StateDir(tmp_path), StateDir(tmp_path)
    group = await first.open_group("vm1")
    with pytest.raises(UnavailableError, match=r"vm1 .* is in use by this very process"):
        await second.open_group("vm1")
    code = (
        "import asyncio; from silo.statedir import StateDir; "
        f"asyncio.run(StateDir({str(tmp_path)!r}).open_group('vm1'))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert child.returncode != 0
    assert f"is in use by process {os.getpid()}" in child.stderr
    await second.open_group("vm2")
    await group.aclose()
    await second.open_group("vm1")
    await first.aclose()
    await second.aclose()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../other", "a/b", "/etc", ".hidden", "a\0b", "ä", "x" * 129]
)
async def test_names_cannot_leave_their_place(tmp_path: Path, name: str) -> None:
    async with contextlib.aclosing(StateDir(tmp_path / "state")) as state:
        with pytest.raises(InvalidRequestError):
            await state.open_group(name)
        group = await state.open_group("vm1")
        with pytest.raises(InvalidRequestError):
            await group.open_volume(name, GEOMETRY, ABSENT)
        with pytest.raises(InvalidRequestError):
            await group.remove_volume(name)
        for verb in (group.read_record, group.delete_record):
            with pytest.raises(InvalidRequestError):
                await verb(name)
        with pytest.raises(InvalidRequestError):
            await group.write_record(name, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


async def test_the_identity_is_no_ordinary_record(tmp_path: Path) -> None:
    async with contextlib.aclosing(StateDir(tmp_path)) as state:
        group = await state.open_group("vm1")
        with pytest.raises(InvalidRequestError, match="write_identity"):
            await group.write_record("identity", b"{}")
        with pytest.raises(InvalidRequestError, match="does not belong"):
            await group.write_identity(msgspec.structs.replace(IDENTITY, group="vm2"))
        assert await group.record_names() == []


async def test_damaged_records_are_reported(tmp_path: Path) -> None:
    """Torn anywhere, or copied over one another."""
    async with contextlib.aclosing(StateDir(tmp_path)) as state:
        group = await state.open_group("vm1")
        await group.write_record("offer", b"content")
        await group.write_identity(IDENTITY)
        records = group.path / "records"
        whole = (records / "offer").read_bytes()
        for length in range(len(whole)):
            (records / "offer").write_bytes(whole[:length])
            with pytest.raises(CorruptionError, match="the record offer"):
                await group.read_record("offer")
        (records / "identity").write_bytes(whole)
        with pytest.raises(CorruptionError, match="was written as offer"):
            await group.read_identity()


async def test_a_volume_can_be_forgotten(tmp_path: Path) -> None:
    """A target that had the group before starts with nothing again."""
    async with contextlib.aclosing(StateDir(tmp_path)) as state:
        group = await state.open_group("vm1")
        volume = await group.open_volume("disk", GEOMETRY, bytes([Residency.PRESENT]) * 8)
        with pytest.raises(InvalidRequestError, match="is open"):
            await group.open_volume("disk", GEOMETRY, ABSENT)
        with pytest.raises(InvalidRequestError, match="is open"):
            await group.remove_volume("disk")
        await volume.aclose()
        await group.remove_volume("disk")
        await group.remove_volume("disk")
        assert await group.volume_names() == []
        volume = await group.open_volume("disk", GEOMETRY, ABSENT)
        assert (volume.origin, bytes(volume.buffer)) == (Origin.FRESH, ABSENT)


async def test_two_openers_of_one_volume_at_the_same_time(tmp_path: Path) -> None:
    async with contextlib.aclosing(StateDir(tmp_path)) as state:
        group = await state.open_group("vm1")
        refused = []

        async def open_it() -> None:
            try:
                await group.open_volume("disk", GEOMETRY, ABSENT)
            except InvalidRequestError as error:
                refused.append(error)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(5):
                tasks.create_task(open_it())
        assert len(refused) == 4


async def test_another_boot_believes_only_checkpoints(tmp_path: Path) -> None:
    async with contextlib.aclosing(StateDir(tmp_path, boot="first")) as state:
        volume = await (await state.open_group("vm1")).open_volume("disk", GEOMETRY, ABSENT)
        volume.buffer[0] = Residency.PRESENT
        await volume.checkpoint(bytes(volume.buffer))
        volume.buffer[1] = Residency.PRESENT
    async with contextlib.aclosing(StateDir(tmp_path, boot="second")) as state:
        volume = await (await state.open_group("vm1")).open_volume("disk", GEOMETRY, ABSENT)
        assert volume.needs_compare
        assert [byte & 7 for byte in volume.buffer] == [Residency.PRESENT] + [Residency.ABSENT_STORE] * 7


async def test_after_closing(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    group = await state.open_group("vm1")
    volume = await group.open_volume("disk", GEOMETRY, ABSENT)
    await state.aclose()
    await state.aclose()
    await group.aclose()
    await volume.aclose()
    for call in (
        state.groups(),
        state.open_group("vm1"),
        group.read_identity(),
        group.write_record("offer", b""),
        group.open_volume("disk", GEOMETRY, ABSENT),
        volume.checkpoint(ABSENT),
    ):
        with pytest.raises(ClosedError):
            await call


async def test_what_a_crash_left_is_cleaned_up(tmp_path: Path) -> None:
    async with contextlib.aclosing(StateDir(tmp_path)) as state:
        group = await state.open_group("vm1")
        (group.path / "records" / ".offer.new").write_bytes(b"half")
        (group.path / "volumes" / ".disk.new").mkdir()
        (group.path / "volumes" / ".disk.new" / "map").write_bytes(b"half")
        await group.aclose()
        group = await state.open_group("vm1")
        assert await group.record_names() == []
        assert [path.name for path in (group.path / "records").iterdir()] == []
        assert [path.name for path in (group.path / "volumes").iterdir()] == []


async def test_a_cancelled_open_gives_the_lock_back(tmp_path: Path) -> None:
    async with contextlib.aclosing(StateDir(tmp_path)) as state:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(state.open_group("vm1"))
            await asyncio.sleep(0)
            task.cancel()
        assert task.cancelled()
        group = await state.open_group("vm1")
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(group.open_volume("disk", GEOMETRY, ABSENT))
            await asyncio.sleep(0)
            task.cancel()
        assert task.cancelled()
        volume = await group.open_volume("disk", GEOMETRY, ABSENT)
        assert volume.origin is Origin.MAP


async def test_a_cancelled_write_has_happened_or_not_when_it_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is waited for: nothing lands after the next record was written."""
    release = threading.Event()
    replace = files.replace_file

    def slow(path: Path, data: bytes) -> None:
        assert release.wait(10)
        replace(path, data)

    async with contextlib.aclosing(StateDir(tmp_path)) as state:
        group = await state.open_group("vm1")
        monkeypatch.setattr("silo.statedir.replace_file", slow)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(group.write_record("offer", b"cancelled"))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
            release.set()
        assert task.cancelled()
        assert await group.read_record("offer") == b"cancelled"


async def test_everything_is_private(tmp_path: Path) -> None:
    """Device state and handovers are nobody else's business."""
    async with contextlib.aclosing(StateDir(tmp_path / "state")) as state:
        group = await state.open_group("vm1")
        await group.write_record("offer", b"")
        await group.open_volume("disk", GEOMETRY, ABSENT)
        for path in [tmp_path / "state", *(tmp_path / "state").rglob("*")]:
            assert path.stat().st_mode & 0o077 == 0, path
