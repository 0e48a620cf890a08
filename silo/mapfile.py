"""The states of all chunks in a shared mapping of a file, so that they survive ``kill -9``.

A store into the mapping is a store into the page cache: when the process dies, the kernel still has it, in the
order in which it happened, next to the writes to the device. When the *machine* dies, nothing of that holds, so
the file carries the boot id and is worth nothing under another one (safety rule 9); nothing here is ever synced.

The file: a header of one page (magic, version, boot id, geometry, owner, digest), then one byte per chunk. It
comes into being under a temporary name, complete, and is renamed: a process that dies on the way leaves the old
file. Its space is allocated beforehand, because a full disk would otherwise strike as SIGBUS in the middle of
a guest's write.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path

import numpy as np
from blake3 import blake3

from silo.abc import Buffer
from silo.checkpoint import OWNER_TAG_SIZE
from silo.chunkmap import RESIDENCY_MASK, Residency, after_restart
from silo.errors import CorruptionError
from silo.files import pwrite_all
from silo.geometry import Geometry

__all__ = ["MapFile"]

MAGIC = b"SILOMAP\0"
VERSION = 1
HEADER_SIZE = 4096
_HEADER = struct.Struct(f"<8sI36sQII{OWNER_TAG_SIZE}s")
"""magic, version, boot id, size, chunk size, block size, owner."""
_DIGEST_SIZE = 32
_BOOT_ID_SIZE = 36


class MapFile:
    """An open mapping. ``states`` is writable, one byte per chunk."""

    def __init__(self, path: Path, geometry: Geometry) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, HEADER_SIZE + geometry.chunk_count)
        finally:
            os.close(fd)
        self.states = memoryview(self._map)[HEADER_SIZE:]

    @classmethod
    def create(cls, path: Path, geometry: Geometry, owner: bytes, boot: str, states: Buffer) -> MapFile:
        """Put a new file with these states into place and map it. Raises `OSError`."""
        temporary = path.with_name(f".{path.name}.new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, HEADER_SIZE + geometry.chunk_count)
            pwrite_all(fd, _header(geometry, owner, boot), 0)
            pwrite_all(fd, states, HEADER_SIZE)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        return cls(path, geometry)

    @classmethod
    def reopen(cls, path: Path, geometry: Geometry, owner: bytes, boot: str) -> MapFile | None:
        """Map what a process of this boot left, made meaningful again by `after_restart`; else ``None``.

        ``None`` also for a file that is missing, torn, or of another geometry: whoever asks has a checkpoint.
        Raises `OSError`, and `CorruptionError` for a residency that does not exist in a file of this boot.
        """
        try:
            with path.open("rb") as file:
                header = file.read(HEADER_SIZE)
                length = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return None
        if length != HEADER_SIZE + geometry.chunk_count or header != _header(geometry, owner, boot):
            return None
        found = cls(path, geometry)
        view = np.frombuffer(found.states, dtype=np.uint8)
        impossible = bool(((view & RESIDENCY_MASK) > max(Residency)).any())
        if not impossible:
            after_restart(view)
        del view
        if impossible:
            found.close()
            raise CorruptionError(
                f"{path} holds a residency that does not exist",
                hint="keep the file and report it; without it the last checkpoint counts",
            )
        return found

    @staticmethod
    def read(path: Path, geometry: Geometry, owner: bytes, boot: str) -> bytes | None:
        """A copy of the states that a process of this boot left, as they are; else ``None``. Raises `OSError`."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(data) != HEADER_SIZE + geometry.chunk_count or data[:HEADER_SIZE] != _header(
            geometry, owner, boot
        ):
            return None
        return data[HEADER_SIZE:]

    def close(self) -> None:
        """Unmap, or leave that to the end of the last view when somebody still looks at the states."""
        with contextlib.suppress(BufferError):
            self.states.release()
            self._map.close()


def _header(geometry: Geometry, owner: bytes, boot: str) -> bytes:
    boot_bytes = boot.encode("ascii")[:_BOOT_ID_SIZE]
    fields = _HEADER.pack(
        MAGIC, VERSION, boot_bytes, geometry.size, geometry.chunk_size, geometry.block_size, owner
    )
    return (fields + blake3(fields).digest()).ljust(HEADER_SIZE, b"\0")
