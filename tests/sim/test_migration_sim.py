"""Two hosts that lose links, processes, power and the register while a group moves, and a guest that must not notice.

Each seed is a story: a guest works on host a, which is told to move it to b; meanwhile links are cut or fall
silent, either process is killed and started again, and the register does not answer. When the trouble is over the
group must arrive, whole. All along, no read of the guest may be wrong, at most one host may run it, and the register
may change hands only as the handover allows.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import attrs
import pytest

from silo.errors import FencedError, SiloError, UnavailableError
from silo.events import Phase, PhaseEntered
from silo.p2p.handover import SourceState
from silo.p2p.reception import Reception
from silo.p2p.records import HANDOVER_RECORD, OFFER_RECORD
from silo.p2p.source import SourceMigration
from silo.p2p.target import TargetMigration
from silo.tasks import task_group
from silo.testing.loop import SimulatedClock, run_simulated
from silo.testing.network import MemoryNetwork
from silo.testing.process import SimulatedProcess
from tests.support.migration import CHUNK, QUICK, HostSide, World, accept_next
from tests.support.seeds import seeds

URL = "tcp:b:5170"
TROUBLES = 8
CALM_S = 60.0

pytestmark = pytest.mark.sim


class Story:
    """One run. ``main_a`` and ``main_b`` are what the processes of the two hosts do."""

    def __init__(self, clock: SimulatedClock, *, with_store: bool, power: bool = False) -> None:
        self.clock, self.chance = clock, clock.random
        self.network = MemoryNetwork(latency_s=lambda: self.chance.choice((0.0, 0.0005, 0.002, 0.02)))
        slow = attrs.evolve(
            QUICK, compress=with_store, rate_bps=self.chance.choice((40 * CHUNK, 80 * CHUNK, 200 * CHUNK))
        )
        transports = {name: self.network.host(name) for name in "ab"}
        self.power = power
        self.world = World(transports, clock, self.chance, with_store=with_store, settings=slow, power=power)
        self.guest = self.world.guest
        self.lives = {
            "a": Life(self, self.world.a, self.main_a),
            "b": Life(self, self.world.b, self.main_b),
        }
        self.released = asyncio.Event()

    # ---- the processes ----------------------------------------------------------------------------------

    async def main_a(self, host: HostSide) -> None:
        """Open or go on, and move the group away, again and again until it has gone."""
        record = host.records.content.get(OFFER_RECORD)
        if record is None:
            await self._open(host)
            source = SourceMigration(host.group, URL, host.site, host.plugs)
        else:
            source = SourceMigration.restore(host.group, record, host.site, host.plugs)
        while True:
            with contextlib.suppress(SiloError):
                await source.run()
            if source.state is SourceState.RELEASED:
                self.released.set()
                return
            assert source.state is SourceState.ABORTED, f"{source.state}: {source.report.reason}"
            await asyncio.sleep(0.5)
            source = SourceMigration(host.group, URL, host.site, host.plugs)

    async def _open(self, host: HostSide) -> None:
        """An ordinary opening: only over an own epoch."""
        if host.link is not None:
            while True:
                try:
                    await host.link.store.request()
                    break
                except UnavailableError:
                    await asyncio.sleep(0.1)
            owner = host.link.store.incarnation
            assert owner[:1] in ("", host.name), f"{owner} has the group, and {host.name} has no record of it"
            await host.link.open()
        host.group.gate.reopen()
        self.guest.start(host.name, host.group)

    async def main_b(self, host: HostSide) -> None:
        """Go on, and take in what comes."""
        reception = Reception(host.site, host.holds_record)
        await reception.listen(URL)
        async with task_group() as tasks:
            tasks.create_task(reception.run())
            record = host.records.content.get(HANDOVER_RECORD)
            if record is None and self.guest.running == {"b"}:
                await self._open(host)  # an ordinary group by now
            elif record is not None:
                target = TargetMigration.restore(host.group, record, reception, host.site, host.plugs)
                if target.is_evacuated:
                    await self._open(host)
                await self._take_in(host, target)
            while True:
                await self._take_in(host, await accept_next(reception, host))

    async def _take_in(self, host: HostSide, target: TargetMigration) -> None:
        try:
            await target.run()
        except SiloError:
            host.reopen(is_open=False)

    # ---- trouble ----------------------------------------------------------------------------------------

    async def trouble(self) -> None:
        """What goes wrong, and when: at any time, and half of it around the switchover."""
        for _ in range(TROUBLES):
            if self.chance.random() < 0.5:
                await asyncio.sleep(self.chance.expovariate(4.0))
            else:
                await self._near_switchover()
            kind = self.chance.choice(["cut", "silence", "silence", "kill a", "kill b", "kill b", "register"])
            if kind == "cut":
                self.network.cut("a", "b")
            elif kind == "silence":
                self.network.partition("a", "b")
                await asyncio.sleep(self.chance.uniform(0.1, 6.0))
                self.network.heal("a", "b")
            elif kind == "register" and self.world.store is not None:
                self.world.store.trouble = self._unavailable
                await asyncio.sleep(self.chance.uniform(0.1, 4.0))
                self.world.store.trouble = None
            elif kind.startswith("kill"):
                await self.lives[kind[-1]].die()

    async def _near_switchover(self) -> None:
        """Wait for the next one, for a while, and then for a moment."""
        seen = len(self.world.a.events)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3.0):
                while not any(
                    isinstance(event, PhaseEntered) and event.phase is Phase.SWITCHOVER
                    for event in self.world.a.events[seen:]
                ):
                    await asyncio.sleep(0.0005)
        await asyncio.sleep(self.chance.choice((0.0, 0.001, 0.003, 0.01)))

    def _unavailable(self) -> None:
        raise UnavailableError("the store does not answer")

    async def sync(self) -> None:
        """Commits of whoever owns the group."""
        while True:
            await asyncio.sleep(self.chance.uniform(0.02, 0.5))
            for life in self.lives.values():
                link = life.host.link
                if link is not None and life.host.group.gate.is_open:
                    try:
                        await link.sync()
                    except (FencedError, UnavailableError):
                        continue

    async def play(self) -> None:
        """The whole story."""
        async with task_group() as tasks:
            helpers = [tasks.create_task(self.guest.run()), tasks.create_task(self.sync())]
            for life in self.lives.values():
                helpers.append(tasks.create_task(life.watch()))
                await life.start()
            await asyncio.sleep(0.2)
            self.guest.writes = self.chance.choice((0.5, 0.05, 0.0))
            await self.trouble()
            async with asyncio.timeout(CALM_S):
                await self._arrival()
            for helper in helpers:
                helper.cancel()
            await asyncio.wait(helpers)
            await self._check_store()
            for life in self.lives.values():
                await life.end()

    async def _arrival(self) -> None:
        await self.released.wait()
        await self.lives["a"].end()  # nothing needs this host any more
        if self.power or self.chance.random() < 0.5:
            await self.lives["b"].die()
        await asyncio.sleep(1.0)
        before = self.guest.requests
        await asyncio.sleep(1.0)
        assert self.guest.requests > before, "the guest stands still"
        await self.guest.stop("b")
        group = self.world.b.group
        for name, volume in group.volumes.items():
            content = bytes(await volume.read(0, volume.geometry.size))
            is_whole = content == bytes(self.guest.model[name])
            assert is_whole, f"{name} is not what was written"

    async def _check_store(self) -> None:
        """The first commits of the new owner cover everything."""
        store, link = self.world.store, self.world.b.link
        if store is not None and link is not None:
            assert await link.sync()
            written = {name: bytes(content) for name, content in self.guest.model.items()}
            assert store.images[store.generation] == written, "what was committed is not what was written"


class Life:
    """The processes of one host, one after the other."""

    def __init__(
        self, story: Story, host: HostSide, main: Callable[[HostSide], Coroutine[Any, Any, None]]
    ) -> None:
        self.host = host
        self._story = story
        self._main = main
        self._process: SimulatedProcess | None = None
        self._started = asyncio.Event()

    async def start(self) -> None:
        """A process."""
        self._process = SimulatedProcess(self._main(self.host), name=f"host {self.host.name}")
        await self._process.__aenter__()
        self._started.set()

    async def watch(self) -> None:
        """Raise what a process raises."""
        while True:
            await self._started.wait()
            self._started.clear()
            if self._process is not None:
                await self._process.wait_ended()

    async def die(self) -> None:
        """The process is killed, and another one starts some time later. What the network carried may arrive."""
        if self._process is None:
            return
        self._process.kill()
        self._story.network.crash(self.host.name, loses=self._story.chance.random() < 0.5)
        self._story.guest.lose_disks(self.host.group)
        await asyncio.sleep(self._story.chance.uniform(0.0, 2.0))
        if self._story.power and self._story.chance.random() < 0.6:
            await self.host.lose_power()
        else:
            self.host.restart()
        await self.start()

    async def end(self) -> None:
        """The process ends in peace."""
        if self._process is not None:
            process, self._process = self._process, None
            await process.__aexit__(None, None, None)


@pytest.mark.parametrize("power", [False, True], ids=["", "power loss"])
@pytest.mark.parametrize("with_store", [True, False], ids=["store", "no store"])
@pytest.mark.parametrize("seed", seeds(6))
def test_a_group_arrives_whatever_happens(seed, with_store, power):
    """Cuts, silence, dead processes and machines, a register that does not answer: a move is late, and whole."""

    async def scenario(clock: SimulatedClock) -> bool:
        await Story(clock, with_store=with_store, power=power).play()
        return True

    assert run_simulated(scenario, seed=seed, rounds_max=5_000_000)
