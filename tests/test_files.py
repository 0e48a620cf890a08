"""Files whose content must survive."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from silo import files
from silo.errors import CapacityError, UnavailableError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_capacity_error(number: int) -> None:
    error = files.os_error(OSError(number, os.strerror(number)), "write to disk.img")
    assert isinstance(error, CapacityError)
    assert "no room to write to disk.img" in str(error)


def test_any_other_error_may_pass() -> None:
    error = files.os_error(OSError(errno.EIO, os.strerror(errno.EIO)), "write to disk.img")
    assert isinstance(error, UnavailableError)
    assert str(error) == "could not write to disk.img: Input/output error"


def test_a_lock_excludes_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = os.open(path, os.O_RDWR | os.O_CREAT)
    second = os.open(path, os.O_RDWR)
    files.lock_exclusive(first, "the thing")
    with pytest.raises(UnavailableError, match="the thing is in use by this very process"):
        files.lock_exclusive(second, "the thing")
    os.close(first)
    files.lock_exclusive(second, "the thing")
    code = f"import os; from silo import files; files.lock_exclusive(os.open({str(path)!r}, os.O_RDWR), 'the thing')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    os.close(second)
    assert child.returncode == 1
    assert f"the thing is in use by process {os.getpid()} (" in child.stderr


def test_a_shared_lock_excludes_only_those_who_lock_exclusively(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fds = [os.open(path, os.O_RDWR | os.O_CREAT), os.open(path, os.O_RDONLY), os.open(path, os.O_RDWR)]
    files.lock_shared(fds[0], "the thing")
    files.lock_shared(fds[1], "the thing")
    with pytest.raises(UnavailableError, match="the thing is in use"):
        files.lock_exclusive(fds[2], "the thing")
    os.close(fds[0])
    os.close(fds[1])
    files.lock_exclusive(fds[2], "the thing")
    late = os.open(path, os.O_RDONLY)
    with pytest.raises(UnavailableError, match="the thing is in use by this very process"):
        files.lock_shared(late, "the thing")
    os.close(late)
    os.close(fds[2])


def test_replacing_syncs_the_content_before_the_name_and_then_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power loss could leave the name with half of the content, or without the name."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(fd: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        fsync(fd)

    def traced_rename(source: Path, target: Path) -> None:
        done.append(f"rename {source.name} {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    files.replace_file(tmp_path / "record", b"content")
    assert done == ["sync .record.new", "rename .record.new record", f"sync {tmp_path.name}"]
    assert (tmp_path / "record").read_bytes() == b"content"
    files.remove_file(tmp_path / "record")
    assert done[3:] == [f"sync {tmp_path.name}"]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.replace_file(tmp_path / "record", b"old")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no"):
            files.replace_file(tmp_path / "record", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["record"]
    assert (tmp_path / "record").read_bytes() == b"old"


def test_directories_are_made_down_to_the_last_and_only_for_us(tmp_path: Path) -> None:
    files.make_directory(tmp_path / "a" / "b" / "c")
    files.make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    files.remove_file(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_long_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data)[:3], offset))
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    files.pwrite_all(fd, b"0123456789", 2)
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"\0\x000123456789"
