"""Two hosts, a register, and a guest that notices everything: a world to migrate in.

The `Store` is the register and what it names, reduced to what a migration sees of it: who owns the group, which
generation is the newest, and the content of each. A `Link` is one host's end of it, with the interface that
a migration expects (`silo.p2p.ports.Ownership`); `Link.sync` commits a cut of the group, as a syncer would.

The `Guest` is one sequential program that writes and reads one block at a time. Whatever it has written and
was told so it must read back, wherever it runs; and there is only one of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Mapping

import attrs
import numpy as np

from silo.abc import BlockDevice, Buffer, ChunkSource, Clock, Transport
from silo.checkpoint import kept_of, states_after_power_loss
from silo.chunkmap import ChunkMap, Residency, after_restart
from silo.devices.memory import MemoryDevice
from silo.devices.volatile import VolatileDevice
from silo.errors import FencedError, InvalidRequestError, SiloError, UnavailableError
from silo.events import MigrationEvent
from silo.geometry import Geometry
from silo.group import Group
from silo.p2p.ports import Plugs, Site
from silo.p2p.reception import IncomingOffer, Reception
from silo.p2p.records import HANDOVER_RECORD
from silo.p2p.settings import MigrationSettings
from silo.p2p.signal import Signal
from silo.p2p.source import SourceMigration
from silo.p2p.target import TargetMigration
from silo.p2p.terms import Standing, Terms, Verdict
from silo.tasks import task_group

BLOCK = 512
CHUNK = 4096
QUICK = MigrationSettings(
    switch_size=2 * CHUNK, patience_s=5.0, answer_timeout_s=3.0, claim_timeout_s=8.0, accept_timeout_s=20.0,
    progress_s=0.2, compress=False, connections=2, keepalive_s=0.5, silence_s=2.0, connect_timeout_s=2.0,
    hot_size=8 * CHUNK,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- the store


@attrs.define
class Store:
    """The register and its generations. ``trouble`` is asked before each request and may raise or wait."""

    epoch: int = 0
    incarnation: str = ""
    nonce: str = ""
    generation: int = 0
    images: dict[int, dict[str, bytes]] = attrs.field(factory=dict)
    proofs: set[str] = attrs.field(factory=set)
    owners: list[str] = attrs.field(factory=list)
    """Everybody who ever claimed, in order."""
    trouble: Callable[[], object] | None = None

    async def request(self) -> None:
        """One round trip."""
        await asyncio.sleep(0)
        if self.trouble is not None:
            waiting = self.trouble()
            if asyncio.iscoroutine(waiting):
                await waiting

    def claim(self, incarnation: str, nonce: str) -> int:
        """Whoever may do this has been compared already."""
        self.epoch += 1
        self.incarnation, self.nonce = incarnation, nonce
        self.owners.append(incarnation)
        return self.epoch


class Link(ChunkSource):
    """One host's end of the store."""

    def __init__(self, store: Store, incarnation: str) -> None:
        self.store = store
        self.incarnation = incarnation
        self.holds = False
        self.epoch = 0
        self.fetched: list[tuple[str, int]] = []
        self.group: Group | None = None

    async def open(self) -> None:
        """Become the owner, as a host does that opens the group."""
        await self.store.request()
        self.epoch = self.store.claim(self.incarnation, f"opening {self.incarnation}")

    async def sync(self) -> bool:
        """Commit a cut of the group; False while commits are held. `FencedError` when somebody else is the owner."""
        if self.holds or self.group is None:
            return False
        assert not self.group.absent_counts((Residency.ABSENT_PEER,)), "a commit would name what is not here"
        cut = self.group.take()
        try:
            image = dict(self.store.images.get(self.store.generation, {}))
            for name, part in cut.volumes.items():
                size = part.geometry.size
                content = bytearray(image.get(name, bytes(size)))
                for chunk in part.data.tolist():
                    offset, length = part.geometry.extent_of(chunk)
                    content[offset : offset + length] = await part.read(chunk)
                    part.release(chunk)
                for first, limit in part.zeros:
                    start, stop = first * part.geometry.chunk_size, limit * part.geometry.chunk_size
                    content[start : min(stop, size)] = bytes(min(stop, size) - start)
                image[name] = bytes(content)
            await self.store.request()
            if self.holds:
                return False
            if (self.store.epoch, self.store.incarnation) != (self.epoch, self.incarnation):
                raise FencedError("somebody else owns the group")
            self.store.generation += 1
            self.store.images[self.store.generation] = image
            cut.commit()
        finally:
            cut.abandon()
        return True

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        """The newest committed content, whenever the store answers."""
        while True:
            try:
                await self.store.request()
                break
            except UnavailableError:
                await asyncio.sleep(0.1)
        self.fetched.append((volume, chunk))
        content = self.store.images[self.store.generation][volume][chunk * CHUNK : (chunk + 1) * CHUNK]
        return None if content.count(0) == len(content) else content

    # what a migration asks

    def standing(self) -> Standing:
        return Standing(self.epoch, self.incarnation, (self.store.generation,))

    async def hold_commits(self) -> None:
        self.holds = True

    async def release_commits(self) -> None:
        self.holds = False

    async def store_all(self) -> None:
        was_held, self.holds = self.holds, False
        try:
            while not await self.commit():
                await asyncio.sleep(0.1)
        finally:
            self.holds = was_held

    def uploaded(self) -> tuple[int, bool]:
        return 0, False

    async def write_proof(self) -> str:
        await self.store.request()
        proof = f"proof {len(self.store.proofs)}"
        self.store.proofs.add(proof)
        return proof

    async def check_proof(self, token: str) -> None:
        await self.store.request()
        if token not in self.store.proofs:
            raise InvalidRequestError("the other host keeps the group in another store")

    async def erase_proof(self, token: str) -> None:
        self.store.proofs.discard(token)

    async def claim(self, terms: Terms) -> int:
        while True:
            with contextlib.suppress(UnavailableError):
                await self.store.request()
                found = self.store
                expected = (found.epoch, found.incarnation) == (terms.epoch, terms.incarnation)
                if found.nonce != terms.nonce and not (expected and found.generation in terms.generations):
                    raise FencedError("the register shows somebody else")
                self.epoch = found.claim(self.incarnation, terms.nonce)
                return self.epoch
            await asyncio.sleep(0.1)

    async def has_committed(self, terms: Terms) -> bool:
        await self.store.request()
        return self.store.nonce == terms.nonce and self.store.generation > max(terms.generations)

    async def may_have_won(self, terms: Terms) -> bool:
        return self.store.epoch != terms.epoch + 1

    async def reclaim(self, terms: Terms, nonce: str) -> Verdict:
        while True:
            with contextlib.suppress(UnavailableError):
                await self.store.request()
                found = self.store
                if found.nonce == terms.nonce:
                    return Verdict.LOST
                if found.nonce != nonce and (found.epoch, found.incarnation) != (
                    terms.epoch,
                    terms.incarnation,
                ):
                    return Verdict.FENCED
                self.epoch = found.claim(self.incarnation, nonce)
                return Verdict.WON
            await asyncio.sleep(0.1)


