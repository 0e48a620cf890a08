"""The examples do what they show."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.source import ROOT

EXPECTED = {
    "embed.py": "the second host reads: written on the first host",
    "custom_workload.py": "counted to 5 on the first host and to 10 on the second",
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_does_what_it_shows(name: str) -> None:
    """Each runs to its end as a program of its own, and prints what its text promises."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout


def test_every_example_is_run() -> None:
    """A new example must be added here; what needs a store is run by the tests of the stores."""
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names - {"restore_with_minio.py"} == set(EXPECTED)
