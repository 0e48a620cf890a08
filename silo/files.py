"""Files whose content must survive: errors in our own words, exclusive locks, durable replacement.

Everything here blocks. Callers on an event loop go through `silo.threads.run_to_completion`.

A file is *replaced*, never changed in place: temporary name, ``fsync``, ``rename``, ``fsync`` of the directory.
After a crash at any point the name holds the whole old content or the whole new content. A failed ``fsync``
leaves the old content under the name, and the temporary file is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from silo.abc import Buffer
from silo.errors import CapacityError, SiloError, UnavailableError

__all__ = [
    "lock_exclusive",
    "lock_shared",
    "make_directory",
    "os_error",
    "pwrite_all",
    "remove_file",
    "replace_file",
    "sync_directory",
]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def os_error(error: OSError, doing: str) -> SiloError:
    """Translate what the system said while ``doing`` something ("write to disk.img") into Silo's tree."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return CapacityError(
            f"no room to {doing}: {reason}", hint="free space or raise the quota, then retry"
        )
    return UnavailableError(f"could not {doing}: {reason}")


def lock_exclusive(fd: int, what: str) -> None:
    """Lock an open file against every other open of it, in this process or another; it ends with the last close.

    Raises `UnavailableError` that names the holder, as far as the system tells.
    """
    _lock(fd, what, fcntl.LOCK_EX)


def lock_shared(fd: int, what: str) -> None:
    """As `lock_exclusive`, but only against those who lock exclusively: many may read, nobody may write."""
    _lock(fd, what, fcntl.LOCK_SH)


def _lock(fd: int, what: str, kind: int) -> None:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UnavailableError(
            f"{what} is in use by {_lock_holder(fd)}", hint="close it there first; nothing was changed"
        ) from error
    except OSError as error:
        raise os_error(error, f"lock {what}") from error


def _lock_holder(fd: int) -> str:
    """Who holds the ``flock`` of an open file. The kernel's table shows only processes of our own namespace."""
    status = os.fstat(fd)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == wanted and int(fields[4]) > 0:
                return _describe_process(int(fields[4]))
    return "another process"


def _describe_process(pid: int) -> str:
    if pid == os.getpid():
        return "this very process"
    with contextlib.suppress(OSError):
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text(encoding='utf-8').strip()})"
    return f"process {pid}"


def pwrite_all(fd: int, data: Buffer, offset: int) -> None:
    """Write all of ``data``, however many calls that takes. Raises `OSError`; then any part may be written."""
    written = os.pwrite(fd, data, offset)
    if written != len(data):
        rest = memoryview(data)
        while written < len(data):
            written += os.pwrite(fd, rest[written:], offset + written)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Make a directory and its parents where they are missing, durably and for us alone. Raises `OSError`."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        sync_directory(path.parent)


def replace_file(path: Path, data: Buffer) -> None:
    """Give ``path`` the content ``data``, durably and all at once. One call at a time for a path.

    Raises `OSError`; then the name holds the old content, or the new one of unknown durability.
    """
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        try:
            pwrite_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def remove_file(path: Path) -> None:
    """Remove a file durably; none there is fine, and its absence is durable too. Raises `OSError`."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)
