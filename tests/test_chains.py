"""Groups that move again and again: in a circle under load, several at once, aborted and tried again."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3

from silo import Host, MemoryDevice, SyncSettings, VolumeSpec
from silo.clock import SystemClock
from silo.errors import InvalidRequestError, MigrationAborted
from silo.events import Phase, PhaseEntered
from silo.hooks.inprocess import CallbackWorkload
from silo.hosted import HostedGroup
from silo.p2p.settings import MigrationSettings
from silo.sync.memory_store import MemoryStore
from tests.support.seeds import seeds

KIB, MIB = 1 << 10, 1 << 20
LAZY = SyncSettings(rpo_s=3600)
SHAPES = {"disk": (6 * MIB, 64 * KIB), "memory": (2 * MIB, 4 * KIB), "log": (3 * MIB + 512, 256 * KIB)}
"""Size and chunk size: different ones in one group, and a last chunk that is cut short."""


class Guest:
    """Writes to its volumes as fast as it may, wherever it runs, and knows what they hold."""

    def __init__(self, rng: random.Random) -> None:
        self.contents = {name: bytearray(size) for name, (size, _) in SHAPES.items()}
        self.writes = 0
        self.group: HostedGroup | None = None
        self._rng = rng
        self._may_run = asyncio.Event()
        self._turn = asyncio.Lock()

    def start(self, group: HostedGroup) -> None:
        """It is booted here."""
        self.group = group
        self._may_run.set()

    def workload(self, find: object) -> CallbackWorkload:
        """One host's hooks; ``find`` gives the group there."""

        async def suspend(step: object) -> None:
            self._may_run.clear()
            async with self._turn:
                pass

        async def resume(step: object, state: bytes) -> None:
            assert state == b"%d" % self.writes
            self.start(find())  # type: ignore[operator]

        async def unsuspend(step: object) -> None:
            self._may_run.set()

        return CallbackWorkload(
            suspend=suspend, capture=lambda step: b"%d" % self.writes, resume=resume, unsuspend=unsuspend
        )

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._may_run.wait()
            async with self._turn:
                if self._may_run.is_set() and self.group is not None:
                    await self._write(self.group)
            await asyncio.sleep(0.001)

    async def _write(self, group: HostedGroup) -> None:
        name = self._rng.choice(sorted(SHAPES))
        size = SHAPES[name][0]
        length = min(size, 512 * self._rng.randint(1, 200))
        offset = 512 * self._rng.randrange((size - length) // 512 + 1)
        data = self._rng.randbytes(length) if self._rng.random() < 0.9 else bytes(length)
        await group.volumes[name].write(offset, data)
        self.contents[name][offset : offset + length] = data
        self.writes += 1

    async def check(self, group: HostedGroup) -> str:
        """All volumes are what was written, at one instant; returns the digest of all of it."""
        async with self._turn:
            whole = blake3()
            for name, content in self.contents.items():
                found = bytes(await group.volumes[name].read(0, len(content)))
                assert found == content, f"{name} is not what was written"
                whole.update(found)
            return whole.hexdigest()


def fresh_devices() -> dict[str, VolumeSpec]:
    """Empty ones."""
    return {name: VolumeSpec(MemoryDevice(size), chunk) for name, (size, chunk) in SHAPES.items()}


@contextlib.asynccontextmanager
async def hosts(path: Path, names: str, **settings: float) -> AsyncIterator[dict[str, Host]]:
    """Hosts that listen at ``<path>/<name>.sock``."""
    async with contextlib.AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(
                Host(path / name, listen=f"unix:{path}/{name}.sock", migration=MigrationSettings(**settings))
            )
            for name in names
        }


async def accept(host: Host, store: MemoryStore, guests: dict[str, Guest]) -> HostedGroup:
    """Take the next group in, with a workload that finds it here."""
    offer = await anext(host.offers())
    name = offer.group
    devices = {volume: MemoryDevice(geometry.size) for volume, geometry in offer.volumes.items()}
    workload = guests[name].workload(lambda: host.groups[name])
    return await offer.accept(devices, store=store.client(), sync=LAZY, workload=workload)


async def hop(
    group: HostedGroup, to: Host, url: str, store: MemoryStore, guests: dict[str, Guest]
) -> HostedGroup:
    """Move it, and return it as it is there once its source is not needed any more."""
    async with asyncio.TaskGroup() as tasks:
        arriving = tasks.create_task(accept(to, store, guests))
        async with group.migrate(url) as move:
            report = await move.wait_released()
    assert report.duration_s == pytest.approx(sum(timing.duration_s for timing in report.phases))
    return arriving.result()


async def wait_phase(group: HostedGroup, phase: str) -> None:
    """Until the group is in it; the test brings the deadline."""
    while group.phase != phase:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("seed", seeds(1))
async def test_ten_hops_in_a_circle_under_load(seed: int, tmp_path: Path) -> None:
    """A digest of everything at every stop; hydration of one hop is still going on at the next."""
    store, guest = MemoryStore(SystemClock()), Guest(random.Random(seed))
    async with hosts(tmp_path, "abc") as all_hosts, asyncio.TaskGroup() as tasks:
        a = all_hosts["a"]
        group = await a.open_group(
            "vm1", fresh_devices(), store=store.client(), sync=SyncSettings(rpo_s=0.2),
            workload=guest.workload(lambda: a.groups["vm1"]),
        )  # fmt: skip
        guest.start(group)
        running = tasks.create_task(guest.run())
        digests = []
        for count in range(10):
            name = "bca"[count % 3]
            group = await hop(group, all_hosts[name], f"unix:{tmp_path}/{name}.sock", store, {"vm1": guest})
            await wait_phase(group, "running")
            digests.append(await guest.check(group))
        assert len(set(digests)) == 10, "the guest has not written between two hops"
        running.cancel()
        assert [name for name, host in all_hosts.items() if host.groups] == ["b"]


