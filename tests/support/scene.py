"""Scenes of a migration on the deterministic loop: two hosts, a network, and what may be said of the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from silo.errors import SiloError
from silo.events import MigrationReport
from silo.p2p.reception import Reception
from silo.p2p.source import SourceMigration
from silo.p2p.target import TargetMigration
from silo.tasks import task_group
from silo.testing.loop import SimulatedClock, run_simulated
from silo.testing.network import MemoryNetwork
from tests.support.migration import World, accept_next

URL = "tcp:b:5170"


class Scene:
    """A world with a network, in which b accepts whatever comes and a may be told to migrate."""

    def __init__(self, world: World, network: MemoryNetwork, tasks: asyncio.TaskGroup) -> None:
        self.world, self.network, self.tasks = world, network, tasks
        self.a, self.b, self.guest, self.store = world.a, world.b, world.guest, world.store
        self.reception = Reception(world.b.site, world.b.holds_record)
        self.target: TargetMigration | None = None
        self.target_outcome: asyncio.Task[MigrationReport | SiloError] | None = None

    async def accept(self) -> MigrationReport | SiloError:
        self.target = await accept_next(self.reception, self.b)
        return await outcome(self.target.run())

    def source(self, **options: Any) -> SourceMigration:
        return SourceMigration(self.a.group, URL, self.a.site, self.a.plugs, **options)

    async def migrate(self, **options: Any) -> MigrationReport:
        return await self.source(**options).run()

    async def until(self, true: Callable[[], bool]) -> None:
        """Look again every millisecond of virtual time."""
        while not true():
            await asyncio.sleep(0.001)

    async def check_moved(self) -> None:
        """The guest runs at b and finds there what it has written; a is of no more use."""
        assert self.target is not None
        await self.target.wait_running()
        assert self.guest.running == {"b"}
        await self.target.wait_evacuated()
        await asyncio.sleep(0.1)
        self.network.partition("a", "b")
        await self.guest.stop("b")
        for name, volume in self.b.group.volumes.items():
            found = bytes(await volume.read(0, volume.geometry.size))
            assert found == self.guest.model[name], f"{name} has changed on its way"
        assert not self.a.group.gate.is_open

    async def check_stayed(self) -> None:
        """The guest runs at a as before, protected as before, and nothing of the migration is left."""
        assert self.guest.running == {"a"}
        assert self.a.group.gate.is_open
        assert self.a.records.content == {}
        assert self.a.link is None or not self.a.link.holds
        before = self.guest.requests
        await asyncio.sleep(0.2)
        assert self.guest.requests > before
        assert not self.b.group.gate.is_open


async def outcome(call: Awaitable[MigrationReport]) -> MigrationReport | SiloError:
    try:
        return await call
    except SiloError as error:
        return error


@asynccontextmanager
async def scene(clock: SimulatedClock, *, accept: bool = True, **options: Any) -> AsyncIterator[Scene]:
    """Enter with a guest that has run for a while, and a target that waits."""
    network = MemoryNetwork(latency_s=lambda: clock.random.choice((0.0, 0.0005, 0.002)))
    world = World({name: network.host(name) for name in "ab"}, clock, clock.random, **options)
    await world.open()
    async with task_group() as tasks:
        here = Scene(world, network, tasks)
        await here.reception.listen(URL)
        helpers = [tasks.create_task(here.reception.run()), tasks.create_task(here.guest.run())]
        await asyncio.sleep(0.3)
        if accept:
            here.target_outcome = tasks.create_task(here.accept())
            helpers.append(here.target_outcome)
        yield here
        for helper in helpers:
            helper.cancel()


def simulate(play: Callable[[Scene], Awaitable[None]], *, seed: int = 1, **options: Any) -> bool:
    """Run a scene to its end. True, so that a test can say what it stands for."""

    async def scenario(clock: SimulatedClock) -> bool:
        async with asyncio.timeout(300), scene(clock, **options) as here:
            await play(here)
        return True

    return run_simulated(scenario, seed=seed)
