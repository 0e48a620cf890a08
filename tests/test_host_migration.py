"""Groups that move between two hosts of one program: there, back, refused, aborted, without a store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from silo import FileDevice, Host, MemoryDevice, SyncSettings
from silo.clock import SystemClock
from silo.errors import InvalidRequestError, MigrationAborted, SiloError
from silo.events import Phase, PhaseEntered
from silo.hooks.inprocess import CallbackWorkload
from silo.hosted import HostedGroup
from silo.p2p.settings import MigrationSettings
from silo.p2p.source_effects import SourceEffects
from silo.sync.memory_store import MemoryStore

MIB = 1 << 20
SIZE = 8 * MIB
LAZY = SyncSettings(rpo_s=3600)
CONTENT = SystemClock().token(4 * MIB)


@contextlib.asynccontextmanager
async def hosts(path: Path, *names: str) -> AsyncIterator[list[Host]]:
    """Hosts that listen at ``<path>/<name>.sock``."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(Host(path / name, listen=f"unix:{path}/{name}.sock"))
            for name in names
        ]


async def take_in(host: Host, store: MemoryStore | None, **options) -> HostedGroup:
    """Accept the next offer, and return once the group runs here."""
    offers = host.offers()
    offer = await anext(offers)
    client = store.client() if store else None
    group = await offer.accept({"disk": MemoryDevice(SIZE)}, store=client, sync=LAZY, **options)
    await group.wait_running()
    return group


async def move(
    group: HostedGroup, host: Host, store: MemoryStore | None, path: str, **options
) -> HostedGroup:
    """Move a group and return it as the other host has it."""
    async with asyncio.TaskGroup() as tasks:
        arriving = tasks.create_task(take_in(host, store, **options))
        async with group.migrate(path) as migration:
            report = await migration.wait_released()
    assert report.outcome.value == "released"
    return arriving.result()


async def test_there_and_back_again(tmp_path: Path) -> None:
    """A, B, C, and A again, written to at every stop; nothing of an earlier stay shines through."""
    store = MemoryStore(SystemClock())
    async with hosts(tmp_path, "a", "b", "c") as (a, b, c):
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        expected = bytearray(CONTENT + bytes(4 * MIB))
        await group.volumes["disk"].write(0, CONTENT)
        await group.sync_now()
        for stop, (host, name) in enumerate([(b, "b"), (c, "c"), (a, "a")]):
            await group.volumes["disk"].write(stop * MIB + 100, b"stop%d" % stop)
            expected[stop * MIB + 100 : stop * MIB + 105] = b"stop%d" % stop
            group = await move(group, host, store, f"unix:{tmp_path}/{name}.sock")
            assert bytes(await group.volumes["disk"].read(0, SIZE)) == expected
            await group.wait_hydrated()
            await group.sync_now()
        assert set(a.groups) == {"vm1"}
        assert not b.groups
        assert not c.groups


async def test_without_a_store_everything_goes_over_the_link(tmp_path: Path) -> None:
    """And the source keeps nothing."""
    async with hosts(tmp_path, "a", "b") as (a, b):
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)})
        await group.volumes["disk"].write(MIB, CONTENT)
        group = await move(group, b, None, f"unix:{tmp_path}/b.sock")
        await group.wait_hydrated()
        assert bytes(await group.volumes["disk"].read(MIB, len(CONTENT))) == CONTENT
        assert not a.groups


async def test_a_refused_group_stays_and_can_be_offered_again(tmp_path: Path) -> None:
    """The refusal's text arrives, and the source serves and syncs as before."""
    store = MemoryStore(SystemClock())
    async with hosts(tmp_path, "a", "b") as (a, b):
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        await group.volumes["disk"].write(0, CONTENT)

        async def refuse() -> None:
            (await anext(b.offers())).refuse("no room at the inn")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(refuse())
            with pytest.raises(MigrationAborted, match="no room at the inn"):
                async with group.migrate(f"unix:{tmp_path}/b.sock") as migration:
                    await migration.wait_released()
        assert group.phase == "running"
        await group.volumes["disk"].write(5 * MIB, b"still here")
        assert await group.sync_now() == 1
        group = await move(group, b, store, f"unix:{tmp_path}/b.sock")
        assert bytes(await group.volumes["disk"].read(5 * MIB, 10)) == b"still here"


