"""What every test gets without asking, and the few things that it may ask for.

Without asking: an ``async def test_*`` runs on a fresh event loop with a deadline and fails when it leaves a
task behind; every test fails when garbage that it left complains (an unclosed file, a coroutine that nobody
awaited) or when Silo or asyncio logged a warning that the test did not announce through `expect_log`.

For the asking: the fixtures ``clock``, ``expect_log``, ``require_tool`` and ``libnbd``. There are no async
fixtures: an ``async with`` in the test shows who closes what, and when.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from silo.clock import SystemClock
from tests.support.logs import ExpectedLogs
from tests.support.tools import import_libnbd, require_tool

__all__ = ["import_libnbd", "require_tool"]

TEST_TIMEOUT_S = 60
SLOW_TEST_TIMEOUT_S = 900

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, max_examples=300)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default")
)


def pytest_collection_finish() -> None:
    """Let the collection after each test look only at what tests made, not at every imported module."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Let pytest call an ordinary function that runs the coroutine to its end."""
    timeout_s = SLOW_TEST_TIMEOUT_S if pyfuncitem.get_closest_marker("slow") else TEST_TIMEOUT_S
    test = pyfuncitem.obj
    property_test = getattr(test, "hypothesis", None)
    if property_test is not None and inspect.iscoroutinefunction(property_test.inner_test):
        property_test.inner_test = _in_runner(property_test.inner_test, timeout_s)
    elif inspect.iscoroutinefunction(test):
        pyfuncitem.obj = _in_runner(test, timeout_s)


def _in_runner(test: Callable[..., Any], timeout_s: float) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner() as runner:
            runner.run(_with_deadline(test, timeout_s, args, kwargs))

    return run


async def _with_deadline(
    test: Callable[..., Any], timeout_s: float, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    async with asyncio.timeout(timeout_s):
        await test(*args, **kwargs)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        pytest.fail("the test left tasks behind: " + "; ".join(sorted(map(repr, left))))


@pytest.fixture(autouse=True)
def expect_log() -> Iterator[ExpectedLogs]:
    """Announce a warning or an error in the log: ``expect_log("link .* broke")``. All others fail the test."""
    with ExpectedLogs() as logs:
        yield logs
        gc.collect()  # what the garbage has to say belongs to this test
    logs.check()


@pytest.fixture
def clock() -> SystemClock:
    """The real clock, for code that takes one."""
    return SystemClock()


@pytest.fixture(name="require_tool", scope="session")
def require_tool_fixture() -> Callable[..., str]:
    """``require_tool("nbdcopy")``: the program's path; skips the test when it is missing (see `tests.support`)."""
    return require_tool


@pytest.fixture(scope="session")
def libnbd() -> ModuleType:
    """The module ``nbd`` of libnbd, loaded from the system; skips the test when it cannot be."""
    return import_libnbd()
