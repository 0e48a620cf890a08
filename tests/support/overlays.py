"""Overlays in memory to test with: something below, something of its own, and a map that survives what it should."""

from __future__ import annotations

import asyncio
import random

import numpy as np

from silo.abc import BlockDevice, Buffer
from silo.checkpoint import kept_of, states_after_power_loss
from silo.chunkmap import Residency, after_restart
from silo.devices.memory import MemoryDevice
from silo.devices.overlay import OverlayDevice
from silo.devices.overlay_folder import fresh_cells
from silo.geometry import CHUNK_SIZE_MIN, Geometry
from silo.volumestate import EphemeralState, Origin, VolumeState

CELL = CHUNK_SIZE_MIN
"""The smallest cell: eight blocks of 512 bytes."""

BELOW, ZERO, OWNED = Residency.ABSENT_STORE, Residency.ZERO_UNPUNCHED, Residency.PRESENT

GOLDEN = random.Random(3).randbytes(4 * CELL + 3 * 512)
"""The content of a base: four of the smallest cells and a short one."""


def cells_of(overlay: OverlayDevice) -> list[Residency]:
    """Where the content of each cell is."""
    return [overlay._map.residency(cell) for cell in range(overlay.cells.chunk_count)]


def content_of(overlay: OverlayDevice) -> bytes:
    """All of it, read without waiting."""
    return bytes(overlay.read_nowait(0, overlay.size))


async def change(overlay: OverlayDevice, offset: int, new: bytes) -> None:
    """Write, or zero when it is zeros; fast if possible."""
    if any(new):
        if not overlay.write_nowait(offset, new):
            await overlay.write(offset, new)
    elif not overlay.zero_nowait(offset, len(new)):
        await overlay.zero(offset, len(new))


def memory_with(content: Buffer) -> MemoryDevice:
    """A device in memory that holds this."""
    device = MemoryDevice(len(content))
    device.write_nowait(0, content)
    return device


def make_overlay(
    base: BlockDevice,
    data: BlockDevice | None = None,
    *,
    cell_size: int = CELL,
    state: VolumeState | None = None,
) -> OverlayDevice:
    """A new overlay over ``base``, with its own bytes in memory unless told otherwise."""
    data = data or MemoryDevice(base.size)
    cells = Geometry(data.size, cell_size)
    return OverlayDevice(base, data, cells, state or EphemeralState(cells, fresh_cells(cells, base.size)))


class KeptMap(VolumeState):
    """A map whose bytes survive the process, and whose checkpoints, which take their time, survive the machine."""

    origin = Origin.FRESH

    def __init__(self, fresh: Buffer, chance: random.Random) -> None:
        self.buffer = bytearray(fresh)
        self.durable = bytes(fresh)
        self._chance = chance

    async def checkpoint(self, states: bytes) -> None:
        await asyncio.sleep(self._chance.uniform(0, 0.02))
        self.durable = states

    async def aclose(self) -> None:
        """Nothing to give up."""

    def restart(self, *, power: bool) -> KeptMap:
        """What the next process finds. What the dead one holds on to is no longer the map."""
        other = KeptMap(self.buffer, self._chance)
        other.durable = self.durable
        if power:
            other.buffer = bytearray(states_after_power_loss(kept_of(self.durable)).data)
        else:
            after_restart(np.frombuffer(other.buffer, dtype=np.uint8))
        return other
