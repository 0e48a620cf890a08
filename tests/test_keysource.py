"""Master keys from a file and from a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from silo.errors import InvalidRequestError
from silo.keysource import load_keys
from silo.sync.cipher import KeyRing

KEY = bytes(range(32))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(KEY.hex() + "\n")
    path.chmod(0o600)
    return path


def test_the_sources(file: Path) -> None:
    assert load_keys() is None
    for ring in (load_keys(file=str(file)), load_keys(command=f"cat {file}")):
        assert ring is not None
        assert ring.ids == KeyRing([KEY]).ids
    with pytest.raises(InvalidRequestError, match="not from both"):
        load_keys(str(file), "true")


def test_a_file_that_everybody_may_read(file: Path) -> None:
    file.chmod(0o644)
    with pytest.raises(InvalidRequestError, match="everybody may read"):
        load_keys(file=str(file))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo no such secret >&2; exit 3", "status 3: no such secret"),
        ("true", "holds no key"),
        ("printf '\\377'", "is not text"),
        ("echo hunter2", "line 1 is no key"),
    ],
)
def test_commands_that_fail(command: str, said: str) -> None:
    """What they print is never repeated: it might be nearly a key."""
    with pytest.raises(InvalidRequestError, match=said) as refused:
        load_keys(command=command)
    assert "hunter2" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="No such file"):
        load_keys(file=str(tmp_path / "none"))
