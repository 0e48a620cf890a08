"""Single flight: concurrent calls for the same thing share one run.

The first caller runs it in its own task, so there is no task without an owner; the others wait for its outcome and
share it, errors included. When the first caller is cancelled, one of the others runs it anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["SingleFlight"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SingleFlight(Generic[K, T]):
    """Runs in progress, by key."""

    def __init__(self) -> None:
        self._flights: dict[K, asyncio.Future[T]] = {}

    async def run(self, key: K, call: Callable[[], Awaitable[T]]) -> T:
        """The result of ``call()``, or of the run for the same key that is in progress.

        No deadline: it takes as long as the call does.
        """
        while (flight := self._flights.get(key)) is not None:
            await asyncio.wait((flight,))  # unlike awaiting it, this does not cancel it with us
            if not flight.cancelled():
                return flight.result()
        flight = asyncio.get_running_loop().create_future()
        self._flights[key] = flight
        try:
            result = await call()
        except asyncio.CancelledError:
            flight.cancel()
            raise
        except BaseException as error:
            flight.set_exception(error)
            flight.exception()  # marks it as retrieved: perhaps nobody else waits
            raise
        else:
            flight.set_result(result)
            return result
        finally:
            del self._flights[key]
