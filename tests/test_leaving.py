"""Groups that hibernate and wake elsewhere, and migrations that end in the store because no target came in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from silo import FileDevice, Host, MemoryDevice, SyncSettings
from silo.clock import SystemClock
from silo.errors import (
    ClosedError,
    FencedError,
    InvalidRequestError,
    MigrationAborted,
    SiloError,
    UnavailableError,
)
from silo.events import Decided, MigrationEvent, Outcome, Phase, PhaseEntered
from silo.hooks.inprocess import CallbackWorkload
from silo.hosted import HostedGroup
from silo.p2p.settings import MigrationPolicy
from silo.sync.memory_store import MemoryStore

MIB = 1 << 20
SIZE = 8 * MIB
LAZY = SyncSettings(rpo_s=3600)
CONTENT = SystemClock().token(2 * MIB)


class Machine:
    """A workload that counts: it runs on at most one host, from the state that it was stopped with."""

    def __init__(self) -> None:
        self.runs = True
        self.calls: list[str] = []
        self.resumed_from = b""
        self.fails: set[str] = set()

    def workload(self) -> CallbackWorkload:
        """One host's view of it."""
        return CallbackWorkload(
            suspend=lambda step: self._do("suspend", runs=False),
            capture=self._capture,
            resume=self._resume,
            unsuspend=lambda step: self._do("unsuspend", runs=True),
            fence=lambda step: self._do("fence", runs=False),
        )

    def _do(self, name: str, *, runs: bool) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise UnavailableError(f"{name} does not work today")
        self.runs = runs

    def _capture(self, step: object) -> bytes:
        assert not self.runs
        self._do("capture", runs=False)
        return b"registers and all that"

    def _resume(self, step: object, state: bytes) -> None:
        self._do("resume", runs=True)
        self.resumed_from = state


@contextlib.asynccontextmanager
async def running(
    path: Path, store: MemoryStore, machine: Machine, name: str = "a"
) -> AsyncIterator[tuple[Host, HostedGroup]]:
    """A host with a group that has content, some of it not stored."""
    async with Host(path / name) as host:
        group = await host.open_group(
            "vm1",
            {"disk": MemoryDevice(SIZE)},
            store=store.client(),
            sync=LAZY,
            workload=machine.workload(),
        )
        await group.volumes["disk"].write(0, CONTENT)
        await group.sync_now()
        await group.volumes["disk"].write(5 * MIB, b"written last")
        yield host, group


async def resume(host: Host, store: MemoryStore, machine: Machine, **options) -> HostedGroup:
    """Wake it on that host."""
    return await host.resume_group(
        "vm1",
        {"disk": MemoryDevice(SIZE)},
        store=store.client(),
        sync=LAZY,
        workload=machine.workload(),
        **options,
    )


async def check_content(group: HostedGroup) -> None:
    """All that was written is there."""
    assert bytes(await group.volumes["disk"].read(0, len(CONTENT))) == CONTENT
    assert bytes(await group.volumes["disk"].read(5 * MIB, 12)) == b"written last"


async def test_a_group_sleeps_here_and_wakes_there(tmp_path: Path) -> None:
    """With the state of its machine, lazily, as often as one likes; and each report adds up."""
    store, machine = MemoryStore(SystemClock()), Machine()
    async with running(tmp_path, store, machine) as (a, group):
        async with group.hibernate() as move:
            events = [event async for event in move.events()]
            report = await move.wait_released()
        assert not machine.runs
        assert not a.groups
        assert await a.known_groups() == [] or await a.known_volumes("vm1") == {}
    assert report.outcome is Outcome.STORED
    assert report.duration_s == pytest.approx(sum(timing.duration_s for timing in report.phases))
    phases = [event.phase for event in events if isinstance(event, PhaseEntered)]
    assert phases == [Phase.STORING, Phase.SWITCHOVER, Phase.EVACUATED, Phase.ENDED]
    for name in ("b", "a"):
        async with Host(tmp_path / name) as host:
            group = await resume(host, store, machine)
            assert machine.runs
            assert machine.resumed_from == b"registers and all that"
            await check_content(group)
            await group.volumes["disk"].write(6 * MIB, name.encode())
            async with group.hibernate() as move:
                await move.wait_released()
    async with Host(tmp_path / "c") as host:
        group = await resume(host, store, machine)
        assert bytes(await group.volumes["disk"].read(6 * MIB, 1)) == b"a"


