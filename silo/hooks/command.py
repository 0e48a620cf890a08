"""A workload made of shell commands: any manager of machines that has a command line can be plugged in.

Each hook is one command for ``/bin/sh -c``, as in the ``[workload]`` table of the configuration. A hook without a
command does nothing. A command inherits the daemon's environment, with these additions:

``SILO_GROUP``, ``SILO_ROLE`` (``source`` or ``target``), ``SILO_STEP`` (the hook's name)
    what is going on;
``SILO_DEADLINE_S``
    seconds until the command will be killed;
``SILO_URI_<VOLUME>``
    where the guest reaches a volume: its name in capitals, with ``_`` for whatever is no letter or digit;
``SILO_URI``
    the same, if the group has one volume only.

Exit status 0 is success; all else fails the hook, and the end of what the command said goes into the error, so
commands should not print secrets. Neither commands nor their environment are ever logged. The standard output
of ``capture`` is the state, and ``resume`` finds it in its standard input. ``probe`` prints ``running``,
``suspended`` or ``gone``; silence means running. An overdue command is killed with everything that it started,
see `silo.hooks.shell`; what a command leaves running after its end lives on.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections import Counter
from collections.abc import Mapping

from silo.abc import STATE_SIZE_MAX, Buffer, Capabilities, Clock, Health, Step, Workload
from silo.errors import InvalidRequestError, UnavailableError
from silo.hooks.inprocess import HOOKS
from silo.hooks.shell import ShellOutcome, run_shell

__all__ = ["CommandWorkload", "step_environment"]


class CommandWorkload(Workload):
    """See the module. ``commands`` maps names of hooks to commands.

    A command may take until its step's deadline, and no longer than ``timeout_s``. Hooks raise
    `UnavailableError` when the command failed or was overdue. Cancellation kills the command and waits for its
    end, which takes a second if it ignores SIGTERM. Concurrent calls are allowed.
    """

    def __init__(self, commands: Mapping[str, str], clock: Clock, *, timeout_s: float = math.inf) -> None:
        if unknown := sorted(set(commands) - set(HOOKS)):
            raise InvalidRequestError(
                f"there is no workload command {', '.join(unknown)}", hint=f"hooks are {', '.join(HOOKS)}"
            )
        if timeout_s <= 0:
            raise InvalidRequestError(f"the timeout of workload commands must be positive, not {timeout_s}")
        self._commands = {name: command for name, command in commands.items() if command.strip()}
        self._clock = clock
        self._timeout_s = timeout_s

    def caps(self) -> Capabilities:
        """What there are commands for. Whatever is suspended without a command cannot run on by one."""
        return Capabilities(
            quiesce="quiesce" in self._commands or "unquiesce" in self._commands,
            captures_state="capture" in self._commands,
            can_unsuspend="unsuspend" in self._commands or "suspend" not in self._commands,
        )

    async def prepare(self, step: Step) -> None:
        """Run the command ``prepare``."""
        await self._run("prepare", step)

    async def quiesce(self, step: Step) -> None:
        """Run the command ``quiesce``."""
        await self._run("quiesce", step)

    async def suspend(self, step: Step) -> None:
        """Run the command ``suspend``."""
        await self._run("suspend", step)

    async def flush(self, step: Step) -> None:
        """Run the command ``flush``."""
        await self._run("flush", step)

    async def capture(self, step: Step) -> bytes:
        """What the command ``capture`` wrote. `CapacityError` when that is more than `STATE_SIZE_MAX`."""
        outcome = await self._run("capture", step, output_max=STATE_SIZE_MAX)
        return b"" if outcome is None else outcome.output

    async def resume(self, step: Step, state: bytes) -> None:
        """Run the command ``resume`` with the state as its input."""
        await self._run("resume", step, stdin=state)

    async def unquiesce(self, step: Step) -> None:
        """Run the command ``unquiesce``."""
        await self._run("unquiesce", step)

    async def unsuspend(self, step: Step) -> None:
        """Run the command ``unsuspend``."""
        await self._run("unsuspend", step)

    async def fence(self, step: Step) -> None:
        """Run the command ``fence``."""
        await self._run("fence", step)

    async def probe(self, step: Step) -> Health:
        """What the command ``probe`` says; `Health.UNKNOWN` without one, or when it says something else."""
        outcome = await self._run("probe", step, output_max=STATE_SIZE_MAX)
        if outcome is None:
            return Health.UNKNOWN
        word = outcome.output.decode(errors="replace").strip().lower() or Health.RUNNING.value
        return Health(word) if word in {health.value for health in Health} else Health.UNKNOWN

    async def _run(
        self, name: str, step: Step, *, stdin: Buffer | None = None, output_max: int | None = None
    ) -> ShellOutcome | None:
        """Run a hook's command; ``None`` when it has none."""
        if (command := self._commands.get(name)) is None:
            return None
        now = self._clock.monotonic()
        deadline = min(step.deadline, now + self._timeout_s)
        env = os.environ | step_environment(name, step, deadline - now)
        patience = asyncio.timeout_at(None if math.isinf(deadline) else deadline)
        try:
            async with patience:
                outcome = await run_shell(command, env, self._clock, stdin=stdin, output_max=output_max)
        except TimeoutError:
            raise UnavailableError(
                "its command was not done by its deadline, and was killed",
                hint="the log has the last that it said",
            ) from None
        if outcome.status:
            raise UnavailableError(outcome.complaint)
        return outcome


def step_environment(name: str, step: Step, left_s: float) -> dict[str, str]:
    """The variables that a step adds. Volumes whose names give the same variable get none."""
    env = {
        "SILO_GROUP": step.group,
        "SILO_ROLE": step.role.value,
        "SILO_STEP": name,
        "SILO_DEADLINE_S": f"{max(0.0, left_s):.3f}",
    }
    variables = {volume: "SILO_URI_" + re.sub(r"[^A-Z0-9]", "_", volume.upper()) for volume in step.devices}
    uses = Counter(variables.values())
    env |= {variables[volume]: uri for volume, uri in step.devices.items() if uses[variables[volume]] == 1}
    if len(step.devices) == 1:
        env["SILO_URI"] = next(iter(step.devices.values()))
    return env
