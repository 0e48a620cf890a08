"""The failure table of docs/operations.md, carried out: real daemons, slow links, a guest that checks every read.

Host a has the group, host b takes it, and S3 is a third host; each has a network namespace of its own. At each stage
of a move one of them is killed, frozen or cut off, and later it comes back. Whatever happened, the group must then run
on exactly one host, with every byte that was acknowledged; it must arrive on b, if need be by a second move; and what
a restorer finds in S3 must be the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest

from silo.clock import SystemClock
from silo.control import ControlClient, Result
from silo.errors import SiloError
from silo.exports.nbd_client import NbdClient
from tests.support.daemons import Daemon
from tests.support.live_guest import LiveGuest, live_guest
from tests.support.netns import Lab, called, lab, require_namespaces
from tests.support.s3 import S3Server, moto_server

pytestmark = [pytest.mark.crash, pytest.mark.slow]

MIB = 1 << 20
SIZE = 24 * MIB
SHORT_S = 2.0
LONG_S = 12.0
"""Longer than a silent link is believed in."""
PATIENCE_S = 150.0

MOMENTS = {
    "pre-copy": {"event": "phase-entered", "phase": "pre-copy"},
    "the switchover": {"event": "phase-entered", "phase": "switchover"},
    "post-copy": {"event": "switched-over"},
    "evacuated": {"event": "phase-entered", "phase": "evacuated"},
}


@attrs.define
class Scene:
    """Two hosts, the store, and the guest."""

    path: Path
    lab: Lab
    a: Daemon
    b: Daemon
    s3: S3Server
    store: str
    guest: LiveGuest
    events: list[dict[str, Any]] = attrs.field(factory=list)
    seen: asyncio.Event = attrs.field(factory=asyncio.Event)

    @property
    def peer(self) -> str:
        return f"tcp:{self.lab.addresses['b']}:5170"

    # ---- the move

    async def move(self) -> None:
        """Ask a to move the group, and note what it says, until it says no more."""
        why = ""
        try:
            async with ControlClient(self.a.state / "control.sock") as client:
                async for line in client.stream(
                    "migrate", group="vm1", to=self.peer, deadline_s=60.0, evacuate=False
                ):
                    event = {"event": "report"} if isinstance(line, Result) else line
                    self.events.append(event)
                    self.seen.set()
        except (SiloError, OSError) as error:
            why = str(error)
        self.events.append({"event": "silence", "why": why})
        self.seen.set()

    async def wait_moment(self, name: str) -> None:
        """Until the move has come so far, or has ended before."""
        wanted = MOMENTS[name].items()
        while not any(wanted <= event.items() or event["event"] == "silence" for event in self.events):
            self.seen.clear()
            await self.seen.wait()

    def told(self) -> str:
        """What was seen and logged, for the message of a failure."""
        events = "\n".join(str(event) for event in self.events if event.get("event") != "progress")
        return f"{events}\n--- a\n{self.a.log[-3000:]}\n--- b\n{self.b.log[-3000:]}"

    # ---- trouble

    async def strike(self, whom: str, how: str) -> None:
        """Do it, and undo it after a while."""
        host = {"source": self.a, "target": self.b}.get(whom)
        lasts_s = LONG_S if how.endswith("for long") else SHORT_S
        if how == "killed" and host is not None:
            await host.kill()
            await asyncio.sleep(SHORT_S / 4)
            await self.start(host)
        elif how.startswith("frozen"):
            freeze = host.signal if host is not None else self._signal_store
            freeze(signal.SIGSTOP)
            await asyncio.sleep(lasts_s)
            freeze(signal.SIGCONT)
        elif how.startswith("cut off"):
            cable = {"source": "a", "target": "b", "store": "s"}[whom]
            await self.lab.link(cable, up=False)
            await asyncio.sleep(lasts_s)
            await self.lab.link(cable, up=True)
        else:
            raise AssertionError(f"nobody knows how {whom} is {how}")

    def _signal_store(self, number: signal.Signals) -> None:
        os.kill(self.s3.pid, number)

    async def start(self, host: Daemon) -> None:
        """Start a host again. A source whose group has gone may refuse to serve it; that is what it should do."""
        with contextlib.suppress(SiloError):
            await host.start()

    # ---- what must be true in the end

    async def settled(self) -> Daemon:
        """The one host on which the group runs again."""
        while True:
            running = [host for host in (self.a, self.b) if await self._runs(host)]
            if len(running) == 1:
                before = self.guest.ops
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5):
                        await self.guest.wait_ops(50)
                assert not self.guest.faults
                if self.guest.ops >= before + 50:
                    return running[0]
            await asyncio.sleep(0.2)

    async def _runs(self, host: Daemon) -> bool:
        with contextlib.suppress(SiloError, OSError):
            group = await host.group("vm1")
            return group is not None and group["state"] == "running"
        return False

    async def check(self) -> None:
        """Everything has arrived on b, and in the store."""
        await self.b.wait_group("vm1", lambda group: group["hydrated"])
        await self.guest.stop()
        assert not self.guest.faults
        async with await NbdClient.connect(f"unix:{self.path}/b.sock") as disk:
            for offset in range(0, SIZE, MIB):
                found = bytes(await disk.read(offset, MIB))
                assert found == self.guest.model[offset : offset + MIB], f"MiB {offset // MIB} is wrong"
        await self.b.call("sync", group="vm1")
        restored = self.path / "restored.img"
        restore = await asyncio.create_subprocess_exec(
            *self.lab.prefix("b"), sys.executable, "-m", "silo", "restore", "vm1", "--store", self.store,
            "--volume", "disk", "--to", str(restored), env={**os.environ, **self.s3.environment()},
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert await restore.wait() == 0
        is_stored = restored.read_bytes() == self.guest.model
        assert is_stored, "what was stored is not what was written"


def configure(path: Path, name: str, store: str, hooks: dict[str, str], **keys: Any) -> str:
    """A configuration file. TOML's strings are JSON's."""
    lines = [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in keys.items()]
    lines += [
        f'store = "{store}"',
        f'listen = "unix:{path}/{name}.sock"',
        "",
        "[sync]",
        'interval = "1s"',
        "",
    ]
    lines += [
        "[workload]",
        *(f"{key} = {msgspec.json.encode(value).decode()}" for key, value in hooks.items()),
    ]
    if name == "a":
        lines += ["", "[groups.vm1.volumes.disk]", f'path = "{path}/disk.img"']
    file = path / f"{name}.toml"
    file.write_text("\n".join(lines))
    return str(file)


@contextlib.asynccontextmanager
async def scene(path: Path, seed: int) -> AsyncIterator[Scene]:
    """The group runs on a, its guest works, and the first generation is stored."""
    content = SystemClock().token(SIZE)
    (path / "disk.img").write_bytes(content)
    async with lab("a", "b", "s") as net, live_guest(content, path / "guest.sock", seed) as guest:
        with net.inside("s") as executor:
            server = moto_server(host=net.addresses["s"])
            s3 = await called(executor, server.__enter__)
            try:
                await called(executor, lambda: s3.make_bucket("bucket"))
                store = s3.url("bucket", "prefix")
                daemons = {
                    name: Daemon(
                        path / name,
                        configure(path, name, store, guest.hooks(name), **keys),
                        prefix=net.prefix(name),
                        environment=s3.environment(),
                    )
                    for name, keys in {
                        "a": {"insecure_peer": True},
                        "b": {"peer": f"tcp:{net.addresses['b']}:5170", "insecure_peer": True},
                    }.items()
                }
                async with daemons["a"] as a, daemons["b"] as b:
                    await a.call("sync", group="vm1")
                    group = await a.group("vm1")
                    assert group is not None
                    await guest.obey("a", "resume", group["volumes"][0]["uris"][0])
                    await guest.wait_ops(100)
                    yield Scene(path, net, a, b, s3, store, guest)
                    for host in (a, b):
                        with contextlib.suppress(ProcessLookupError, AssertionError):
                            host.signal(signal.SIGCONT)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(s3.pid, signal.SIGCONT)
                await called(executor, lambda: server.__exit__(None, None, None))


STRIKES = [
    *((whom, how, moment) for moment in MOMENTS for whom in ("source", "target") for how in ("killed", "frozen")),
    *(("target", "cut off", moment) for moment in MOMENTS),
    *(("store", "frozen", moment) for moment in MOMENTS),
    *((whom, "frozen for long", "the switchover") for whom in ("source", "target")),
    *(("source", "cut off for long", moment) for moment in ("the switchover", "post-copy")),
]  # fmt: skip


@pytest.mark.parametrize(("whom", "how", "moment"), STRIKES, ids=lambda value: value.replace(" ", "-"))
async def test_whatever_happens_the_group_arrives(whom: str, how: str, moment: str, tmp_path: Path) -> None:
    """One line and one column of the table."""
    require_namespaces()
    async with scene(tmp_path, seed=len(whom) * 100 + len(moment)) as world:
        async with asyncio.TaskGroup() as tasks:
            moving = tasks.create_task(world.move())
            await world.wait_moment(moment)
            await world.strike(whom, how)
            async with asyncio.timeout(PATIENCE_S):
                owner = await world.settled()
            if owner is world.a:
                await moving
                await world.move()
                async with asyncio.timeout(PATIENCE_S):
                    owner = await world.settled()
            assert owner is world.b, world.told()
            moving.cancel()
        await world.check()