async def test_a_hibernated_group_is_not_opened_by_mistake(tmp_path: Path) -> None:
    """Its disks alone are not all that it has; who wants only them must say so, and then the state is gone."""
    store, machine = MemoryStore(SystemClock()), Machine()
    async with running(tmp_path, store, machine) as (_, group), group.hibernate():
        pass
    async with Host(tmp_path / "b") as b:
        with pytest.raises(InvalidRequestError, match="is hibernated"):
            await b.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client())
        group = await b.open_group(
            "vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY, cold=True
        )
        await check_content(group)
        await group.volumes["disk"].write(0, b"booted cold")
    async with Host(tmp_path / "c") as c:
        with pytest.raises(InvalidRequestError, match="is not hibernated"):
            await resume(c, store, machine)
        assert not machine.runs


async def test_without_a_store_or_in_the_wrong_moment_it_is_refused(tmp_path: Path) -> None:
    """With the reason; and an observer may object, then it runs on."""
    store, machine = MemoryStore(SystemClock()), Machine()
    async with Host(tmp_path / "x") as host:
        lonely = await host.open_group("vm2", {"disk": MemoryDevice(SIZE)})
        with pytest.raises(InvalidRequestError, match="has no store"):
            lonely.hibernate()

    def objects(event: MigrationEvent) -> None:
        if isinstance(event, PhaseEntered) and event.phase is Phase.SWITCHOVER:
            raise UnavailableError("not on my watch")

    async with running(tmp_path, store, machine) as (_, group):
        async with group.hibernate(observers=[objects]) as move:
            with pytest.raises(MigrationAborted, match="not on my watch"):
                await move.wait_released()
        assert machine.calls == []
        assert group.phase == "running"
        async with group.hibernate() as move:
            await anext(move.events())
            with pytest.raises(InvalidRequestError, match="it is hibernating"):
                group.migrate("unix:/nowhere")
            await move.wait_released()
            assert group.phase == "closed"


@pytest.mark.parametrize("hook", ["suspend", "capture", "store"])
async def test_what_fails_before_the_release_is_undone(tmp_path: Path, hook: str) -> None:
    """The guest runs on, its writes go on, and the next attempt succeeds."""
    store, machine = MemoryStore(SystemClock()), Machine()
    async with running(tmp_path, store, machine) as (a, group):
        if hook == "store":
            group.link.save_state = _fail  # type: ignore[method-assign, union-attr]
        else:
            machine.fails = {hook}
        move = group.hibernate()
        async with move:
            with pytest.raises(MigrationAborted, match="stays on this host"):
                await move.wait_released()
        assert move.phase is Phase.ENDED
        assert machine.runs
        assert group.phase == "running"
        assert a.groups == {"vm1": group}
        await group.volumes["disk"].write(7 * MIB, b"on it goes")
        machine.fails = set()
        if hook == "store":
            del group.link.save_state  # type: ignore[union-attr]
        async with group.hibernate() as move:
            await move.wait_released()
        assert not machine.runs
    async with Host(tmp_path / "b") as b:
        group = await resume(b, store, machine)
        await check_content(group)
        assert bytes(await group.volumes["disk"].read(7 * MIB, 10)) == b"on it goes"


async def _fail(*_: object) -> None:
    raise UnavailableError("the store has had enough")


