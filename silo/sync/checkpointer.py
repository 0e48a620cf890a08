"""Writing a checkpoint: the changed pages of the committed map, and a root that names all pages.

The checkpoint describes the generation that is committed while it is written. The next commit refers to it and
lists only its own segments after it. Pages go into objects of at most one segment's size; the root goes into the
head when it is small, else behind the last page.

Until that commit nothing refers to a checkpoint, and one that is given up leaves nothing but garbage.
"""

from __future__ import annotations

import attrs
import numpy as np

from silo.sync.cipher import KeyRing, Sealer
from silo.sync.claim import Owner
from silo.sync.codec import digest_of
from silo.sync.head import PartRef, RootRef
from silo.sync.layout import FEATURE_ENCRYPTED, Magic, SegmentName, pack_preamble
from silo.sync.manifest import Manifest
from silo.sync.mappage import SLOT, Root, encode_page, encode_root
from silo.sync.sender import ObjectSender

__all__ = ["INLINE_ROOT_MAX", "Checkpoint", "changed_bytes", "write_checkpoint"]

INLINE_ROOT_MAX = 32 * 1024
"""Some 550 pages. Every commit carries an inline root; every opening without one costs a round trip more."""


@attrs.frozen
class Checkpoint:
    """What was written: the root for the head, and the pages that moved (``None``: all zero now)."""

    root: RootRef
    moved: dict[str, dict[int, PartRef | None]]
    last_seq: int
    """The highest sequence number that was used, or 0."""

    def adopted(self, manifest: Manifest) -> None:
        """A head with this root was committed."""
        for volume, pages in self.moved.items():
            manifest.volume(volume).checkpointed(pages)


def changed_bytes(manifest: Manifest) -> int:
    """About how much a checkpoint would write now."""
    return sum(
        int(np.count_nonzero(volume.changed)) * volume.page_chunks * SLOT.itemsize
        for volume in manifest.maps.volumes.values()
    )


async def write_checkpoint(
    manifest: Manifest, sender: ObjectSender, owner: Owner, size_max: int
) -> Checkpoint:
    """Store the changed pages, after reading those of them that only the store has.

    `CorruptionError` and `UnavailableError` when one of those cannot be read. Uploads as `ObjectSender.send`.
    """
    writer = _Writer(sender, owner, size_max, manifest.keys)
    moved: dict[str, dict[int, PartRef | None]] = {}
    for name, volume in manifest.maps.volumes.items():
        moved[name] = {}
        for page in np.flatnonzero(volume.changed).tolist():
            await manifest.load_page(name, page, demand=False)
            made = volume.render(name, page)
            moved[name][page] = None if made is None else await writer.add(encode_page(made))
    pages = {name: _merged(volume.parts, moved[name]) for name, volume in manifest.maps.volumes.items()}
    sizes = {name: volume.page_chunks for name, volume in manifest.maps.volumes.items()}
    encoded = encode_root(Root(sizes, pages))
    if len(encoded) <= INLINE_ROOT_MAX:
        root = RootRef(inline=encoded)
    else:
        root = RootRef(stored=await writer.add(encoded))
    await writer.finish()
    return Checkpoint(root, moved, writer.last_seq)


def _merged(parts: dict[int, PartRef], moved: dict[int, PartRef | None]) -> dict[int, PartRef]:
    return {page: part for page, part in (parts | moved).items() if part is not None}


class _Writer:
    """Packs parts into objects, one of which is being filled."""

    def __init__(self, sender: ObjectSender, owner: Owner, size_max: int, keys: KeyRing | None) -> None:
        self.last_seq = 0
        self._sender = sender
        self._owner = owner
        self._size_max = size_max
        self._buffers: list[bytes] = []
        self._size = 0
        self._name: SegmentName | None = None
        self._keys = keys
        self._sealer: Sealer | None = None

    async def add(self, part: bytes) -> PartRef:
        """Where the part will be when the writer is finished."""
        if self._name is not None and self._size + len(part) > self._size_max:
            await self.finish()
        if self._name is None:
            self._name = self._sender.name(self._owner)
            self._sealer = self._sender.sealer(self._name, self._keys)
            self._buffers = [pack_preamble(Magic.PAGES, FEATURE_ENCRYPTED if self._sealer else 0)]
            self._size = len(self._buffers[0])
        if self._sealer is not None:
            part = self._sealer.part(part, self._size)
        reference = PartRef(self._name.key, self._size, len(part), digest_of(part).hex())
        self._buffers.append(part)
        self._size += len(part)
        return reference

    async def finish(self) -> None:
        """Store the object that is being filled, if there is one."""
        if self._name is None:
            return
        await self._sender.enter(self._size)
        try:
            await self._sender.send(self._name, self._buffers, self._size)
        finally:
            self._sender.leave(self._size)
        self.last_seq, self._name = self._name.seq, None
