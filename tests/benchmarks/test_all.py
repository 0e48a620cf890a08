"""The command that runs all benchmarks: what it would run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.__main__ import BUDGET_S, NAMES, PROGRAMS, Program, command_of, run


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_exist_and_write_their_samples(name: str) -> None:
    program = PROGRAMS[name]
    assert importlib.util.find_spec(f"{program.module}.__main__") is not None
    command = command_of(program, quick=True, document=Path("out.json"))
    assert command[-2:] == ["--json", "out.json"]
    assert "--quick" in command


def test_everything_has_its_turn() -> None:
    assert set(NAMES) == {*PROGRAMS, "tracking"}


def test_the_budget_is_ten_minutes() -> None:
    assert BUDGET_S < 600


def test_a_benchmark_without_time_left_is_ended() -> None:
    """With everything that it has started; and it counts as failed."""
    assert run(Program("http.server", ("0",), ()), quick=False, timeout_s=0.0) is None
