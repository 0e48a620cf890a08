"""Tests that run on the deterministic loop, whose time costs nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from silo.testing.loop import run_simulated
from tests.support.logs import ExpectedLogs

__all__ = ["simulated"]


def simulated(scenario: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[ExpectedLogs], None]:
    """Make a test of a scenario that takes a clock, and perhaps ``expect_log``."""
    takes_log = len(inspect.signature(scenario).parameters) == 2

    def test(expect_log: ExpectedLogs) -> None:
        run_simulated(lambda clock: scenario(clock, expect_log) if takes_log else scenario(clock), seed=1)

    test.__doc__ = scenario.__doc__
    return test
