"""A real daemon that is killed by each of its workload's own hooks, on the way to the store and on the way back.

A hook that kills its daemon dies in the middle of that step. Afterwards the daemon is started again, with hooks that
behave, and the command is repeated: the group is always on one side, and always whole.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from silo.clock import SystemClock
from silo.errors import SiloError
from silo.exports.nbd_client import NbdClient
from tests.support.daemons import Daemon

pytestmark = pytest.mark.crash

MIB = 1 << 20
SIZE = 8 * MIB
CONTENT = SystemClock().token(2 * MIB)

KILL = "kill -9 $PPID; sleep 5"
"""The shell's parent is the daemon."""


def config(path: Path, *, opens: bool, **hooks: str) -> Path:
    """A daemon's configuration; every hook leaves a line in a file, or does what it is told instead."""
    lines = [f'store = "file://{path}/store"', f'listen = "unix:{path}/{{group}}.sock"']
    lines += ["[sync]", 'interval = "1h"', "[workload]"]
    for name in ("suspend", "capture", "resume", "unsuspend", "fence"):
        told = hooks.get(name, f"echo {name} >> {path}/calls" + ("; cat" if name == "capture" else ""))
        lines.append(f"{name} = {told!r}")
    if opens:
        lines += ["[groups.vm1.volumes.disk]", f'path = "{path}/disk.img"', f"size = {SIZE}"]
    file = path / "silo.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


async def write_and_check(path: Path, place: int) -> None:
    """All of the content is there, and more is written at ``place``."""
    async with await NbdClient.connect(f"unix:{path}/vm1.sock") as guest:
        assert bytes(await guest.read(0, len(CONTENT))) == CONTENT
        for before in range(3, place):
            assert bytes(await guest.read(before * MIB, 5)) == b"later"
        await guest.write(place * MIB, b"later")
        await guest.flush()


async def killed(daemon: Daemon, verb: str) -> None:
    """The command ends with the daemon."""
    with pytest.raises((SiloError, OSError)):
        await daemon.call(verb, group="vm1")
    await daemon.kill()


@pytest.mark.parametrize("hook", ["suspend", "capture", "resume"])
async def test_killed_in_a_hook_and_told_again(tmp_path: Path, hook: str) -> None:
    """Whichever it was, nothing is lost, and the second attempt succeeds."""
    file = config(tmp_path, opens=True, **({hook: KILL} if hook != "resume" else {}))
    async with Daemon(tmp_path / "a", str(file)) as a:
        async with await NbdClient.connect(f"unix:{tmp_path}/vm1.sock") as guest:
            await guest.write(0, CONTENT)
        if hook != "resume":
            await killed(a, "hibernate")
            config(tmp_path, opens=True)
            await a.start()
            assert (await a.group("vm1") or {})["state"] == "running"
        await write_and_check(tmp_path, 3)
        assert (await a.call("hibernate", group="vm1"))["outcome"] == "stored"
    config(tmp_path, opens=False, **({"resume": KILL} if hook == "resume" else {}))
    async with Daemon(tmp_path / "b", str(file)) as b:
        if hook == "resume":
            await killed(b, "resume")
            config(tmp_path, opens=False)
            await b.start()  # it goes on with the resumption by itself
            await b.wait_group("vm1", lambda group: group["state"] == "running")
            assert (tmp_path / "calls").read_text().split()[-1] == "resume"
        else:
            await b.call("resume", group="vm1")
        await write_and_check(tmp_path, 4)
        assert (await b.call("hibernate", group="vm1"))["outcome"] == "stored"
