"""A task group whose failure is one error.

`asyncio.TaskGroup` raises a group of exceptions even when one task has failed. Our callers want to know what kind
of thing went wrong, and the first failure is what cancelled all others. And when the caller itself was
cancelled, that is what it must hear, even if a task failed at the same moment: a loop that goes on after an error
would otherwise go on for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["task_group"]


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """``async with task_group() as tasks``: as `asyncio.TaskGroup`, but raises the first error itself."""
    caller = asyncio.current_task()
    cancels = caller.cancelling() if caller else 0
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        if caller and caller.cancelling() > cancels:
            raise asyncio.CancelledError from group
        raise group.exceptions[0] from None
