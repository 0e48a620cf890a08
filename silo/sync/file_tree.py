"""A directory as a tree of objects with compare-and-swap: the blocking half of `silo.sync.file_store`.

An object is a plain file whose path below the root is its key, so that any tool can copy a store in or out.
Locks and unfinished files live in a private corner (`silo.sync.file_corner`), under a name that no key can have.

**Whole or not at all.** A body is written to a file of its own, synced, and only then given its name: by
``link``, which fails if the name is taken (create), or by ``rename`` (replace). Then the directory is synced. So a
crash at any point leaves the old object or the new one, and at worst a nameless leftover that is swept later.

**Compare and swap.** Everything that replaces or removes holds the key's lock over read, compare, write, sync,
rename and sync of the directory. `Contended` says that somebody else holds it and that nothing was done;
waiting is for the caller. Creating needs no lock.

**ETag.** Of a small object, the digest of its content, so that even a copy made with other tools changes it.
Of a larger one, size, inode and modification time, whose low bits are drawn at random when it is written.

**Durability** is that of ``fsync``. There is no grouping of syncs here: the journals of ext4 and xfs merge the
syncs of parallel threads by themselves (4 KiB objects: 790 a second with one thread, 2700 with 16).

Calls may come from any thread. All raise ``OSError``, and `InvalidRequestError` for what no retry can cure.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from silo.abc import Buffer, Clock, ObjectInfo, StoredObject
from silo.errors import InvalidRequestError, UnavailableError
from silo.linux import NETWORK_FILESYSTEMS, filesystem_magic
from silo.sync.file_corner import CORNER, FileCorner
from silo.sync.store_keys import clip_range, is_key

__all__ = ["FileTree"]

_DIGEST_SIZE_MAX = 64 * 1024
"""Up to here reading the content for its digest costs about as much as opening the file."""
_BUFFERS_MAX = 1024
"""IOV_MAX of Linux."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class FileTree:
    """See the module. Opening is lazy: reading never creates anything, the first change makes what is missing."""

    def __init__(self, root: Path, clock: Clock, *, allow_network_filesystem: bool) -> None:
        self._root = root
        self._clock = clock
        self._allow_network_filesystem = allow_network_filesystem
        self._checked = False
        self._corner = FileCorner(root / CORNER, clock)
        self._durable: set[Path] = set()
        """Directories whose own names are known to be on the medium."""

    # ---- reading

    def read(self, key: str, start: int, length: int | None) -> StoredObject | None:
        """The range of an object, from one version of it."""
        with self._open_object(key) as fd:
            if fd is None:
                return None
            status = os.fstat(fd)
            wanted = clip_range(start, length, status.st_size)
            if status.st_size <= _DIGEST_SIZE_MAX:
                body = _read(fd, 0, status.st_size)
                return StoredObject(memoryview(body)[start : start + wanted], _digest([body]), status.st_size)
            return StoredObject(_read(fd, start, wanted), _identity(status), status.st_size)

    def info(self, key: str) -> ObjectInfo | None:
        """What is known of an object."""
        with self._open_object(key) as fd:
            if fd is None:
                return None
            status = os.fstat(fd)
            return ObjectInfo(key, status.st_size, _etag(fd, status), status.st_mtime)

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, in order of keys."""
        self._check_filesystem()
        directory, _, _ = prefix.rpartition("/")
        for key in self._keys(f"{directory}/" if directory else "", prefix):
            info = self.info(key)
            if info is not None:  # it may have gone since its name was read
                yield info

    def _keys(self, directory: str, prefix: str) -> Iterator[str]:
        try:
            with os.scandir(self._root / directory) as entries:
                # A directory sorts as its keys do, by its name and a slash: "a-b" comes before "a/b".
                names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            key = directory + name
            if not is_key(key.rstrip("/")) or not (key.startswith(prefix) or prefix.startswith(key)):
                continue  # not ours (our corner, lost+found), or not asked for
            if name.endswith("/"):
                yield from self._keys(key, prefix)
            elif key.startswith(prefix):
                yield key

    @contextlib.contextmanager
    def _open_object(self, key: str) -> Iterator[int | None]:
        self._check_filesystem()
        try:
            fd = os.open(self._root / key, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        try:
            yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
        finally:
            os.close(fd)

    # ---- changing

    def create(self, key: str, data: Sequence[Buffer]) -> str | None:
        """Write an object if there is none; its ETag, or None when there is one."""
        directory = self._make_room(key)
        if os.path.lexists(self._root / key):
            self._refuse_directory(key)
            return None
        with self._written(data) as (temporary, etag):
            try:
                os.link(temporary, self._root / key)
            except FileExistsError:
                self._refuse_directory(key)
                return None
            _sync_directory(directory)
            return etag

    def replace(self, key: str, data: Sequence[Buffer], match: str | None) -> str | None:
        """Write an object over one whose ETag is ``match``, over any or none if that is None.

        The new ETag, or None when the condition is false.
        """
        directory = self._make_room(key)
        with self._corner.lock(key):
            if match is not None:
                found = self.info(key)
                if found is None or found.etag != match:
                    return None
            self._refuse_directory(key)
            with self._written(data) as (temporary, etag):
                os.rename(temporary, self._root / key)
                _sync_directory(directory)
                return etag

    def remove(self, key: str) -> None:
        """Delete an object; none is no error."""
        self._check_filesystem()
        path = self._root / key
        if not path.is_file():
            return
        self._corner.open()
        with self._corner.lock(key):
            path.unlink(missing_ok=True)
            _sync_directory(path.parent)

    def close(self) -> None:
        """Let go of the directory. No call may be under way, and none may follow."""
        self._corner.close()

    def _refuse_directory(self, key: str) -> None:
        if (self._root / key).is_dir():
            raise InvalidRequestError(
                f"{key} cannot be an object: other keys lie below it",
                hint="name it differently in a file store",
            )

    def _make_room(self, key: str) -> Path:
        """Make sure that the object's directory exists durably; returns it."""
        self._check_filesystem()
        directory = (self._root / key).parent
        try:
            self._make_durable(self._root)
            self._corner.open()
            self._make_durable(directory)
        except (FileExistsError, NotADirectoryError) as error:
            raise InvalidRequestError(
                f"{key} cannot be an object: an object lies where its directory should be",
                hint="name it differently in a file store",
            ) from error
        return directory

    def _make_durable(self, directory: Path) -> None:
        if directory in self._durable:
            return
        if directory != self._root:
            self._make_durable(directory.parent)
        directory.mkdir(exist_ok=True, parents=directory == self._root)
        _sync_directory(directory.parent)
        self._durable.add(directory)

    @contextlib.contextmanager
    def _written(self, data: Sequence[Buffer]) -> Iterator[tuple[Path, str]]:
        """A synced file that holds ``data`` and has no key yet, with its ETag. Gone at the end, unless renamed."""
        path = self._corner.unfinished()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write(fd, data)
            # A random millisecond makes the time a part of the identity: inode numbers come again.
            modified_ns = int(self._clock.wall() * 1e9) + int.from_bytes(self._clock.token(3)) % 1_000_000
            os.utime(fd, ns=(modified_ns, modified_ns))
            os.fsync(fd)
            status = os.fstat(fd)
            yield path, _digest(data) if status.st_size <= _DIGEST_SIZE_MAX else _identity(status)
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)

    def _check_filesystem(self) -> None:
        """Refuse a network file system. Where the root does not exist yet, its nearest ancestor decides."""
        if self._checked or self._allow_network_filesystem:
            return
        place = self._root
        while not place.exists():
            place = place.parent
        fd = os.open(place, _DIRECTORY)
        try:
            magic = filesystem_magic(fd)
        finally:
            os.close(fd)
        if magic in NETWORK_FILESYSTEMS:
            raise InvalidRequestError(
                f"{self._root} is on a network file system (type {magic:#x}), whose locks may not exclude other hosts",
                hint="use a local disk or S3, or allow it with ?network-filesystem=allow if only one host writes",
            )
        self._checked = True


def _write(fd: int, data: Sequence[Buffer]) -> None:
    views = (memoryview(buffer).cast("B") for buffer in data)
    pending = [view for view in views if view.nbytes]
    first = 0
    while first < len(pending):
        written = os.writev(fd, pending[first : first + _BUFFERS_MAX])
        while first < len(pending) and written >= pending[first].nbytes:
            written -= pending[first].nbytes
            first += 1
        if written:
            pending[first] = pending[first][written:]


def _read(fd: int, start: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.pread(fd, length, start)
        if not part:
            raise UnavailableError(
                "an object became shorter while it was read", hint="who else writes in the store?"
            )
        parts.append(part)
        start += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _digest(data: Sequence[Buffer]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for buffer in data:
        digest.update(buffer)
    return digest.hexdigest()


def _identity(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_ino:x}-{status.st_mtime_ns:x}"


def _etag(fd: int, status: os.stat_result) -> str:
    if status.st_size <= _DIGEST_SIZE_MAX:
        return _digest([_read(fd, 0, status.st_size)])
    return _identity(status)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, _DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory, and do not need it
            raise
    finally:
        os.close(fd)
