"""An overlay on disk: one folder with everything that belongs together.

::

    disk.overlay/overlay         which base, how large, how divided; written last, once
    disk.overlay/data            the bytes of the owned cells, each at its own offset; sparse; locked while in use
    disk.overlay/map/...         whose each cell is (`silo.volumestate`)
    disk.overlay/base.digest     what is known of the base, to be quick (`silo.devices.overlay_base`)

The record ``overlay`` comes into being after everything that it speaks of, durably. So a folder without it is
unfinished work of a process that died while making it, never in use, and is made anew; and a folder with it that
lacks one of the others is damage. Who works on a folder holds the lock on ``data``: exclusively to write, shared to
use it as a base. The whole is specified in ``docs/formats/overlay.md``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import msgspec
import numpy as np

from silo.checkpoint import owner_tag
from silo.chunkmap import Residency
from silo.devices.overlay_base import Base
from silo.errors import CorruptionError, InvalidRequestError
from silo.files import lock_exclusive, make_directory, os_error, replace_file
from silo.geometry import Geometry
from silo.records import decode_record, encode_record
from silo.threads import run_to_completion
from silo.volumestate import (
    DurableState,
    EphemeralState,
    Opened,
    create_folder,
    open_folder,
    read_folder,
)

__all__ = ["CELL_SIZE_DEFAULT", "OverlayFolder", "OverlayIdentity", "fresh_cells"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CELL_SIZE_DEFAULT = 64 * 1024
FORMAT = 1
_RECORD = "overlay"
_UNFINISHED = frozenset({"data", "map", "base.digest", ".map.new", ".overlay.new", ".base.digest.new"})
"""All that there can be while an overlay is made."""


class OverlayIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What never changes about an overlay."""

    size: int
    cell_size: int
    base: str
    """The digest of its base."""
    version: int = msgspec.field(default=FORMAT, name="format")

    @property
    def cells(self) -> Geometry:
        """The cells, with their arithmetic."""
        return Geometry(self.size, self.cell_size)

    @property
    def owner(self) -> bytes:
        """What ties the files of the map to the base."""
        return owner_tag("overlay", self.base)


class KeptCells(DurableState):
    """The map of an overlay, with a thread of its own to write it."""

    def __init__(self, folder: Path, identity: OverlayIdentity, opened: Opened) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="silo-overlay")
        super().__init__(folder, identity.cells, identity.owner, self._thread, opened)

    async def aclose(self) -> None:
        """As the port says."""
        try:
            await super().aclose()
        finally:
            self._thread.shutdown(wait=False)  # every caller waits for its own call


