"""Blocking calls, run to completion.

``asyncio.to_thread`` returns at once when it is cancelled, while its thread goes on: a write that was
"cancelled" can land seconds later, over newer data. `run_to_completion` waits until the thread has really
finished, remembers that it was cancelled, and re-raises the cancellation then. So a blocking call must be
bounded by itself; no deadline can shorten it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

__all__ = ["run_to_completion"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def run_to_completion(executor: ThreadPoolExecutor | None, call: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run ``call(*args)`` in a thread and return what it returns, or raise what it raises.

    ``None`` means the loop's default executor. When the caller is cancelled, this waits for the thread
    first and then raises ``CancelledError``; the thread's own result or error is dropped in that case.
    """
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(executor, call, *args)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            # wait() leaves the future alone when we are cancelled; awaiting it would cancel it.
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()  # marks it as retrieved
        raise cancelled
    return future.result()