# ------------------------------------------------------------------------------------------------- the guest


@attrs.frozen
class Done:
    """One write of the guest, when it is clear what became of it."""

    name: str
    start: int
    content: bytes


class Guest:
    """See the module. It outlives the host process that serves its disks, as a virtual machine does."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        chance: random.Random,
        *,
        pause_s: float = 0.001,
        flushes: bool = False,
    ) -> None:
        """With ``flushes`` it counts on nothing that it has not flushed."""
        self.model = {name: bytearray(size) for name, size in sizes.items()}
        self.running: set[str] = set()
        """On which hosts it runs. More than one is the end of the world."""
        self.requests = 0
        self.history: list[Done] = []
        """Its writes, in order."""
        self.pause_s = pause_s
        self.writes = 0.5
        """How much of what it does is writing."""
        self._chance = chance
        self._flushes = flushes
        self._group: Group | None = None
        self._stamps = itertools.count(1)
        self._changed = Signal()
        self._working: asyncio.Task[None] | None = None
        self._unclear: tuple[str, int, bytes] | None = None
        """A write that nobody has acknowledged: any of its blocks may be there."""

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._changed.until(lambda: self._group is not None)
            async with asyncio.TaskGroup() as tasks:
                if self._group is not None:
                    self._working = tasks.create_task(self._work(self._group))
            self._working = None
            self._changed.notify()
            await asyncio.sleep(self.pause_s)

    async def _work(self, group: Group) -> None:
        if self._unclear is not None:
            await self._look_again(group)
        name = self._chance.choice(sorted(self.model))
        model, volume = self.model[name], group.volumes[name]
        blocks = len(model) // BLOCK
        first = self._chance.randrange(blocks)
        count = min(self._chance.choice([1, 1, 3, 8, 20]), blocks - first)
        start, stop = first * BLOCK, (first + count) * BLOCK
        kind = self._chance.random()
        self.requests += 1
        if kind >= self.writes:
            found = bytes(await volume.read(start, stop - start))
            is_right = found == model[start:stop]  # without a report of the difference, which takes minutes
            assert is_right, f"{name}[{start}:{stop}] is not what was written"
            return
        content = bytes(stop - start)
        zeroes = kind < self.writes / 8
        if not zeroes:
            content = next(self._stamps).to_bytes(8, "little") * ((stop - start) // 8)
        self._unclear = (name, start, content)
        if zeroes:
            await volume.zero(start, stop - start)
        else:
            await volume.write(start, content)
        if self._flushes:
            await volume.flush()
        model[start:stop] = content
        self.history.append(Done(name, start, content))
        self._unclear = None

    async def _look_again(self, group: Group) -> None:
        """After a lost request: see what became of it."""
        assert self._unclear is not None
        name, start, content = self._unclear
        found = bytes(await group.volumes[name].read(start, len(content)))
        model = self.model[name]
        for offset in range(0, len(content), BLOCK):
            block = found[offset : offset + BLOCK]
            old = model[start + offset : start + offset + BLOCK]
            assert block in (bytes(old), content[offset : offset + BLOCK]), (
                f"{name} at {start + offset} is neither"
            )
            model[start + offset : start + offset + BLOCK] = block
        if self._flushes:
            await group.volumes[name].flush()
        self.history.append(Done(name, start, found))
        self._unclear = None

    def start(self, host: str, group: Group) -> None:
        """Run on a host, or find its disks again there."""
        self.running.add(host)
        assert self.running == {host}, f"two guests run: {self.running}"
        self._group = group
        self._changed.notify()

    async def stop(self, host: str) -> None:
        """No request is in flight and none comes any more."""
        if host in self.running:
            self._group = None
            await self._changed.until(lambda: self._working is None)
            self.running.discard(host)

    async def lose_host(self, host: str) -> None:
        """As `lose_disks`, if it runs there or is just being stopped, and wait for the end of the request in flight."""
        if host in self.running:
            self._group = None
            if self._working is not None:
                self._working.cancel()
            await self._changed.until(lambda: self._working is None)

    def lose_disks(self, group: Group) -> None:
        """The process that served them has died; the request in flight fails, the next one waits for a new process."""
        if self._group is group:
            self._group = None
            if self._working is not None:
                self._working.cancel()


class Hooks:
    """The workload's hooks on one host (`silo.p2p.ports.Guest`)."""

    def __init__(self, host: str, guest: Guest, group: Group) -> None:
        self.spent_s = 0.0
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        """How often the hook of that name still fails."""
        self.delay_s = 0.0
        self._host, self._guest, self._group = host, guest, group

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(self.delay_s)
        self.spent_s += self.delay_s
        if self.failing.get(name, 0):
            self.failing[name] -= 1
            raise UnavailableError(f"hook {name} failed")

    async def prepare(self) -> None:
        await self._call("prepare")

    async def quiesce(self) -> None:
        await self._call("quiesce")

    async def suspend(self) -> None:
        await self._guest.stop(self._host)
        await self._call("suspend")

    async def flush(self) -> None:
        await self._call("flush")

    async def capture(self) -> bytes:
        await self._call("capture")
        return b"state of " + self._host.encode()

    async def resume(self, state: bytes) -> None:
        await self._call("resume")
        assert state.startswith(b"state of ")
        self._guest.start(self._host, self._group)

    async def unquiesce(self) -> None:
        await self._call("unquiesce")

    async def unsuspend(self) -> None:
        await self._call("unsuspend")
        self._guest.start(self._host, self._group)

    async def fence(self) -> None:
        await self._call("fence")


