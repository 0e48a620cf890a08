"""The command that runs all benchmarks: what it would run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, PROGRAMS, command_of


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_exist_and_write_their_samples(name: str) -> None:
    program = PROGRAMS[name]
    assert importlib.util.find_spec(f"{program.module}.__main__") is not None
    command = command_of(program, quick=True, document=Path("out.json"))
    assert command[-2:] == ["--json", "out.json"]
    assert "--quick" in command


def test_everything_has_its_turn() -> None:
    assert set(NAMES) == {*PROGRAMS, "tracking"}
