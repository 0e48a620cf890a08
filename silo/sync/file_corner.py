"""The private corner of a file store: its locks, and the files that have no key yet.

::

    ~silo/opening           held while somebody opens the corner or sweeps it
    ~silo/locks/<2 hex>     held while an object is replaced or removed; which one follows from the key
    ~silo/<token>/<number>  unfinished files of one open store, which keeps a lock on the directory

All locks are ``flock``, which the kernel drops when the holder dies, and none is waited for: `Contended` says that
somebody else has it. Whoever opens the corner first sweeps what the dead left: a directory of unfinished files
whose lock can be had has no owner. That ``opening`` is held meanwhile keeps a directory that was made an
instant ago, and is not locked yet, from looking dead.

Calls may come from any thread, and may block for as long as a local disk takes. All raise ``OSError``.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from silo.abc import Clock
from silo.errors import InvariantError

__all__ = ["CORNER", "Contended", "FileCorner"]

CORNER = "~silo"
"""A name that no key can have: ``~`` is not among the characters of keys."""

_LOCKS = "locks"
_LOCK_COUNT = 256
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Contended(Exception):
    """Somebody else holds the lock; nothing was done. A signal to the caller rather than an error."""


class FileCorner:
    """See the module. ``path`` is the corner itself; its parent must exist before `open`."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._session: Path | None = None
        self._session_fd = -1
        self._numbers = itertools.count()

    def is_open(self) -> bool:
        """Whether we have a directory for unfinished files."""
        return self._session is not None

    def open(self) -> None:
        """Make what is missing, sweep what is dead, take a directory for our own unfinished files. Idempotent."""
        if self.is_open():
            return
        (self._path / _LOCKS).mkdir(parents=True, exist_ok=True)
        with _lock(self._path / "opening"):
            if self.is_open():
                return  # another thread of ours was faster
            for entry in self._path.iterdir():
                if entry.is_dir() and entry.name != _LOCKS:
                    _sweep(entry)
            session = self._path / self._clock.token(8).hex()
            session.mkdir()
            self._session_fd = os.open(session, _DIRECTORY)
            fcntl.flock(self._session_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._session = session

    def close(self) -> None:
        """Remove our directory and let go of it."""
        if self._session is not None:
            _remove(self._session)
            os.close(self._session_fd)
            self._session, self._session_fd = None, -1

    def unfinished(self) -> Path:
        """A path for a new file that has no key yet, on the same file system as the objects."""
        if self._session is None:
            raise InvariantError("a file store writes before it has opened its corner")
        return self._session / str(next(self._numbers))

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the key's lock, against other threads as much as other processes, or raise `Contended`."""
        with _lock(self._path / _LOCKS / f"{zlib.crc32(key.encode()) % _LOCK_COUNT:02x}"):
            yield


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Contended from error
        yield
    finally:
        os.close(fd)  # which also unlocks


def _sweep(session: Path) -> None:
    """Remove the directory if its owner is dead; one that is closing may remove it under our hands."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(session, _DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(session)
        except BlockingIOError:
            return  # alive
        finally:
            os.close(fd)


def _remove(session: Path) -> None:
    for unfinished in session.iterdir():
        unfinished.unlink()
    session.rmdir()
