"""Opening overlays and what they lie over, from paths.

::

    disk = await open_overlay("disk.overlay", "golden.img")
    disk = await open_overlay("disk.overlay", "patched.overlay", "golden.img")

The base is a file (or block device), opened for reading and locked shared, or another overlay, opened in the same
way. Any number of overlays may have one base at the same time, in any number of processes. An overlay that is a
base cannot be opened for writing meanwhile, and if it is changed afterwards, those over it do not open any more:
an overlay opens only over a base with the digest that it was made over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from blake3 import blake3

from silo.abc import BlockDevice
from silo.clock import boot_id
from silo.devices.file import FileDevice
from silo.devices.overlay import OverlayDevice
from silo.devices.overlay_base import Base, cached_digest
from silo.devices.overlay_folder import OverlayFolder
from silo.devices.readonly import ReadOnlyDevice, ReadOnlyFile
from silo.errors import InvalidRequestError
from silo.volumestate import VolumeState

__all__ = ["open_base", "open_overlay", "open_overlay_over"]

AnyPath = str | os.PathLike[str]


async def open_overlay(
    path: AnyPath,
    *bases: AnyPath,
    size: int | None = None,
    cell_size: int | None = None,
    digest: str | None = None,
    boot: str | None = None,
) -> OverlayDevice:
    """Open the overlay in the folder ``path``, over ``bases``, the nearest first; make it when there is none.

    A new overlay has ``size`` bytes (not less than its base; by default the same) and cells of ``cell_size``
    (64 KiB). For an existing one both may be left out, and must be right otherwise. ``digest`` is what the nearest
    base must have, if the caller knows; an existing overlay knows by itself. ``boot`` is the name of this boot of
    the machine; tests pass another one to pretend a restart.

    The first time that a base is seen it is read as a whole. `InvalidRequestError` when it is not the base of this
    overlay, or the arguments make no sense; `UnavailableError` when the overlay is open already, or the base is
    open for writing; `CorruptionError` when something of the overlay is missing or damaged. Cancellation leaves
    nothing open; an overlay that was being made may be there or not.
    """
    folder = OverlayFolder(Path(path), boot or boot_id())
    base = await open_base(*bases, caches=(folder.base_cache,), boot=boot)
    async with _closed_on_error(base.device):
        if digest not in (None, base.digest):
            raise InvalidRequestError(
                f"the base {os.fspath(bases[0])} is {base.digest}, not {digest}", hint="give the right image"
            )
    return await _open_over(folder, base, size, cell_size)


async def open_overlay_over(
    path: AnyPath,
    base: Base,
    *,
    size: int | None = None,
    cell_size: int | None = None,
    boot: str | None = None,
) -> OverlayDevice:
    """As `open_overlay`, over any device that nobody changes; it is closed with the overlay, or when this raises."""
    return await _open_over(OverlayFolder(Path(path), boot or boot_id()), base, size, cell_size)


async def open_base(*paths: AnyPath, caches: tuple[Path, ...] = (), boot: str | None = None) -> Base:
    """Open the first of ``paths`` for reading: a file (or block device) if it is the only one, else an overlay.

    Its digest comes from the record beside it, from one of the ``caches``, or from its content.
    """
    if not paths:
        raise InvalidRequestError("an overlay needs a base", hint="name an image, or another overlay")
    path, *below = map(Path, paths)
    device: ReadOnlyDevice = await _open_read_only(path, below, boot) if below else ReadOnlyFile(path)
    async with _closed_on_error(device):
        beside = path.with_name(f"{path.name}.silo-digest")
        return Base(device, await cached_digest(device, (beside, *caches)))


async def _open_over(
    folder: OverlayFolder, base: Base, size: int | None, cell_size: int | None
) -> OverlayDevice:
    async with _closed_on_error(base.device):
        missing = await folder.prepare(base, size=size, cell_size=cell_size)
        data = FileDevice(folder.data, missing)
        async with _closed_on_error(data):
            identity, state = await folder.open_cells(base, data.size, size=size, cell_size=cell_size)
            async with _closed_on_error(state):
                return OverlayDevice(base.device, data, identity.cells, state)


class _ReadOnlyOverlay(ReadOnlyDevice):
    """An overlay that is a base."""

    def __init__(self, overlay: OverlayDevice, data: ReadOnlyFile, content: str) -> None:
        super().__init__(overlay)
        self._data = data
        self._content = content

    async def fingerprint(self) -> str:
        """That of the data, and the rest of what the content is made of."""
        found = await self._data.fingerprint()
        return f"{found} {self._content}" if found else ""


async def _open_read_only(path: Path, below: list[Path], boot: str | None) -> ReadOnlyDevice:
    folder = OverlayFolder(path, boot or boot_id())
    base = await open_base(*below, caches=(folder.base_cache,), boot=boot)
    async with _closed_on_error(base.device):
        data = ReadOnlyFile(folder.data)
        async with _closed_on_error(data):
            identity, state = await folder.read_cells(base, data.size)
            overlay = OverlayDevice(base.device, data, identity.cells, state)
            return _ReadOnlyOverlay(overlay, data, f"{blake3(state.buffer).hexdigest()} {base.digest}")


@contextlib.asynccontextmanager
async def _closed_on_error(device: BlockDevice | VolumeState) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await device.aclose()
        raise
