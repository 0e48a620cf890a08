"""The store in a directory keeps the contract, between processes and across ``kill -9`` too."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from silo.clock import SystemClock
from silo.errors import CapacityError, InvalidRequestError, UnavailableError
from silo.linux import filesystem_magic
from silo.sync import file_store, file_tree
from silo.sync.file_corner import CORNER
from silo.sync.file_store import FileStore
from silo.testing.check_store import check_store
from tests.support.file_store_writer import number_of

ROOT = Path(__file__).parents[2]
KILLS = 8


def writer(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.file_store_writer", str(directory), *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def keys(store: FileStore, prefix: str = "") -> list[str]:
    return [info.key async for info in store.list(prefix)]


def leftovers(directory: Path) -> list[Path]:
    return [path for path in (directory / CORNER).glob("*/*") if path.parent.name != "locks"]


async def test_contract(tmp_path: Path, clock: SystemClock) -> None:
    async def make() -> FileStore:
        return FileStore(tmp_path / "store", clock)

    await check_store(make)
    assert leftovers(tmp_path / "store") == []
    assert [
        path for path in (tmp_path / "store").rglob("*") if path.is_file() and CORNER not in path.parts
    ] == []


async def test_reading_creates_nothing(tmp_path: Path, clock: SystemClock) -> None:
    store = FileStore(tmp_path / "new" / "store", clock)
    assert await store.get("a") is None
    assert await store.head("a") is None
    assert await keys(store) == []
    await store.delete(["a"])
    assert list(tmp_path.iterdir()) == []
    await store.put("a", [b"x"])
    assert await keys(store) == ["a"]
    await store.aclose()


async def test_objects_are_files_named_by_their_keys(tmp_path: Path, clock: SystemClock) -> None:
    store = FileStore(tmp_path, clock)
    await store.put("vm1/segments/0f/1", [b"from ", b"the store"])
    assert (tmp_path / "vm1/segments/0f/1").read_bytes() == b"from the store"
    (tmp_path / "vm1/head").write_bytes(b"copied in by hand")
    (tmp_path / "lost+found").mkdir()
    found = await store.get("vm1/head")
    assert found is not None
    assert bytes(found.data) == b"copied in by hand"
    assert await keys(store) == ["vm1/head", "vm1/segments/0f/1"]
    await store.aclose()


@pytest.mark.parametrize("size", [100, 100_000])
async def test_an_object_changed_by_hand_has_another_etag(
    tmp_path: Path, clock: SystemClock, size: int
) -> None:
    store = FileStore(tmp_path, clock)
    old = await store.put("head", [bytes(size)])
    with (tmp_path / "head").open("r+b") as file:  # in place, as `cp` over an existing file does
        file.write(b"rolled back by an operator")
    assert await store.put_if("head", [b"new"], match=old) is None
    await store.aclose()


async def test_versions_of_one_size_differ_whatever_the_inode(tmp_path: Path, clock: SystemClock) -> None:
    store = FileStore(tmp_path, clock)
    etags = [await store.put("head", [bytes(100_000)]) for _ in range(30)]
    assert len(set(etags)) == 30
    await store.aclose()


async def test_an_object_cannot_be_a_directory(tmp_path: Path, clock: SystemClock) -> None:
    store = FileStore(tmp_path, clock)
    await store.put("a/b", [b"x"])
    for key in ("a", "a/b/c"):
        with pytest.raises(InvalidRequestError):
            await store.put(key, [b"y"])
        with pytest.raises(InvalidRequestError):
            await store.put_if(key, [b"y"], match=None)
        assert await store.get(key) is None
        await store.delete([key])
    assert await keys(store) == ["a/b"]
    await store.aclose()


async def test_the_directory_may_not_be_a_file(tmp_path: Path, clock: SystemClock) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = FileStore(tmp_path / "file" / "store", clock)
    with pytest.raises(InvalidRequestError):
        await store.put("a", [b"x"])
    await store.aclose()


async def test_network_file_systems_are_refused(
    tmp_path: Path, clock: SystemClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(file_tree, "NETWORK_FILESYSTEMS", frozenset({filesystem_magic(fd)}))
    os.close(fd)
    store = FileStore(tmp_path / "not" / "yet", clock)
    for call in (store.put("a", [b"x"]), store.get("a"), store.delete(["a"]), keys(store)):
        with pytest.raises(InvalidRequestError, match="network file system"):
            await call
    await store.aclose()
    assert list(tmp_path.iterdir()) == []
    allowed = FileStore(tmp_path / "not" / "yet", clock, allow_network_filesystem=True)
    await allowed.put("a", [b"x"])
    await allowed.aclose()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make every file of this process end at ``size``, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_no_room(tmp_path: Path, clock: SystemClock) -> None:
    store = FileStore(tmp_path, clock)
    old = await store.put("a", [b"old"])
    with file_size_limit(1 << 20):
        for put in (store.put("a", [bytes(3 << 20)]), store.put_if("b", [bytes(3 << 20)], match=None)):
            with pytest.raises(CapacityError):
                await put
        with pytest.raises(CapacityError):
            await store.put_if("a", [bytes(3 << 20)], match=old)
    assert await keys(store) == ["a"]
    assert leftovers(tmp_path) == []
    assert await store.put_if("a", [b"new"], match=old) is not None
    await store.aclose()


async def test_a_lock_that_is_held_is_waited_for(tmp_path: Path, clock: SystemClock) -> None:
    store = FileStore(tmp_path, clock)
    await store.put("a", [b"old"])
    (lock,) = (tmp_path / CORNER / "locks").iterdir()
    fd = os.open(lock, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(store.put("a", [b"new"]))
        assert await store.put_if("b", [b"other keys are not affected"], match=None) is not None
        assert not task.done()
        assert (tmp_path / "a").read_bytes() == b"old"
        os.close(fd)
    assert (tmp_path / "a").read_bytes() == b"new"
    await store.aclose()


async def test_a_lock_that_is_held_too_long_is_an_outage(
    tmp_path: Path, clock: SystemClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_store, "_LOCK_TIMEOUT_S", 0.05)
    store = FileStore(tmp_path, clock)
    await store.put("a", [b"old"])
    (lock,) = (tmp_path / CORNER / "locks").iterdir()
    fd = os.open(lock, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for call in (store.put("a", [b"new"]), store.delete(["a"])):
        with pytest.raises(UnavailableError, match="lock"):
            await call
    os.close(fd)
    assert (tmp_path / "a").read_bytes() == b"old"
    await store.aclose()


async def test_what_the_dead_left_is_swept_and_the_living_are_left_alone(
    tmp_path: Path, clock: SystemClock
) -> None:
    living = FileStore(tmp_path, clock)
    await living.put("a", [b"x"])
    (session,) = (path for path in (tmp_path / CORNER).iterdir() if path.is_dir() and path.name != "locks")
    (session / "100").write_bytes(b"being written")
    dead = tmp_path / CORNER / "0123456789abcdef"
    dead.mkdir()
    (dead / "1").write_bytes(b"half of an obj")
    other = FileStore(tmp_path, clock)
    await other.put("b", [b"x"])
    assert not dead.exists()
    assert (session / "100").exists()
    for store in (other, living):
        await store.aclose()
    assert sorted(path.name for path in (tmp_path / CORNER).iterdir()) == ["locks", "opening"]


async def test_a_plain_put_takes_its_turn_too(tmp_path: Path, clock: SystemClock) -> None:
    """Whichever comes first, a put or a compare-and-swap of what was there before, the put is what stays."""
    stores = [FileStore(tmp_path, clock) for _ in range(2)]
    for _ in range(20):
        old = await stores[0].put("head", [b"old"])
        async with asyncio.TaskGroup() as group:
            group.create_task(stores[0].put_if("head", [b"swapped"], match=old))
            group.create_task(stores[1].put("head", [b"put"]))
        assert (tmp_path / "head").read_bytes() == b"put"
    for store in stores:
        await store.aclose()


@pytest.mark.crash
async def test_killed_at_any_point_every_object_is_old_or_new(tmp_path: Path, clock: SystemClock) -> None:
    acknowledged = 0
    for kill in range(KILLS):
        with writer(tmp_path, "stamp") as process:
            assert process.stdout is not None
            for _ in range(1 + 3 * kill):
                acknowledged = int(process.stdout.readline().split()[0])
            process.kill()
            for line in process.stdout:  # what it had said before it died
                acknowledged = int(line.split()[0])
        store = FileStore(tmp_path, clock)
        found = await store.get("head")
        assert found is not None
        assert number_of(bytes(found.data)) in (acknowledged, acknowledged + 1)
        created = await keys(store, "segments/")
        numbers = []
        for key in created:
            segment = await store.get(key)
            assert segment is not None
            numbers.append(number_of(bytes(segment.data)))
            assert key.endswith(f"{numbers[-1]:010}")
        assert set(range(1, acknowledged + 1)) <= set(numbers)
        assert max(numbers) <= acknowledged + 1
        await store.put("opens-the-corner", [])
        assert leftovers(tmp_path) == []
        await store.aclose()


@pytest.mark.crash
async def test_processes_that_race_lose_no_step(tmp_path: Path, clock: SystemClock) -> None:
    store = FileStore(tmp_path, clock)
    await store.put("counter", [b"0"])
    processes = [writer(tmp_path, "count", "20") for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    answers = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        answer, _ = process.communicate(timeout=50)
        assert process.returncode == 0
        answers.append(answer)
    assert sorted(answers) == ["False\n", "False\n", "True\n"]
    found = await store.get("counter")
    assert found is not None
    assert bytes(found.data) == b"60"
    await store.aclose()
