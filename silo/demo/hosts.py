"""The demo's processes: two daemons that stand for two hosts, and the guest.

Each is a child of the demo, reports on its standard output in JSON lines, and is killed when the demo ends,
however it ends. What a child says on standard error is kept and shown when it dies without being asked to.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, Self

import attrs
import msgspec

from silo.control import ControlClient
from silo.demo.guest import GuestPlan, GuestStats
from silo.demo.say import say
from silo.errors import SiloError
from silo.threads import run_to_completion

__all__ = ["Child", "DaemonHost", "GuestProcess"]

START_TIMEOUT_S = 60.0
"""A cold Python on a busy machine with two cores takes a few seconds; ten times that is a fault."""

SAY = Path(__file__).with_name("say.py")


@attrs.define
class Child:
    """A process with a name, and the log that it writes its errors to."""

    name: str
    command: list[str]
    log: Path
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=1 << 20,
            )

    async def line(self) -> dict[str, Any]:
        """The next line of its output. `SiloError` with its last words when it has died."""
        if self.process is None or self.process.stdout is None:
            raise SiloError(f"{self.name} was not started")
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await self.process.stdout.readline()
        if not line:
            raise SiloError(f"{self.name} died", hint=self.last_words())
        answer: dict[str, Any] = msgspec.json.decode(line)
        if "error" in answer:
            raise SiloError(f"{self.name}: {answer['error']['message']}", hint=answer["error"]["hint"])
        return answer

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        return self.log.read_text(errors="replace").strip()[-2000:]

    async def end(self, how: signal.Signals, timeout_s: float = 60.0) -> int:
        """Send a signal and wait for the end; SIGKILL when that takes too long. Returns the exit code."""
        if self.process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(how)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            return await self.process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end(signal.SIGKILL)


class DaemonHost(Child):
    """A ``silo serve`` in its own directory."""

    def __init__(self, name: str, directory: Path, config: dict[str, Any], guest_control: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.state = directory / "state"
        hook = (
            f"{shlex.quote(sys.executable)} -S -E {shlex.quote(str(SAY))} {shlex.quote(str(guest_control))}"
        )
        workload = {
            "suspend": f"{hook} suspend",
            "unsuspend": f'{hook} resume "$SILO_URI"',
            "resume": f'{hook} resume "$SILO_URI"',
        }
        path = directory / "silo.toml"
        path.write_text(_toml({"state": str(self.state), **config, "workload": workload}))
        command = [sys.executable, "-m", "silo", "serve", str(path), "--json"]
        super().__init__(name, command, directory / "log")

    async def wait_ready(self) -> None:
        """Return when the daemon says that it serves. `SiloError` when it does not come to that."""
        while (await self.line()).get("event") != "ready":
            pass

    def control(self) -> ControlClient:
        """A connection to its control socket."""
        return ControlClient(self.state / "control.sock")

    async def call(self, verb: str, **args: Any) -> Any:
        """One control call."""
        async with self.control() as daemon:
            return await daemon.call(verb, **args)


class GuestProcess(Child):
    """The guest, and its control socket."""

    def __init__(self, directory: Path, plan: GuestPlan) -> None:
        self.plan = plan
        text = msgspec.json.encode(plan).decode()
        super().__init__(
            "the guest", [sys.executable, "-m", "silo.demo.guest", text], directory / "guest.log"
        )

    async def say(self, line: str) -> str:
        """One line to the guest, and its answer."""
        try:
            return await run_to_completion(None, say, self.plan.control, line)
        except OSError as error:
            fault = msgspec.convert(await self.line(), GuestStats).fault
            raise SiloError(
                f"the guest has ended: {fault or 'nobody knows why'}", hint=self.last_words()
            ) from error

    async def stats(self, verb: str = "stats") -> GuestStats:
        """What it has done so far; ``stop`` ends it, too. `SiloError` when it has read a wrong byte."""
        stats = msgspec.json.decode(await self.say(verb), type=GuestStats)
        if stats.fault:
            raise SiloError(f"the guest found a fault: {stats.fault}")
        return stats


def _toml(values: dict[str, Any], prefix: str = "") -> str:
    """Enough TOML for a configuration: strings, numbers, booleans, lists of strings, and tables of these."""
    plain = [(key, value) for key, value in values.items() if not isinstance(value, dict)]
    tables = [(key, value) for key, value in values.items() if isinstance(value, dict)]
    text = "".join(f"{key} = {msgspec.json.encode(value).decode()}\n" for key, value in plain)
    for key, value in tables:
        path = f"{prefix}{key}"
        text += f"\n[{path}]\n" + _toml(value, f"{path}.")
    return text
