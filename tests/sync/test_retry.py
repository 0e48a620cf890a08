"""Delays between attempts."""

from __future__ import annotations

import asyncio

import pytest

from silo.errors import InvalidRequestError, UnavailableError
from silo.sync.retry import Backoff, bounded
from silo.sync.settings import RetrySettings
from silo.testing.loop import SimulatedClock, run_simulated


def test_delays_double_up_to_the_largest_and_half_of_each_is_chance() -> None:
    async def scenario(clock: SimulatedClock) -> None:
        backoff = Backoff(clock, RetrySettings(delay_min_s=1.0, delay_max_s=8.0))
        for nominal in (1.0, 2.0, 4.0, 8.0, 8.0):
            delay = backoff.failed(UnavailableError("x"))
            assert nominal / 2 <= delay < nominal
        assert backoff.trouble is not None
        assert backoff.trouble.attempts == 5
        backoff.succeeded()
        assert backoff.trouble is None
        assert backoff.failed(UnavailableError("x")) < 1.0
        for _ in range(2000):
            assert backoff.failed(UnavailableError("x")) <= 8.0

    run_simulated(scenario, seed=1)


def test_a_refusal_is_asked_about_again_after_a_long_while() -> None:
    async def scenario(clock: SimulatedClock) -> None:
        backoff = Backoff(clock, RetrySettings(delay_min_s=1.0, delay_max_s=8.0, refused_delay_s=100.0))
        for _ in range(20):
            assert 50 <= backoff.failed(InvalidRequestError("access denied")) <= 100
        backoff.succeeded()
        assert backoff.failed(UnavailableError("x")) < 1.0

    run_simulated(scenario, seed=1)


def test_a_request_without_an_answer_has_an_unknown_outcome() -> None:
    async def scenario(clock: SimulatedClock) -> None:
        before = clock.monotonic()
        with pytest.raises(UnavailableError):
            await bounded(lambda: asyncio.sleep(100), 5.0)
        assert clock.monotonic() - before == pytest.approx(5.0)
        assert await bounded(lambda: asyncio.sleep(1, "answer"), 5.0) == "answer"

    run_simulated(scenario, seed=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"delay_min_s": 0.0},
        {"delay_min_s": 3.0, "delay_max_s": 2.0},
        {"request_timeout_s": 0.0},
        {"refused_delay_s": 0.0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError):
        RetrySettings(**wrong)
