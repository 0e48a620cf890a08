"""What Linux can do with a file and Python has no name for: `fallocate`, and which file system it is on.

Both are thin: arguments in, ``OSError`` out. They may block; the caller decides where that is allowed.
"""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = [
    "EPHEMERAL_FILESYSTEMS",
    "NETWORK_FILESYSTEMS",
    "PUNCH_HOLE",
    "ZERO_RANGE",
    "fallocate",
    "filesystem_magic",
]

_KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02 | _KEEP_SIZE
"""Give the space back; the extent reads as zeros and the file keeps its size."""
ZERO_RANGE = 0x10 | _KEEP_SIZE
"""The extent reads as zeros; its space stays reserved."""

EPHEMERAL_FILESYSTEMS = frozenset({0x01021994, 0x858458F6})
"""tmpfs and ramfs (``statfs(2)``): all of a file is in memory."""

NETWORK_FILESYSTEMS = frozenset(
    {
        0x6969,  # NFS
        0x517B,  # SMB
        0xFF534D42,  # CIFS
        0xFE534D42,  # SMB 2
        0x65735546,  # FUSE (and virtiofs): nobody knows what is behind it
        0x00C36400,  # Ceph
        0x01021997,  # 9P
        0x5346414F,  # AFS
        0x47504653,  # GPFS
        0x0BD00BD0,  # Lustre
    }
)
"""Where locks and ``rename`` may mean less than on a local disk."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.fstatfs.restype = ctypes.c_int

_STATFS_SIZE = 256
"""``struct statfs`` takes 120 bytes on 64-bit machines; its first field is the magic number, one long."""


def _raise_errno() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call ``fallocate(2)``. ``length`` must be positive. Raises `OSError`."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        if ctypes.get_errno() != errno.EINTR:
            _raise_errno()


def filesystem_magic(fd: int) -> int:
    """The type of the file system that an open file is on, as ``statfs(2)`` numbers it. Raises `OSError`."""
    record = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc.fstatfs(fd, record) != 0:
        _raise_errno()
    return ctypes.c_ulong.from_buffer(record).value & 0xFFFFFFFF
