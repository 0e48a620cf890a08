"""Real ``silo serve`` processes, for tests that kill them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from silo.control import ControlClient, Result
from silo.errors import SiloError

START_TIMEOUT_S = 60.0
"""Ten times what a cold start takes on a busy machine."""


class Daemon:
    """One host: a state directory, and a process that can be killed and started again."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``prefix`` comes before the command, as ``ip netns exec NAME`` does."""
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.state = directory / "state"
        self._arguments = arguments
        self._prefix = tuple(prefix)
        self._environment = dict(environment or {})
        self._process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def start(self) -> None:
        """Start the process and wait until it says that it is ready."""
        with (self.directory / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._prefix, sys.executable, "-m", "silo", "serve", "--state", str(self.state), "--json",
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self._environment},
            )  # fmt: skip
        assert self._process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            while line := await self._process.stdout.readline():
                event = msgspec.json.decode(line)
                if event.get("event") == "ready":
                    return
                if "error" in event:
                    raise SiloError(event["error"]["message"])
        raise SiloError(f"the daemon ended: {self.log[-2000:]}")

    async def kill(self) -> None:
        """``kill -9``, and wait until it is gone."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        return await self._end(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal that it survives: SIGSTOP, SIGCONT."""
        assert self._process is not None
        self._process.send_signal(number)

    async def _end(self, how: signal.Signals) -> int:
        if self._process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(
                self._process.pid, how
            )  # `send_signal` would reap a process that somebody else has killed
        async with asyncio.timeout(START_TIMEOUT_S):
            code = await self._process.wait()
        self._process = None
        return code

    async def call(self, verb: str, **args: Any) -> Any:
        """One control call."""
        async with ControlClient(self.state / "control.sock") as client:
            return await client.call(verb, **args)

    async def group(self, name: str) -> dict[str, Any] | None:
        """The status of a group, if it is there."""
        groups = (await self.call("status"))["groups"]
        return next((group for group in groups if group["name"] == name), None)

    async def migrate(self, group: str, to: str, until: Any = None) -> dict[str, Any]:
        """Start a migration and follow it: to the report, or to the first event that ``until`` likes."""
        async with ControlClient(self.state / "control.sock") as client:
            async for line in client.stream("migrate", group=group, to=to, deadline_s=60.0, evacuate=False):
                if isinstance(line, Result):
                    return {"report": line.value}
                if until is not None and until(line):
                    os.kill(self._process.pid, 0) if self._process else None
                    return line
        raise SiloError("the migration ended without a word")

    async def wait_group(self, name: str, accept: Any) -> dict[str, Any]:
        """Ask for the status of a group until ``accept`` likes it. Bounded by the test's own limit."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                found = await self.group(name)
                if found is not None and accept(found):
                    return found
                await asyncio.sleep(0.05)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
