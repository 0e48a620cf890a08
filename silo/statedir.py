"""The state directory: what a host must still know about its groups after a crash.

::

    <path>/groups/<group>/lock                       held while the group is open
    <path>/groups/<group>/records/<name>             identity, offers, handovers (`silo.records`)
    <path>/groups/<group>/volumes/<volume>/...       the map of a volume (`silo.volumestate`)

One opener at a time, enforced by ``flock`` on ``lock``, which the kernel drops when the process dies. A record is
replaced as a whole and durably, or deleted durably; a damaged one is reported, never skipped. Names are checked
before they become paths.

All blocking calls run in threads of the directory's own, to completion.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from silo.abc import Buffer, Clock
from silo.checkpoint import owner_tag
from silo.clock import boot_id
from silo.errors import ClosedError, InvalidRequestError
from silo.files import lock_exclusive, make_directory, os_error, remove_file, replace_file, sync_directory
from silo.geometry import Geometry
from silo.names import check_group_name, check_volume_name
from silo.records import (
    Identity,
    check_record_name,
    decode_identity,
    decode_record,
    encode_identity,
    encode_record,
)
from silo.threads import run_to_completion
from silo.volumestate import DurableState, create_folder, open_folder

__all__ = ["GroupState", "StateDir"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_IDENTITY = "identity"
_THREADS = 4
"""A checkpoint that waits for the disk must not hold up the record of a handover."""


class StateDir:
    """A state directory; made when it does not exist.

    ``boot`` is the name of this boot of the machine; tests pass another one to pretend a restart.
    """

    def __init__(self, path: str | os.PathLike[str], *, boot: str | None = None) -> None:
        self.path = Path(path)
        self._boot = boot if boot is not None else boot_id()
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="silo-state")
        self._groups: list[GroupState] = []
        self._closed = False

    async def host_name(self, clock: Clock) -> str:
        """A name of this host that lasts as long as its state directory, drawn when there is none yet."""

        def read_or_draw() -> str:
            path = self.path / "host"
            if not path.exists():
                make_directory(self.path)
                replace_file(path, clock.token(8).hex().encode())
            return path.read_text(encoding="ascii")

        return await self._run(f"name the host of {self.path}", read_or_draw)

    async def groups(self) -> list[str]:
        """The names of all groups that have state here, open or not."""
        return await self._run(f"list {self.path}", _list_folder, self.path / "groups")

    async def has_record(self, group: str, name: str) -> bool:
        """Whether a group has such a record, open or not, by whomever."""
        check_group_name(group)
        check_record_name(name)
        path = self.path / "groups" / group / "records" / name
        return await self._run(f"look for the record {name} of {group}", path.exists)

    async def open_group(self, name: str) -> GroupState:
        """Open the state of a group, making it when there is none. Nobody else can until it is closed.

        `UnavailableError` that names the holder when somebody else has it open.
        """
        check_group_name(name)
        state = GroupState(name, self.path / "groups" / name, self._boot, self._executor)
        try:
            await self._run(f"open {state.path}", state.open_blocking)
        except BaseException:
            state.close_blocking()  # a cancelled call has taken the lock all the same
            raise
        self._groups = [group for group in self._groups if not group.closed] + [state]
        return state

    async def aclose(self) -> None:
        """Close every group and volume that is still open. May be called twice."""
        if not self._closed:
            self._closed = True
            try:
                await run_to_completion(self._executor, self._close_blocking)
            finally:
                self._executor.shutdown(wait=False)  # every caller waits for its own call

    def _close_blocking(self) -> None:
        for group in self._groups:
            group.close_blocking()

    async def _run(self, doing: str, call: Callable[[*Ts], T], *args: *Ts) -> T:
        if self._closed:
            raise ClosedError(f"the state directory {self.path} was closed")
        return await _in_thread(self._executor, doing, call, *args)


class GroupState:
    """The state of one group, locked for us. Made by `StateDir.open_group`.

    Concurrent calls are made one after the other. Cancellation leaves every record and volume as it was before
    the call, or as it should be after it.
    """

    def __init__(self, name: str, path: Path, boot: str, executor: ThreadPoolExecutor) -> None:
        self.name = name
        self.path = path
        self.closed = False
        self._boot = boot
        self._executor = executor
        self._lock_fd = -1
        self._turn = threading.Lock()
        self._volumes: dict[str, DurableState] = {}

    # ---- records ------------------------------------------------------------------------------------------

    async def read_identity(self) -> Identity | None:
        """Who we are; ``None`` for a new group. `CorruptionError` when the record is damaged."""
        content = await self._read(_IDENTITY)
        return None if content is None else decode_identity(self.name, content)

    async def write_identity(self, identity: Identity) -> None:
        """Make this who we are, durably."""
        if identity.group != self.name:
            raise InvalidRequestError(f"the identity of {identity.group} does not belong to {self.name}")
        await self._write(_IDENTITY, encode_identity(identity))

    async def read_record(self, name: str) -> bytes | None:
        """The content of a record; ``None`` when there is none. `CorruptionError` when it is damaged."""
        _check_own_name(name)
        return await self._read(name)

    async def write_record(self, name: str, content: Buffer) -> None:
        """Give a record this content, durably, before this returns. When it raises, either content may be there."""
        _check_own_name(name)
        await self._write(name, content)

    async def delete_record(self, name: str) -> None:
        """Delete a record durably; none there is fine."""
        _check_own_name(name)
        await self._run(f"delete the record {name}", remove_file, self._record(name))

    async def record_names(self) -> list[str]:
        """The names of all records except the identity."""
        names = await self._run(f"list the records of {self.name}", _list_folder, self.path / "records")
        return [name for name in names if name != _IDENTITY]

    async def _read(self, name: str) -> bytes | None:
        data = await self._run(f"read the record {name}", _read_if_there, self._record(name))
        return None if data is None else decode_record(name, data)

    async def _write(self, name: str, content: Buffer) -> None:
        data = encode_record(name, content)
        await self._run(f"write the record {name}", replace_file, self._record(name), data)

    def _record(self, name: str) -> Path:
        return self.path / "records" / name

    # ---- volumes ------------------------------------------------------------------------------------------

    async def volume_names(self) -> list[str]:
        """The names of all volumes that have a map here."""
        return await self._run(f"list the volumes of {self.name}", _list_folder, self.path / "volumes")

    async def open_volume(self, name: str, geometry: Geometry, fresh: Buffer) -> DurableState:
        """Open the map of a volume. When there is none it is made, durably, with the states in ``fresh``.

        Look at ``origin`` before believing the dirty bits. `CorruptionError` when there was a map and nothing
        of it can be read; `InvalidRequestError` when it was made with another geometry, or is open.
        """
        check_volume_name(name)
        opened: list[DurableState] = []
        try:
            await self._run(
                f"open the map of {self.name}/{name}",
                self._open_volume_blocking,
                name,
                geometry,
                fresh,
                opened,
            )
        except BaseException:
            for state in opened:
                state.close_blocking()  # a cancelled call has opened it all the same
            raise
        return opened[0]

    async def remove_volume(self, name: str) -> None:
        """Forget the map of a volume, durably; it must not be open. None there is fine.

        The next `open_volume` starts with fresh states, as the target of a migration must.
        """
        check_volume_name(name)
        await self._run(f"remove the map of {self.name}/{name}", self._remove_volume_blocking, name)

    def _open_volume_blocking(
        self, name: str, geometry: Geometry, fresh: Buffer, opened: list[DurableState]
    ) -> None:
        self._check_not_open(name)
        folder = self.path / "volumes" / name
        owner = owner_tag(self.name, name)
        if folder.exists():
            found = open_folder(folder, geometry, owner, self._boot)
        else:
            found = create_folder(folder, geometry, owner, self._boot, fresh)
        self._volumes[name] = state = DurableState(folder, geometry, owner, self._executor, found)
        opened.append(state)

    def _remove_volume_blocking(self, name: str) -> None:
        self._check_not_open(name)
        folder = self.path / "volumes" / name
        if folder.exists():
            removed = folder.with_name(f".{name}.removed")
            if removed.exists():
                shutil.rmtree(removed)
            os.rename(folder, removed)
            sync_directory(folder.parent)
            shutil.rmtree(removed)

    def _check_not_open(self, name: str) -> None:
        volume = self._volumes.get(name)
        if volume is not None and not volume.closed:
            raise InvalidRequestError(f"the map of {self.name}/{name} is open")

    async def close_volumes(self) -> None:
        """Close the maps of all volumes; the group stays ours."""
        for volume in list(self._volumes.values()):
            await volume.aclose()

    async def forget(self, *, last: str = "") -> None:
        """Close and forget every map, and forget every record, durably; the record ``last`` at the very end.

        A crash on the way leaves less, so that it can be asked again.
        """
        await self.close_volumes()
        for volume in await self.volume_names():
            await self.remove_volume(volume)
        for name in await self.record_names():
            if name != last:
                await self.delete_record(name)
        await self._run("delete the identity", remove_file, self._record(_IDENTITY))
        if last:
            await self.delete_record(last)

    # ---- beginning and end --------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close the volumes and give up the lock. Waits for calls that are under way. May be called twice."""
        if not self.closed:
            await run_to_completion(self._executor, self.close_blocking)

    def open_blocking(self) -> None:
        """Make what is missing, take the lock, clean up what a crash left. In a thread; raises `OSError`."""
        for folder in (self.path / "records", self.path / "volumes"):
            make_directory(folder)
        self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        lock_exclusive(self._lock_fd, f"the state of group {self.name} in {self.path}")
        for folder in (self.path / "records", self.path / "volumes"):
            for left in folder.glob(".*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def close_blocking(self) -> None:
        """As `aclose`, in a thread."""
        with self._turn:
            self.closed = True
            for volume in self._volumes.values():
                volume.close_blocking()
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    async def _run(self, doing: str, call: Callable[[*Ts], T], *args: *Ts) -> T:
        if self.closed:
            raise self._closed_error()
        return await _in_thread(self._executor, doing, self._in_turn, call, *args)

    def _in_turn(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        with self._turn:
            if self.closed:
                raise self._closed_error()
            return call(*args)

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the state of {self.name} was closed")


async def _in_thread(executor: ThreadPoolExecutor, doing: str, call: Callable[[*Ts], T], *args: *Ts) -> T:
    try:
        return await run_to_completion(executor, call, *args)
    except OSError as error:
        raise os_error(error, doing) from error


def _check_own_name(name: str) -> None:
    check_record_name(name)
    if name == _IDENTITY:
        raise InvalidRequestError("the identity is not an ordinary record", hint="use write_identity")


def _list_folder(folder: Path) -> list[str]:
    if not folder.exists():
        return []
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
