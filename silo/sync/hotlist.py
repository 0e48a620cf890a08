"""The list of the chunks that are read first after a start: what is prefetched before everything else next time.

It is a hint. One part of an object, named by ``hot`` in the head::

    preamble (16) │ number of entries (u32), four bytes of zero │ names: volumes… │ entries of 16 bytes

Each entry is a run of chunks of one volume; the order is the order in which they should be fetched. Pure. The parser
takes untrusted bytes and raises `CorruptionError`, nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from silo.abc import Buffer
from silo.chunkmap import Indices, indices_of, runs_of
from silo.errors import CorruptionError
from silo.sync.codec import digest_of
from silo.sync.layout import PREAMBLE_SIZE, Magic, pack_preamble, parse_preamble
from silo.sync.nametable import pack_names, parse_names
from silo.sync.segment import CHUNK_LIMIT

__all__ = ["choose_hot", "encode_hot", "parse_hot"]

_TWO = struct.Struct("<II")

ENTRY = np.dtype([("volume", "<u2"), ("reserved", "<u2"), ("count", "<u4"), ("first", "<u8")])

CHUNKS_MAX = 1 << 22
"""More than any list of ours; what a parser is willing to expand."""


def choose_hot(heats: Mapping[str, np.ndarray], limits: Mapping[str, int]) -> dict[str, Indices]:
    """The chunks of each volume that were read at all, in the order of the disk; of more than its limit the hottest.

    ``heats`` has one value per chunk, ``limits`` a number of chunks per volume.
    """
    chosen: dict[str, Indices] = {}
    for name, heat in heats.items():
        read = np.flatnonzero(heat > 0)
        if len(read) > limits[name]:
            hottest = np.argsort(-heat[read], kind="stable")[: limits[name]]
            read = np.sort(read[hottest])
        if len(read):
            chosen[name] = read
    return chosen


def encode_hot(chunks: Mapping[str, Indices]) -> bytes:
    """The bytes of the list. Equal lists have equal bytes."""
    rows = [
        (number, 0, limit - first, first)
        for number, indices in enumerate(chunks.values())
        for first, limit in runs_of(indices)
    ]
    return b"".join(
        (
            pack_preamble(Magic.HOT),
            _TWO.pack(len(rows), 0),
            pack_names(list(chunks)),
            np.array(rows, dtype=ENTRY).tobytes(),
        )
    )


def parse_hot(data: Buffer, *, digest: bytes) -> dict[str, Indices]:
    """The list that must have this digest: chunk numbers, not checked against any volume."""
    if digest_of(data) != digest:
        raise CorruptionError("the list of first reads does not have its digest")
    parse_preamble(data, Magic.HOT)
    if len(data) < PREAMBLE_SIZE + _TWO.size:
        raise CorruptionError("the list of first reads is cut short")
    count, zero = _TWO.unpack_from(data, PREAMBLE_SIZE)
    names, start = parse_names(data, PREAMBLE_SIZE + _TWO.size)
    if zero or len(data) - start != count * ENTRY.itemsize or len(set(names)) != len(names):
        raise CorruptionError("the list of first reads does not make sense")
    entries = np.frombuffer(data, dtype=ENTRY, offset=start)
    sound = (entries["volume"] < len(names)) & (entries["reserved"] == 0) & (entries["first"] < CHUNK_LIMIT)
    if not bool(sound.all()) or int(entries["count"].sum(dtype=np.uint64)) > CHUNKS_MAX:
        raise CorruptionError("the list of first reads has entries that are out of bounds")
    return {
        name: indices_of(
            (int(entry["first"]), int(entry["first"]) + int(entry["count"]))
            for entry in entries[entries["volume"] == number]
        )
        for number, name in enumerate(names)
    }
