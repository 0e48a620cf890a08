"""Encrypted groups from end to end: what the store sees, who may open them, rotation, and hostile hands."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from silo import FileDevice, Host, MemoryDevice, SyncSettings
from silo.clock import SystemClock
from silo.errors import CorruptionError, InvalidRequestError
from silo.hosted import HostedGroup
from silo.restoring import restore_volume
from silo.sync.cipher import KeyRing
from silo.sync.file_store import FileStore
from silo.sync.memory_store import MemoryStore
from silo.sync.store_faults import FaultKind, Verb

MIB = 1 << 20
SIZE = 2 * MIB
LAZY = SyncSettings(rpo_s=3600, checkpoint_segments=1)
OLD, NEW = KeyRing([bytes(range(32))]), KeyRing([bytes(range(1, 33))])
BOTH = KeyRing([bytes(range(1, 33)), bytes(range(32))])
MARK = b"a secret that nobody else may read"


async def open_disk(host: Host, store: MemoryStore, **options) -> HostedGroup:
    devices = {"disk": MemoryDevice(SIZE)}
    return await host.open_group("vm1", devices, store=store.client(), sync=LAZY, **options)


def content(seed: int) -> bytes:
    """One chunk that compresses to a half."""
    return MARK + random.Random(seed).randbytes(32 << 10) + bytes((32 << 10) - len(MARK))


async def fill(group: HostedGroup, *chunks: int, version: int = 0) -> None:
    for chunk in chunks:
        await group.volumes["disk"].write(chunk << 16, content(chunk + 100 * version))
    await group.sync_now()


async def check(group: HostedGroup, *chunks: int, version: int = 0) -> None:
    for chunk in chunks:
        found = bytes(await group.volumes["disk"].read(chunk << 16, 65536))
        assert found == content(chunk + 100 * version)


async def test_nothing_of_the_content_is_in_the_store(tmp_path: Path) -> None:
    """Through commits, checkpoints, zeroing and a restart from the store alone."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "a", keys=NEW) as host:
        group = await open_disk(host, store)
        for round_ in range(6):
            await fill(group, *range(8), version=round_)
        await group.volumes["disk"].zero(0, 65536)
        await group.volumes["disk"].write(9 << 16, MARK)
        await group.sync_now()
    objects = store.snapshot()
    assert any(b"SILOMAP\n" in data for data in objects.values()), "there was no checkpoint"
    for data in objects.values():
        assert MARK not in data
        assert NEW.digest(content(501))[:8] not in data, "the index or the map can be read"
    head = json.loads(objects["vm1/head"])["head"]
    assert (head["incompat"], head["keys"]) == (1, [NEW.current])
    async with Host(tmp_path / "b", keys=NEW) as host:
        group = await open_disk(host, store)
        assert not any(await group.volumes["disk"].read(0, 65536))
        await check(group, *range(1, 8), version=5)
        assert bytes(await group.volumes["disk"].read(9 << 16, len(MARK))) == MARK
        await group.wait_hydrated()


@pytest.mark.parametrize("keys", [None, OLD])
async def test_without_the_right_key_nothing_is_touched(tmp_path: Path, keys: KeyRing | None) -> None:
    """A clear error, before anything of the group is written."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "a", keys=NEW) as host:
        await fill(await open_disk(host, store), 1)
    before = store.snapshot()
    async with Host(tmp_path / "b", keys=keys) as host:
        with pytest.raises(InvalidRequestError, match=f"is encrypted with the key {NEW.current:08x}"):
            await open_disk(host, store)
    assert {key: data for key, data in store.snapshot().items() if "/probe" not in key} == before


async def test_a_plain_group_stays_plain(tmp_path: Path) -> None:
    """A key would protect only what comes later, and nobody could tell."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "a") as host:
        await fill(await open_disk(host, store), 1)
    async with Host(tmp_path / "b", keys=NEW) as host:
        with pytest.raises(InvalidRequestError, match="is not encrypted"):
            await open_disk(host, store)