async def test_a_move_onwards_waits_for_the_evacuation(tmp_path: Path) -> None:
    """Refused with the reason while the source has something that is nowhere else; then it works, while hydrating."""
    store, guest = MemoryStore(SystemClock()), Guest(random.Random(7))
    async with hosts(tmp_path, "abc", rate_bps=4e6, switch_size=64 * MIB) as all_hosts:
        a, b, c = all_hosts.values()
        group = await a.open_group(
            "vm1",
            fresh_devices(),
            store=store.client(),
            sync=LAZY,
            workload=guest.workload(lambda: a.groups["vm1"]),
        )
        for name, content in guest.contents.items():
            content[:] = random.Random(name).randbytes(len(content))
            await group.volumes[name].write(0, bytes(content))
        await group.sync_now()
        for name in guest.contents:
            data = b"new" * 700_000
            data = data[: SHAPES[name][0]]
            await group.volumes[name].write(0, data)
            guest.contents[name][: len(data)] = data
        async with asyncio.TaskGroup() as tasks:
            arriving = tasks.create_task(accept(b, store, {"vm1": guest}))
            async with group.migrate(f"unix:{tmp_path}/b.sock") as move:
                there = await arriving
                await there.wait_running()
                with pytest.raises(InvalidRequestError, match="nowhere else"):
                    there.migrate(f"unix:{tmp_path}/c.sock")
                with pytest.raises(InvalidRequestError, match="moving away"):
                    group.migrate(f"unix:{tmp_path}/b.sock")
                await move.wait_released()
        await wait_phase(there, "running")
        await guest.check(await hop(there, c, f"unix:{tmp_path}/c.sock", store, {"vm1": guest}))


@pytest.mark.parametrize("seed", seeds(1))
async def test_several_groups_cross_at_once(seed: int, tmp_path: Path) -> None:
    """Two from here to there and one the other way, all under load."""
    store = MemoryStore(SystemClock())
    guests = {name: Guest(random.Random(seed)) for name in ("vm1", "vm2", "vm3")}
    async with hosts(tmp_path, "ab") as both, asyncio.TaskGroup() as tasks:
        a, b = both.values()
        groups, running = {}, []
        for name, host in (("vm1", a), ("vm2", a), ("vm3", b)):
            groups[name] = await host.open_group(
                name, fresh_devices(), store=store.client(), sync=LAZY,
                workload=guests[name].workload(lambda host=host, name=name: host.groups[name]),
            )  # fmt: skip
            guests[name].start(groups[name])
            running.append(tasks.create_task(guests[name].run()))

        async def take_in(host: Host, count: int) -> list[HostedGroup]:
            return [await accept(host, store, guests) for _ in range(count)]

        async def leave(name: str, to: str) -> None:
            async with groups[name].migrate(f"unix:{tmp_path}/{to}.sock") as move:
                await move.wait_released()

        async with asyncio.TaskGroup() as moves:
            to_b, to_a = moves.create_task(take_in(b, 2)), moves.create_task(take_in(a, 1))
            for name, to in (("vm1", "b"), ("vm2", "b"), ("vm3", "a")):
                moves.create_task(leave(name, to))
        for group in to_b.result() + to_a.result():
            await wait_phase(group, "running")
            await guests[group.name].check(group)
        for task in running:
            task.cancel()


async def test_aborted_and_tried_again_as_often_as_one_likes(tmp_path: Path) -> None:
    """Each time in another phase; what had arrived is not in the way, and the last attempt succeeds."""
    store, guest = MemoryStore(SystemClock()), Guest(random.Random(3))
    async with hosts(tmp_path, "ab") as both:
        a, b = both.values()
        url = f"unix:{tmp_path}/b.sock"
        group = await a.open_group(
            "vm1",
            fresh_devices(),
            store=store.client(),
            sync=LAZY,
            workload=guest.workload(lambda: a.groups["vm1"]),
        )
        for name, content in guest.contents.items():
            content[:] = random.Random(name).randbytes(len(content))
            await group.volumes[name].write(0, bytes(content))
        for phase in (Phase.PRE_COPY, Phase.SWITCHOVER, Phase.PRE_COPY):
            async with asyncio.TaskGroup() as tasks:
                arriving = tasks.create_task(accept(b, store, {"vm1": guest}))
                move = group.migrate(url, observers=[_objector(phase)])
                async with move:
                    with pytest.raises(MigrationAborted, match="not now"):
                        await move.wait_released()
                there = await arriving
                with pytest.raises(MigrationAborted):
                    await there.wait_running()
                while b.groups:
                    await asyncio.sleep(0.005)
            assert group.phase == "running"
            await group.volumes["disk"].write(MIB, b"between two attempts")
            guest.contents["disk"][MIB : MIB + 20] = b"between two attempts"
        await guest.check(await hop(group, b, url, store, {"vm1": guest}))


def _objector(phase: Phase):
    def observe(event: object) -> None:
        if isinstance(event, PhaseEntered) and event.phase is phase:
            raise MigrationAborted("not now")

    return observe