async def test_a_resumption_that_fails_leaves_the_group_asleep(tmp_path: Path) -> None:
    """Here nothing is left of it, and another host may try."""
    store, machine = MemoryStore(SystemClock()), Machine()
    async with running(tmp_path, store, machine) as (_, group), group.hibernate():
        pass
    machine.fails = {"resume"}
    async with Host(tmp_path / "b") as b:
        with pytest.raises(UnavailableError, match="resume does not work"):
            await resume(b, store, machine)
        assert not b.groups
        assert machine.calls[-2:] == ["resume", "fence"]
        assert not await b.is_waking("vm1")
    machine.fails = set()
    async with Host(tmp_path / "c") as c:
        await check_content(await resume(c, store, machine))
        assert machine.runs


async def test_a_resumption_whose_end_was_not_seen_goes_on_afterwards(tmp_path: Path, expect_log) -> None:
    """Asleep still, so it is woken; but not a second time once it has written anything."""
    store, machine = MemoryStore(SystemClock()), Machine()
    async with running(tmp_path, store, machine) as (_, group), group.hibernate():
        pass
    disk = tmp_path / "disk.img"
    machine.fails = {"resume", "fence"}  # nobody can say that it does not run
    expect_log("could not be given back")

    async def attempt(write: bytes) -> None:
        async with Host(tmp_path / "b") as b:

            async def runs_a_little(step: object, state: bytes) -> None:
                if write:
                    await b.groups["vm1"].volumes["disk"].write(0, write)
                raise UnavailableError("and then nothing was heard of it")

            workload = machine.workload()
            workload.resume = runs_a_little  # type: ignore[method-assign]
            with pytest.raises(UnavailableError, match="nothing was heard"):
                await b.resume_group(
                    "vm1",
                    {"disk": FileDevice(disk, SIZE)},
                    store=store.client(),
                    sync=LAZY,
                    workload=workload,
                )
            assert not b.groups
            assert await b.is_waking("vm1")

    await attempt(b"")
    async with Host(tmp_path / "b") as b:
        with pytest.raises(InvalidRequestError, match="is hibernated"):
            await b.open_group("vm1", {"disk": FileDevice(disk, SIZE)}, store=store.client())
    async with Host(tmp_path / "c") as c:
        with pytest.raises(FencedError):
            await resume(c, store, machine)
    await attempt(b"the guest was here")
    calls = len(machine.calls)
    async with Host(tmp_path / "b") as b:
        group = await b.resume_group(
            "vm1", {"disk": FileDevice(disk, SIZE)}, store=store.client(), workload=machine.workload()
        )
        assert machine.calls[calls:] == []
        assert bytes(await group.volumes["disk"].read(0, 18)) == b"the guest was here"
        assert not await b.is_waking("vm1")


async def test_no_target_in_time_means_the_store(tmp_path: Path) -> None:
    """The migration goes on as an evacuation, in one stream of events and one report that adds up."""
    store, machine = MemoryStore(SystemClock()), Machine()
    async with running(tmp_path, store, machine) as (a, group):
        deadline = a.clock.monotonic() + 3
        async with group.migrate(f"unix:{tmp_path}/nobody.sock", deadline=deadline) as move:
            events = [event async for event in move.events()]
            report = await move.wait_released()
        assert a.clock.monotonic() < deadline
    phases = [event.phase for event in events if isinstance(event, PhaseEntered)]
    assert phases == [Phase.CONNECTING, Phase.STORING, Phase.SWITCHOVER, Phase.EVACUATED, Phase.ENDED]
    decided = [event for event in events if isinstance(event, Decided)]
    assert decided[0].action == "go to the store instead"
    assert "no target has accepted" in decided[0].reason
    assert report.outcome is Outcome.STORED
    assert "no target" in report.reason
    assert report.duration_s == pytest.approx(sum(timing.duration_s for timing in report.phases))
    async with Host(tmp_path / "b") as b:
        await check_content(await resume(b, store, machine))
        assert machine.runs