async def test_rotation(tmp_path: Path) -> None:
    """The new key is named before anything is stored under it; the old one is needed as long as the head names it."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "a", keys=OLD) as host:
        await fill(await open_disk(host, store), 1, 2)
    async with Host(tmp_path / "b", keys=BOTH) as host:
        group = await open_disk(host, store)
        head = json.loads(store.snapshot()["vm1/head"])["head"]
        assert head["keys"] == [OLD.current, NEW.current]
        await check(group, 1, 2)
        await fill(group, 2, 3, version=1)
    for keys in (OLD, NEW):
        async with Host(tmp_path / "c", keys=keys) as host:
            with pytest.raises(InvalidRequestError, match="is encrypted with the key"):
                await open_disk(host, store)
    async with Host(tmp_path / "d", keys=BOTH) as host:
        group = await open_disk(host, store)
        await check(group, 1)
        await check(group, 2, 3, version=1)


async def test_a_retry_sends_identical_bytes(tmp_path: Path) -> None:
    """A segment whose answer was lost is found to be there already: another encryption of it would be a stranger."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "a", keys=NEW) as host:
        group = await open_disk(host, store)
        rule = store.inject(FaultKind.LOSE_RESPONSE, Verb.PUT_IF, key="vm1/segments/*", times=2)
        await fill(group, *range(8))
        assert rule.hits == 2
        await check(group, *range(8))


async def test_hostile_hands(tmp_path: Path) -> None:
    """Whoever may write to the store can take things away, and cannot make anything up: every change of a segment is
    noticed, and so is every segment that is put in the place of another."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "a", keys=NEW) as host:
        group = await open_disk(host, store)
        await fill(group, 1)
        await fill(group, 1, version=1)
    found = [key for key, data in store.snapshot().items() if data.startswith(b"SILOSEG\n")]
    segments = sorted(found, key=lambda key: key.rpartition("/")[2])  # the newest last: all of it is needed
    assert len(segments) == 2
    whole = store.snapshot()
    client = store.client()
    chance = random.Random(7)
    for _ in range(12):
        damaged = bytearray(whole[segments[1]])
        damaged[chance.randrange(16, len(damaged) - 64)] ^= 1 << chance.randrange(8)
        await client.put(segments[1], [bytes(damaged)])
        await refuse(tmp_path, store)
    await client.put(segments[1], [whole[segments[0]]])
    await refuse(tmp_path, store)
    await client.put(segments[1], [whole[segments[1]]])
    async with Host(tmp_path / "b", keys=NEW) as host:
        await check(await open_disk(host, store), 1, version=1)


async def refuse(tmp_path: Path, store: MemoryStore) -> None:
    """A restore finds the damage."""
    async with FileCopy(tmp_path / "copy", store) as url:
        with pytest.raises(CorruptionError):
            await restore_volume(url, "vm1", "disk", tmp_path / "out.img", lambda done, total: None, NEW)


class FileCopy:
    """A store's objects as a directory, for what takes a URL."""

    def __init__(self, path: Path, store: MemoryStore) -> None:
        self._path, self._objects = path, store.snapshot()

    async def __aenter__(self) -> str:
        store = FileStore(self._path, SystemClock())
        try:
            for key, data in self._objects.items():
                await store.put(key, [data])
        finally:
            await store.aclose()
        return f"file://{self._path}"

    async def __aexit__(self, *_: object) -> None:
        return None


async def test_restoring_into_a_file(tmp_path: Path) -> None:
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "a", keys=NEW) as host:
        group = await host.open_group(
            "vm1", {"disk": FileDevice(tmp_path / "disk.img", SIZE)}, store=store.client(), sync=LAZY
        )
        await fill(group, 1, 2, 30)
    async with FileCopy(tmp_path / "copy", store) as url:
        with pytest.raises(InvalidRequestError, match="there is no key"):
            await restore_volume(url, "vm1", "disk", tmp_path / "out.img", lambda done, total: None)
        await restore_volume(url, "vm1", "disk", tmp_path / "out.img", lambda done, total: None, NEW)
    assert (tmp_path / "out.img").read_bytes() == (tmp_path / "disk.img").read_bytes()