class MemoryRecords:
    """Records that survive the object that wrote them."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    async def read_record(self, name: str) -> bytes | None:
        await asyncio.sleep(0)
        return self.content.get(name)

    async def write_record(self, name: str, content: bytes) -> None:
        await asyncio.sleep(0)
        self.content[name] = bytes(content)
        await asyncio.sleep(0)

    async def delete_record(self, name: str) -> None:
        await asyncio.sleep(0)
        self.content.pop(name, None)


# -------------------------------------------------------------------------------------------------- the hosts


class KeptMap:
    """The checkpoint of a map."""

    def __init__(self, states: bytearray) -> None:
        self.states = bytes(states)

    async def checkpoint(self, states: bytes) -> None:
        await asyncio.sleep(0)
        self.states = states
        await asyncio.sleep(0)


class HostSide:
    """One host: what survives its process (devices, maps, records), and what is made anew with each process."""

    def __init__(
        self,
        name: str,
        transport: Transport,
        clock: Clock,
        sizes: Mapping[str, int],
        guest: Guest,
        store: Store | None,
        *,
        settings: MigrationSettings = QUICK,
        residency: Residency = Residency.ABSENT_STORE,
        chance: Callable[[], float] | None = None,
    ) -> None:
        """With ``chance`` the machine can lose power."""
        self.name = name
        self.site = Site(host=name, transport=transport, clock=clock, settings=settings)
        self.records = MemoryRecords()
        make = MemoryDevice if chance is None else VolatileDevice
        self.devices: dict[str, BlockDevice] = {volume: make(size) for volume, size in sizes.items()}
        self.maps = {
            volume: bytearray([residency]) * Geometry(size, CHUNK).chunk_count
            for volume, size in sizes.items()
        }
        self.kept = {volume: KeptMap(states) for volume, states in self.maps.items()}
        self.events: list[MigrationEvent] = []
        self.vetoes: dict[type, str] = {}
        self._guest = guest
        self._store = store
        self._sizes = dict(sizes)
        self._chance = chance
        self._openings = itertools.count(1)
        self.reopen(is_open=False)

    def reopen(self, *, is_open: bool) -> None:
        """What a new process makes of what the old one left."""
        clock = self.site.clock
        self.group = Group("vm1", clock, is_open=is_open)
        for name, size in self._sizes.items():
            chunks = ChunkMap(self.maps[name], Geometry(size, CHUNK).chunk_count)
            keeper = self.kept[name] if self._chance is not None else None
            self.group.add(name, self.devices[name], Geometry(size, CHUNK), chunks=chunks, keeper=keeper)
        self.hooks = Hooks(self.name, self._guest, self.group)
        self.link: Link | None = None
        if self._store is not None:
            self.link = Link(self._store, f"{self.name}-{next(self._openings)}")
            self.link.group = self.group
            for volume in self.group.volumes.values():
                volume.set_source(Residency.ABSENT_STORE, self.link)

    async def holds_record(self, group: str) -> bool:
        """What the reception asks before it denies all knowledge."""
        return HANDOVER_RECORD in self.records.content

    def restart(self) -> None:
        """The process has died: what it left in memory that survives it is made sense of, as a host does."""
        for states in self.maps.values():
            after_restart(np.frombuffer(states, dtype=np.uint8))
        self.reopen(is_open=False)

    async def lose_power(self) -> None:
        """The machine has died: devices keep what was flushed, and some of the rest; maps fall back."""
        for name, device in self.devices.items():
            assert isinstance(device, VolatileDevice)
            assert self._chance is not None
            self.devices[name] = await device.power_loss(self._chance)
            self.maps[name][:] = states_after_power_loss(kept_of(self.kept[name].states)).tobytes()
        self.reopen(is_open=False)

    async def consent(self, event: MigrationEvent) -> None:
        """The observers."""
        self.events.append(event)
        if type(event) in self.vetoes:
            raise UnavailableError(self.vetoes[type(event)])

    @property
    def plugs(self) -> Plugs:
        """What the group brings to a migration."""
        return Plugs(
            records=self.records,
            guest=self.hooks,
            ownership=self.link,
            emit=self.events.append,
            consent=self.consent,
            bytes_store=lambda: CHUNK * len(self.link.fetched) if self.link else 0,
        )

    def image(self) -> dict[str, bytes]:
        """What a guest would read, without hydrating anything."""
        return {
            name: bytes(content)
            for name, volume in self.group.volumes.items()
            if (content := volume.read_nowait(0, volume.geometry.size)) is not None
        }


class World:
    """Hosts a and b, and a guest that runs on a."""

    def __init__(
        self,
        transports: Mapping[str, Transport],
        clock: Clock,
        chance: random.Random,
        *,
        sizes: Mapping[str, int] | None = None,
        with_store: bool = True,
        settings: MigrationSettings = QUICK,
        power: bool = False,
    ) -> None:
        """With ``power``, machines can lose it, and the guest flushes what it counts on."""
        sizes = dict(sizes or {"disk": 64 * CHUNK, "memory": 16 * CHUNK})
        self.clock = clock
        self.store = Store() if with_store else None
        self.guest = Guest(sizes, chance, flushes=power)
        self.a, self.b = (
            HostSide(
                name,
                transports[name],
                clock,
                sizes,
                self.guest,
                self.store,
                settings=settings,
                residency=residency,
                chance=chance.random if power else None,
            )
            for name, residency in (("a", Residency.ZERO), ("b", Residency.ABSENT_STORE))
        )

    async def open(self) -> None:
        """Host a owns the group and its guest runs."""
        if self.a.link is not None:
            await self.a.link.open()
        self.a.group.gate.reopen()
        self.guest.start("a", self.a.group)


async def accept_next(reception: Reception, host: HostSide) -> TargetMigration:
    """The next offer, accepted as a host does."""
    offers = reception.offers()
    offer: IncomingOffer = await anext(offers)
    await offers.aclose()
    return TargetMigration.accept(host.group, offer, host.site, host.plugs)


def dirty_everything(group: Group) -> None:
    """All chunks count as written."""
    for volume in group.volumes.values():
        volume.chunks.mark_many(np.arange(volume.chunks.count), 0x20)


__all__ = [
    "BLOCK", "CHUNK", "QUICK", "Guest", "Hooks", "HostSide", "Link", "MemoryRecords", "Reception",
    "SiloError", "SourceMigration", "Store", "TargetMigration", "World", "accept_next", "dirty_everything",
    "task_group",
]  # fmt: skip
