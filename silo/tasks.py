"""A task group whose failure is one error.

`asyncio.TaskGroup` raises a group of exceptions even when one task has failed. Our callers want to know what kind
of thing went wrong, and the first failure is what cancelled all others. And when the caller itself was cancelled,
that is what it must hear, even if a task failed at the same moment: a loop that goes on after an error would
otherwise go on for ever.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from silo.errors import SiloError

__all__ = ["collect", "task_group"]


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """``async with task_group() as tasks``: as `asyncio.TaskGroup`, but raises the first error itself."""
    caller = asyncio.current_task()
    cancels = caller.cancelling() if caller else 0
    early = False
    try:
        async with asyncio.TaskGroup() as tasks:
            try:
                yield tasks
            finally:
                early = _cancelled_its_caller(tasks)
    except BaseExceptionGroup as group:
        if caller and sys.version_info < (3, 13) and _cancelled_its_caller(tasks) and not early:
            # A group cancels its caller to wake it, and before 3.13 it does not take that back when the caller was
            # waiting at the end of the block already. Every asyncio.timeout around us would count wrongly.
            caller.uncancel()
        if caller and caller.cancelling() > cancels:
            raise asyncio.CancelledError from group
        raise group.exceptions[0] from None


def _cancelled_its_caller(tasks: asyncio.TaskGroup) -> bool:
    return bool(getattr(tasks, "_parent_cancel_requested", False))


async def collect(errors: list[SiloError], step: Awaitable[None]) -> None:
    """One step of closing: an error is remembered, and the next step is taken all the same."""
    try:
        await step
    except SiloError as error:
        errors.append(error)
