"""Small volumes to test with, and things that stand at their edges."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from silo.abc import BlockDevice, Buffer, ChunkSource
from silo.chunkmap import ChunkMap, Residency
from silo.clock import SystemClock
from silo.geometry import CHUNK_SIZE_MIN, Geometry
from silo.group import CopyLimits, Group
from silo.volume import Volume

CHUNK = CHUNK_SIZE_MIN
"""The smallest chunk: eight blocks of 512 bytes."""


def make_volume(
    device: BlockDevice,
    residency: Residency = Residency.PRESENT,
    *,
    group: Group | None = None,
    name: str = "disk",
    copies: CopyLimits | None = None,
    **options: object,
) -> tuple[Group, Volume]:
    """A volume of 4 KiB chunks, all in one residency and clean, in a group of its own or the one given."""
    group = group or Group("group", SystemClock(), copies=copies)
    geometry = Geometry(device.size, chunk_size=CHUNK)
    chunks = ChunkMap.filled(geometry.chunk_count, residency)
    return group, group.add(name, device, geometry, chunks=chunks, **options)


def states(volume: Volume) -> list[Residency]:
    """The residency of every chunk."""
    return [volume.chunks.residency(chunk) for chunk in range(volume.chunks.count)]


def chunks_with(volume: Volume, bits: int) -> list[int]:
    """The chunks that have all of the bits."""
    return np.flatnonzero(volume.chunks.view & bits == bits).tolist()


class DictSource(ChunkSource):
    """A source that holds its chunks in a dictionary and counts what is asked of it."""

    def __init__(self, content: dict[int, Buffer | None] | Iterable[tuple[int, Buffer | None]] = ()) -> None:
        self.content = dict(content)
        self.asked: list[tuple[int, bool]] = []

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        self.asked.append((chunk, demand))
        await self.before_answer(chunk, demand)
        return self.content[chunk]

    async def before_answer(self, chunk: int, demand: bool) -> None:
        """What a subclass does while the caller waits."""


class KeptMaps:
    """A keeper of maps that survives everything."""

    def __init__(self) -> None:
        self.states: bytes | None = None
        self.count = 0

    async def checkpoint(self, states: bytes) -> None:
        self.states = states
        self.count += 1
