"""Sets of chunks as bytes, for INVALIDATE, ZEROS, NEED and the handover.

A set is cut into windows of 2^20 chunks; empty windows are left out. A window holds, after one byte that says
which, either runs (pairs of u32: first chunk relative to the window, count) or a bitmap (bit ``i % 8`` of byte
``i // 8``, cut off after the last set bit), whichever is shorter. So a window never exceeds 128 KiB, and a
whole disk is a few bytes per window.

Decoding is for hostile bytes: runs must ascend, must not touch, and must lie inside the volume.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import numpy as np

from silo.chunkmap import Indices
from silo.errors import RemoteProtocolError

__all__ = ["SET_WINDOW", "decode_window", "encode_run", "encode_set"]

SET_WINDOW: Final = 1 << 20

_RUN: Final = struct.Struct("<II")
_RUNS: Final = 1
_BITMAP: Final = 2


def encode_set(chunks: Indices) -> Iterator[tuple[int, bytes]]:
    """``(window, data)`` for every window of an ascending set without duplicates."""
    if len(chunks) == 0:
        return
    edges = np.flatnonzero(np.diff(chunks // SET_WINDOW)) + 1
    for part in np.split(chunks, edges):
        window = int(part[0]) // SET_WINDOW
        yield window, _encode_window(part - window * SET_WINDOW)


def encode_run(first: int, count: int) -> bytes:
    """The data of a window that holds one run, relative to the window."""
    return bytes([_RUNS]) + _RUN.pack(first, count)


def _encode_window(members: Indices) -> bytes:
    breaks = np.flatnonzero(np.diff(members) != 1) + 1
    firsts = members[np.concatenate(([0], breaks))]
    lasts = members[np.concatenate((breaks - 1, [len(members) - 1]))]
    if 8 * len(firsts) <= int(members[-1]) // 8 + 1:
        pairs = np.stack((firsts, lasts - firsts + 1), axis=1).astype("<u4")
        return bytes([_RUNS]) + pairs.tobytes()
    bits = np.zeros(int(members[-1]) + 1, dtype=np.uint8)
    bits[members] = 1
    return bytes([_BITMAP]) + np.packbits(bits, bitorder="little").tobytes()


def decode_window(window: int, data: bytes, chunk_count: int) -> Indices:
    """The chunks of one window, ascending. `RemoteProtocolError` unless they lie in a volume of that size."""
    base = window * SET_WINDOW
    room = min(SET_WINDOW, chunk_count - base)
    if window < 0 or room <= 0 or len(data) < 2:
        raise RemoteProtocolError(
            f"window {window} of a chunk set lies outside a volume of {chunk_count} chunks"
        )
    body = memoryview(data)[1:]
    if data[0] == _RUNS:
        return _decode_runs(body, room) + base
    if data[0] == _BITMAP:
        if len(body) > (room + 7) // 8:
            raise RemoteProtocolError("the bitmap of a chunk set is longer than its window")
        members = np.flatnonzero(np.unpackbits(np.frombuffer(body, dtype=np.uint8), bitorder="little"))
        if len(members) == 0 or members[-1] >= room:
            raise RemoteProtocolError(
                "the bitmap of a chunk set is empty or names chunks outside of its volume"
            )
        return members.astype(np.int64) + base
    raise RemoteProtocolError(f"a chunk set came in form {data[0]}, which is unknown")


def _decode_runs(body: memoryview, room: int) -> Indices:
    if len(body) % 8:
        raise RemoteProtocolError("the runs of a chunk set are cut off")
    pairs = np.frombuffer(body, dtype="<u4").reshape(-1, 2).astype(np.int64)
    firsts, counts = pairs[:, 0], pairs[:, 1]
    limits = firsts + counts
    if (counts == 0).any() or (firsts[1:] <= limits[:-1]).any() or limits[-1] > room:
        raise RemoteProtocolError("the runs of a chunk set are empty, out of order, or outside of its volume")
    # Each run's members are its first plus 0, 1, 2, ...: one arange minus where each run begins in it.
    starts = np.cumsum(counts) - counts
    members: Indices = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(firsts - starts, counts)
    return members
