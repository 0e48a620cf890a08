"""A workload made of functions of this process, and the workload that does nothing.

For programs that embed Silo and have little to say, and for tests. A program with more to keep in mind than a
few functions is better served by a subclass of `silo.Workload`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from silo.abc import Capabilities, Step, Workload
from silo.errors import InvalidRequestError

__all__ = ["HOOKS", "CallbackWorkload", "NullWorkload"]

HOOKS = (
    "prepare", "quiesce", "suspend", "flush", "capture", "resume", "unquiesce", "unsuspend", "fence", "probe",
)  # fmt: skip
"""What a workload can be asked to do, in the order in which a migration asks."""


class NullWorkload(Workload):
    """Nobody is there: what stands in for a workload that was not given."""

    async def suspend(self, step: Step) -> None:
        """Nothing runs."""

    async def resume(self, step: Step, state: bytes) -> None:
        """Nothing is to run."""

    async def unsuspend(self, step: Step) -> None:
        """Nothing was suspended."""


class CallbackWorkload(NullWorkload):
    """``CallbackWorkload(suspend=vm.pause, resume=start_vm, unsuspend=vm.unpause)``.

    Each function gets what the hook of that name in `silo.Workload` gets, and promises what it promises; it may
    be ``async def`` or not, as there. A hook without a function does nothing.
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        if unknown := sorted(set(hooks) - set(HOOKS)):
            raise InvalidRequestError(
                f"a workload has no hook {', '.join(unknown)}", hint=f"hooks are {', '.join(HOOKS)}"
            )
        self._caps = Capabilities(
            quiesce="quiesce" in hooks or "unquiesce" in hooks, captures_state="capture" in hooks
        )
        for name, hook in hooks.items():
            setattr(self, name, hook)

    def caps(self) -> Capabilities:
        return self._caps