async def test_a_group_that_shall_stay_stays(tmp_path: Path) -> None:
    """By policy, by an objection, or because it was aborted: no evacuation then."""
    store, machine, url = MemoryStore(SystemClock()), Machine(), f"unix:{tmp_path}/nobody.sock"
    async with running(tmp_path, store, machine) as (a, group):
        deadline = a.clock.monotonic() + 1.5
        policy = MigrationPolicy(evacuate=False)
        with pytest.raises(MigrationAborted):
            async with group.migrate(url, deadline=deadline, policy=policy) as move:
                async with asyncio.timeout(10):
                    move.abort("enough")
                    await move.wait_released()
        assert group.phase == "running"
        move = group.migrate(url, deadline=a.clock.monotonic() + 60)
        async with move:
            await anext(move.events())
            move.abort("never mind")
            with pytest.raises(SiloError):
                await move.wait_released()
        assert group.phase == "running"
        assert machine.calls == []


async def test_durable_before_switch_has_everything_in_the_store_first(tmp_path: Path) -> None:
    """The generation that the target claims holds what was written last; and it needs a store."""
    store, machine, url = MemoryStore(SystemClock()), Machine(), f"unix:{tmp_path}/b.sock"
    policy = MigrationPolicy(durable_before_switch=True)
    async with (
        Host(tmp_path / "b", listen=url) as b,
        running(tmp_path, store, machine) as (_, group),
        asyncio.TaskGroup() as tasks,
    ):
        generation = group.link.syncer.generation  # type: ignore[union-attr]
        arriving = tasks.create_task(anext(b.offers()))
        async with group.migrate(url, policy=policy) as move:
            arrived = await (await arriving).accept(
                {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY, workload=machine.workload()
            )
            report = await move.wait_released()
            assert [timing.phase for timing in report.phases][:4] == [
                Phase.CONNECTING,
                Phase.PRE_COPY,
                Phase.STORING,
                Phase.SWITCHOVER,
            ]
        head = arrived.link.register.head  # type: ignore[union-attr]
        assert head.claim.previous_generation > generation
        assert arrived.group.exposed_bytes == 0
        await check_content(arrived)
        async with Host(tmp_path / "x") as other:
            lonely = await other.open_group("vm2", {"disk": MemoryDevice(SIZE)})
            with pytest.raises(InvalidRequestError, match="has no store"):
                lonely.migrate(url, policy=policy)


async def test_a_guest_that_writes_too_fast_is_slowed_until_the_rest_fits(tmp_path: Path) -> None:
    """The store takes 4 MB/s and the guest would make ten times that dirty: it is told so, and stored in time."""
    store, size = MemoryStore(SystemClock()), 256 * MIB
    slow = SyncSettings(rpo_s=3600, rate_bps=4e6, segment_size=MIB, window=4 * MIB)
    stopped = asyncio.Event()
    workload = CallbackWorkload(suspend=lambda step: stopped.set())
    async with Host(tmp_path / "a") as a, asyncio.TaskGroup() as tasks:
        group = await a.open_group(
            "vm1", {"disk": MemoryDevice(size)}, store=store.client(), sync=slow, workload=workload
        )
        disk, clock = group.volumes["disk"], a.clock
        content = clock.token(65536)
        for chunk in range(160):
            await disk.write(chunk * 65536, content[chunk:] + content[:chunk])

        async def write() -> None:
            chunk = 160
            with contextlib.suppress(ClosedError):  # what it had begun when it was stopped never ends
                while not stopped.is_set():
                    await disk.write(
                        chunk % 4096 * 65536, content[chunk % 65536 :] + content[: chunk % 65536]
                    )
                    chunk += 1
                    await asyncio.sleep(0.002)

        writing = tasks.create_task(write())
        deadline = clock.monotonic() + 12
        async with group.hibernate(deadline=deadline) as move:
            decided = [event async for event in move.events() if isinstance(event, Decided)]
            report = await move.wait_released()
        assert clock.monotonic() < deadline
        writing.cancel()
    assert report.outcome is Outcome.STORED
    limits = [event.write_bps for event in decided if event.write_bps is not None]
    assert limits
    assert all(MIB <= limit <= 16e6 for limit in limits)
    assert group.group.throttle.waited_s > 0
    assert group.group.throttle.rate_bps is None
    assert all(event.late_bytes == 0 for event in decided)
