"""An object store in a directory: the default without a cloud, durable and with real compare-and-swap.

This half belongs to the event loop: it checks arguments, runs the blocking half (`silo.sync.file_tree`, which
holds the theory) in threads of its own, waits for locks that other processes hold, and turns ``OSError`` into
our errors. Any number of processes on one machine may use a directory at the same time.

A call that is cancelled waits until its thread has ended, so nothing changes afterwards.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from silo.abc import Buffer, Clock, ObjectInfo, ObjectStore, StoredObject
from silo.errors import CapacityError, ClosedError, InvalidRequestError, SiloError, UnavailableError
from silo.sync.file_corner import Contended
from silo.sync.file_tree import FileTree
from silo.sync.store_keys import check_key, check_prefix, check_range
from silo.threads import run_to_completion

__all__ = ["FileStore"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_LOCK_TIMEOUT_S = 30.0
"""A lock is held for one small object's write and three syncs; longer means that its holder hangs."""
_PAUSE_MIN_S = 0.001
_PAUSE_MAX_S = 0.02
_LIST_BATCH = 1000
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR})


class FileStore(ObjectStore):
    """Objects as files below ``directory``, which the first write creates.

    A key may not lie below another one (``a`` and ``a/b``): the second is refused with `InvalidRequestError`.
    ``workers`` threads bound what happens at the same time.
    """

    def __init__(
        self, directory: str | Path, clock: Clock, *, allow_network_filesystem: bool = False, workers: int = 8
    ) -> None:
        root = Path(directory).absolute()
        self.url = root.as_uri()
        self._clock = clock
        self._tree = FileTree(root, clock, allow_network_filesystem=allow_network_filesystem)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="silo-file-store")
        self._closed = False

    async def put(self, key: str, data: Sequence[Buffer]) -> str:
        check_key(key)
        etag = await self._run(self._tree.replace, key, data, None)
        if etag is None:
            raise UnavailableError(f"{key} was not written")
        return etag

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        check_key(key)
        if match is None:
            return await self._run(self._tree.create, key, data)
        return await self._run(self._tree.replace, key, data, match)

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        check_key(key)
        check_range(start, length)
        return await self._run(self._tree.read, key, start, length)

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        return await self._run(self._tree.info, key)

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        for key in keys:
            await self._run(self._tree.remove, key)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        found = self._tree.walk(prefix)
        while batch := await self._run(lambda: list(itertools.islice(found, _LIST_BATCH))):
            for info in batch:
                yield info

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await run_to_completion(None, self._close)

    def _close(self) -> None:
        self._executor.shutdown(wait=True)
        self._tree.close()

    async def _run(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        deadline = self._clock.monotonic() + _LOCK_TIMEOUT_S
        pause_s = _PAUSE_MIN_S
        while True:
            if self._closed:
                raise ClosedError(f"the store {self.url} is closed")
            try:
                return await run_to_completion(self._executor, call, *args)
            except OSError as error:
                raise _translated(error) from error
            except Contended as error:
                if self._clock.monotonic() > deadline:
                    raise UnavailableError(
                        f"another process has held a lock in {self.url} for {_LOCK_TIMEOUT_S:.0f} s",
                        hint="is it stopped?",
                    ) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)


def _translated(error: OSError) -> SiloError:
    message = f"{error.filename or 'the file store'}: {error.strerror}"
    if error.errno in _NO_ROOM:
        return CapacityError(message, hint="make room on the store's disk")
    if error.errno in _REFUSED:
        return InvalidRequestError(message, hint="may this user write there?")
    return UnavailableError(message)