class OverlayFolder:
    """The folder of one overlay. ``boot`` is the name of this boot of the machine."""

    def __init__(self, path: Path, boot: str) -> None:
        self.path = path
        self.data = path / "data"
        self.base_cache = path / "base.digest"
        self._map = path / "map"
        self._record = path / _RECORD
        self._boot = boot

    async def prepare(self, base: Base, *, size: int | None, cell_size: int | None) -> int | None:
        """Make the folder if there is none. Returns the size with which the data is to be created, if it is.

        Refuses what `open_cells` would refuse of a new overlay, before anything comes into being.
        """
        return await self._run("make", self._prepare_blocking, base, size, cell_size)

    async def open_cells(
        self, base: Base, data_size: int, *, size: int | None, cell_size: int | None
    ) -> tuple[OverlayIdentity, KeptCells]:
        """Open the map, or make it with all that is missing. The data is open, locked, and of ``data_size``.

        ``size`` and ``cell_size`` must be those of the overlay, if given; a new one has them from here.
        """
        return await self._run("open", self._open_blocking, base, data_size, size, cell_size)

    async def read_cells(self, base: Base, data_size: int) -> tuple[OverlayIdentity, EphemeralState]:
        """A copy of the map, for reading only. `InvalidRequestError` when not all of it is durable."""
        return await self._run("read", self._read_blocking, base, data_size)

    def _prepare_blocking(self, base: Base, size: int | None, cell_size: int | None) -> int | None:
        if self._record.exists():
            if not (self.data.exists() and self.data.stat().st_size):
                raise CorruptionError(
                    f"{self.data} is missing or empty", hint="put it back, or remove the whole folder"
                )
            return None
        cells = _new_cells(base, size or base.device.size, cell_size)
        self._check_place()
        make_directory(self.path)
        if self.data.exists():
            self._empty_leftover()
        return cells.size

    def _check_place(self) -> None:
        """An overlay is made where nothing is yet, or what another process left when it died on the way."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InvalidRequestError(f"{self.path} is a file", hint="an overlay is a folder; name a new one")
        others = sorted(entry.name for entry in self.path.iterdir() if entry.name not in _UNFINISHED)
        if others:
            raise InvalidRequestError(
                f"{self.path} is no overlay: it holds {others[0]}", hint="name a new folder, or an empty one"
            )

    def _empty_leftover(self) -> None:
        """Data without a record was never used. It may have another size than what is asked for now."""
        fd = os.open(self.data, os.O_RDWR | os.O_CLOEXEC)
        try:
            lock_exclusive(fd, str(self.data))
            if os.fstat(fd).st_blocks:
                raise CorruptionError(
                    f"{self.path} holds data, but nothing that says what it lies over",
                    hint="put the file 'overlay' back, or remove the whole folder",
                )
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)

    def _open_blocking(
        self, base: Base, data_size: int, size: int | None, cell_size: int | None
    ) -> tuple[OverlayIdentity, KeptCells]:
        if self._record.exists():
            identity = self._recognise(base, data_size, size, cell_size)
            opened = open_folder(self._map, identity.cells, identity.owner, self._boot)
        else:
            cells = _new_cells(base, data_size, cell_size)
            identity = OverlayIdentity(size=cells.size, cell_size=cells.chunk_size, base=base.digest)
            opened = self._create(identity, fresh_cells(cells, base.device.size))
        return identity, KeptCells(self._map, identity, opened)

    def _create(self, identity: OverlayIdentity, fresh: bytearray) -> Opened:
        if self._map.exists():
            shutil.rmtree(self._map)  # without the record nobody has ever used it
        opened = create_folder(self._map, identity.cells, identity.owner, self._boot, fresh)
        replace_file(self._record, encode_record(_RECORD, msgspec.json.encode(identity)))
        return opened

    def _read_blocking(self, base: Base, data_size: int) -> tuple[OverlayIdentity, EphemeralState]:
        identity = self._recognise(base, data_size, None, None)
        states = read_folder(self._map, identity.cells, identity.owner, self._boot)
        return identity, EphemeralState(identity.cells, states)

    def _recognise(
        self, base: Base, data_size: int, size: int | None, cell_size: int | None
    ) -> OverlayIdentity:
        """The identity in the record, if it is the one that is asked for."""
        identity = _decode(self.path, self._record.read_bytes())
        if identity.base != base.digest:
            raise InvalidRequestError(
                f"{self.path} lies over the base {identity.base}, and the one given is {base.digest}",
                hint="give the very image that it was made over; if that was changed since, restore it",
            )
        wanted = (size or identity.size, cell_size or identity.cell_size)
        if wanted != (identity.size, identity.cell_size):
            raise InvalidRequestError(
                f"{self.path} was made with {identity.size} bytes in cells of {identity.cell_size}, "
                f"not with {wanted[0]} in cells of {wanted[1]}",
                hint="leave both out to take the overlay as it is",
            )
        if data_size != identity.size:
            raise CorruptionError(f"{self.data} has {data_size} bytes instead of {identity.size}")
        return identity

    async def _run(self, doing: str, call: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            return await run_to_completion(None, call, *args)
        except OSError as error:
            raise os_error(error, f"{doing} the overlay {self.path}") from error


def _new_cells(base: Base, size: int, cell_size: int | None) -> Geometry:
    if base.device.size > size:
        raise InvalidRequestError(
            f"an overlay of {size} bytes cannot lie over a base of {base.device.size} bytes",
            hint="it must have the size of its base or more",
        )
    try:
        return Geometry(size, cell_size or CELL_SIZE_DEFAULT)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"an overlay cannot be divided like this: {error}") from error


def fresh_cells(cells: Geometry, base_size: int) -> bytearray:
    """The map of a new overlay: everything is in the base, and zero beyond its end."""
    states = np.full(cells.chunk_count, Residency.ZERO_UNPUNCHED, dtype=np.uint8)
    states[: cells.touched(0, base_size)[1]] = Residency.ABSENT_STORE
    return bytearray(states.data)


def _decode(path: Path, record: bytes) -> OverlayIdentity:
    try:
        identity = msgspec.json.decode(decode_record(_RECORD, record), type=OverlayIdentity)
        Geometry(identity.size, identity.cell_size)
    except (msgspec.DecodeError, InvalidRequestError) as error:
        raise CorruptionError(f"the record of {path} makes no sense: {error}") from error
    if identity.version != FORMAT:
        raise CorruptionError(
            f"{path} has format {identity.version}, which cannot be read",
            hint="it was written by a newer version of Silo",
        )
    return identity