async def test_a_source_that_begins_anew_does_not_wait_for_its_earlier_attempt(tmp_path: Path) -> None:
    """The source died in pre-copy, and the target cannot know that: the next offer tells."""
    store = MemoryStore(SystemClock())
    slow = MigrationSettings(rate_bps=MIB)
    path = f"unix:{tmp_path}/b.sock"
    async with (
        Host(tmp_path / "b", listen=path) as b,
        Host(tmp_path / "a", migration=slow) as a,
    ):
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        await group.volumes["disk"].write(0, CONTENT)
        first = group.migrate(path)
        first.begin()
        offers = b.offers()
        hosted = await (await anext(offers)).accept(
            {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY
        )
        async for event in first.events():
            if isinstance(event, PhaseEntered) and event.phase is Phase.PRE_COPY:
                break
        assert hosted.phase == "arriving"
        await hosted.make_way("another host")
        assert hosted.phase == "arriving"
        await hosted.make_way(a._running_site().host)
        assert "vm1" not in b.groups
        with pytest.raises(MigrationAborted):
            await hosted.wait_running()
        first.abort("enough")
        await first.wait_ended()
        assert group.phase == "running"


async def test_a_veto_leaves_the_guest_running(tmp_path: Path) -> None:
    """An observer objects to the switchover: the workload was never stopped."""
    store = MemoryStore(SystemClock())
    called: list[str] = []
    workload = CallbackWorkload(
        suspend=lambda step: called.append("suspend"), unsuspend=lambda step: called.append("unsuspend")
    )

    def object_to_switchover(event: object) -> None:
        if isinstance(event, PhaseEntered) and event.phase is Phase.SWITCHOVER:
            raise MigrationAborted("not now")

    async with hosts(tmp_path, "a", "b") as (a, b):
        group = await a.open_group(
            "vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY, workload=workload
        )

        async def arrive() -> None:
            with contextlib.suppress(SiloError):
                await take_in(b, store)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(arrive())
            with pytest.raises(MigrationAborted, match="not now"):
                async with group.migrate(
                    f"unix:{tmp_path}/b.sock", observers=[object_to_switchover]
                ) as migration:
                    await migration.wait_released()
        assert "suspend" not in called
        assert group.phase == "running"
        await group.volumes["disk"].write(0, b"x")


async def test_the_workload_moves_with_its_state(tmp_path: Path) -> None:
    """Suspended and captured at the source, resumed at the target with the same bytes."""
    store = MemoryStore(SystemClock())
    told: list[object] = []
    source = CallbackWorkload(
        suspend=lambda step: told.append("suspend"), capture=lambda step: b"registers", unsuspend=told.append
    )
    target = CallbackWorkload(resume=lambda step, state: told.append(("resume", state, dict(step.devices))))
    async with hosts(tmp_path, "a", "b") as (a, b):
        group = await a.open_group(
            "vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY, workload=source
        )
        export = f"unix:{tmp_path}/nbd.sock"
        await move(group, b, store, f"unix:{tmp_path}/b.sock", workload=target, export=export)
    uri = f"nbd+unix:///vm1/disk?socket={tmp_path}/nbd.sock"
    assert told == ["suspend", ("resume", b"registers", {"disk": uri})]


async def test_a_group_that_is_moving_does_not_move_again(tmp_path: Path) -> None:
    """One migration at a time; afterwards the group is not here any more."""
    store = MemoryStore(SystemClock())
    async with hosts(tmp_path, "a", "b") as (a, b):
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        async with asyncio.TaskGroup() as tasks:
            arriving = tasks.create_task(take_in(b, store))
            async with group.migrate(f"unix:{tmp_path}/b.sock") as migration:
                await anext(migration.events())
                with pytest.raises(InvalidRequestError, match="moving away"):
                    group.migrate(f"unix:{tmp_path}/b.sock")
                await migration.wait_released()
        with pytest.raises(InvalidRequestError):
            group.migrate(f"unix:{tmp_path}/b.sock")
        assert arriving.result().phase.startswith("running")


async def test_a_disk_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    """The source hears why, and goes on."""
    async with hosts(tmp_path, "a", "b") as (a, b):
        group = await a.open_group("vm1", {"disk": FileDevice(tmp_path / "disk.img", SIZE)})

        async def accept_wrongly() -> None:
            offer = await anext(b.offers())
            with pytest.raises(InvalidRequestError):
                await offer.accept({"disk": MemoryDevice(MIB)})

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(accept_wrongly())
            with pytest.raises(MigrationAborted):
                async with group.migrate(f"unix:{tmp_path}/b.sock") as migration:
                    await migration.wait_released()
        assert group.phase == "running"


async def test_hooks_have_as_long_as_the_host_is_told(tmp_path: Path) -> None:
    """A hook that hangs ends the attempt after the host's own timeout."""

    async def hang(step: object) -> None:
        await asyncio.Event().wait()

    workload = CallbackWorkload(suspend=hang, unsuspend=lambda step: None)
    settings = MigrationSettings(workload_timeout_s=0.2)
    async with (
        Host(tmp_path / "a", migration=settings) as a,
        Host(tmp_path / "b", listen=f"unix:{tmp_path}/b.sock") as b,
    ):
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, workload=workload)

        async def arrive() -> None:
            with contextlib.suppress(SiloError):
                await take_in(b, None)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(arrive())
            with pytest.raises(MigrationAborted, match="suspend of the workload of vm1 was not done"):
                async with group.migrate(f"unix:{tmp_path}/b.sock") as migration:
                    await migration.wait_released()
        assert group.phase == "running"


async def test_without_a_store_a_group_waits_until_its_former_host_has_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else that host, back from the dead, could be told that nobody knows of the migration, and run the guest again."""
    heard = asyncio.Event()
    write = SourceEffects.write_released

    async def late(effects: SourceEffects) -> None:
        await heard.wait()
        await write(effects)

    monkeypatch.setattr(SourceEffects, "write_released", late)
    async with hosts(tmp_path, "a", "b") as (a, b), asyncio.TaskGroup() as tasks:
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)})
        await group.volumes["disk"].write(0, CONTENT)
        arriving = tasks.create_task(take_in(b, None))
        async with group.migrate(f"unix:{tmp_path}/b.sock") as migration:
            arrived = await arriving
            await arrived.wait_hydrated()
            while arrived.phase != "running":
                await asyncio.sleep(0)
            with pytest.raises(InvalidRequestError, match="has not heard yet"):
                arrived.migrate(f"unix:{tmp_path}/a.sock")
            heard.set()
            await migration.wait_released()
        back = await move_when_it_may(arrived, a, f"unix:{tmp_path}/a.sock")
        assert bytes(await back.volumes["disk"].read(0, len(CONTENT))) == CONTENT


async def move_when_it_may(group: HostedGroup, host: Host, path: str) -> HostedGroup:
    """As `move`, once the former host's last word has arrived."""
    while True:
        try:
            group._check_may_leave()
        except InvalidRequestError:
            await asyncio.sleep(0.01)
        else:
            return await move(group, host, None, path)
