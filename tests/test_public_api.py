"""The public API: exactly what tests/public_api.txt lists, documented, and cheap to import."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib

import pytest

import silo
from tests.support.source import ROOT

LISTED = (ROOT / "tests" / "public_api.txt").read_text().split()

HEAVY = "aiobotocore botocore obstore rich trio typer zstandard matplotlib"
"""Packages that ``import silo`` must not load: a program may never need them."""


def test_the_api_is_the_listed_one():
    """Adding or removing a public name is a decision, and shows as a change of the list."""
    assert sorted(silo.__all__) == LISTED


def test_the_list_is_sorted():
    """The list has each name once, in order, so that changes to it are easy to read."""
    assert sorted(set(LISTED)) == LISTED


@pytest.mark.parametrize("name", LISTED)
def test_every_public_name_is_there_and_documented(name):
    """Each listed name can be had from the package and says what it is."""
    value = getattr(silo, name)
    if inspect.isclass(value) or callable(value):
        assert inspect.getdoc(value)


def test_dir_shows_the_api():
    """Tools that complete names see all of them, though they are loaded late."""
    assert set(LISTED) <= set(dir(silo))


def test_unknown_names_are_refused():
    """A misspelt name is an AttributeError that names it."""
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = silo.no_such_name


def test_import_is_light():
    """``import silo`` in a fresh interpreter loads none of the heavy packages."""
    code = "import sys, silo; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(result.stdout.split())
    assert "silo" in loaded
    assert loaded & set(HEAVY.split()) == set()


def test_the_package_is_typed_and_knows_its_version():
    """Type checkers see the annotations; the version is the distribution's."""
    assert (ROOT / "silo" / "py.typed").exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert silo.__version__ == project["version"]
