"""The two system calls that Python has no name for."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from silo import linux


@pytest.mark.parametrize("mode", [linux.PUNCH_HOLE, linux.ZERO_RANGE])
def test_fallocate_zeroes_and_keeps_the_size(tmp_path: Path, mode: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * 20_000)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    try:
        linux.fallocate(fd, mode, 100, 30_000)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system cannot do that")
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"x" * 100 + bytes(19_900)


def test_fallocate_says_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            linux.fallocate(fd, linux.PUNCH_HOLE, 0, 1)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EBADF


def test_file_systems_are_told_apart() -> None:
    fd = os.open("/proc", os.O_RDONLY)
    try:
        assert linux.filesystem_magic(fd) == 0x9FA0
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        linux.filesystem_magic(fd)
