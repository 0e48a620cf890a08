"""Uploading ahead of a cut: large dirty sets go to the store in rounds, while the guest writes on (safety rule 18).

A cut protects old content until it is captured, so a large one costs the guest copies, and its instant lies long
before its commit. Therefore, when more is dirty than a cut should hold, most of it is uploaded first, as it happens
to be. A *round* takes up to ``round_size`` bytes of dirty chunks; each of them is moved from dirty to in-cut right
before it is read, and nothing is frozen. What the guest writes afterwards makes its chunk dirty again, by the very
store that it does anyway: being uploaded ahead costs the guest nothing.

The cut then takes what is dirty at its instant: what the rounds have left, and what was written since. A chunk that
is still only in-cut is in the store as it is at that instant, and the commit refers to it without its being
read again. What a round has stored is *pending* (`silo.sync.pending`) until then; a crash leaves garbage in the
store, and dirty chunks here.

The hottest chunks, as many as half a cut holds, are left for the cut: they would be written again before it. A
pass over everything that is dirty is repeated as long as that helps.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing

import numpy as np
import numpy.typing as npt

from silo.chunkmap import LOCKED, RESIDENCY_MASK, SYNC_DIRTY, Indices, Residency, join_indices
from silo.dirtymap import give_back
from silo.frozen import Taken
from silo.group import Group
from silo.sync.planner import LEVELS, hottest_left, is_worth_a_pass, levels_of
from silo.sync.settings import SyncSettings
from silo.volume import Volume

__all__ = ["Forerunner", "Round", "TakenAhead"]

SCAN = 1 << 16
"""Chunks of the map that are looked at in one step: about a millisecond when all of them are dirty."""

WANTED = RESIDENCY_MASK | LOCKED | SYNC_DIRTY, int(Residency.PRESENT) | SYNC_DIRTY


class TakenAhead(Taken):
    """One volume's part of a round. A chunk is taken when it is read; one that cannot be stays dirty for the cut."""

    def __init__(self, volume: Volume, data: Indices) -> None:
        super().__init__(volume.name, volume.geometry, volume.device, volume.chunks)
        self.data = data
        self.zeros = []
        self._volume = volume
        self._taken: list[int] = []

    async def _capture_run(self, run: Sequence[int], room: memoryview, parts: list[memoryview]) -> None:
        # Taken before they are read: what is written meanwhile makes its chunk dirty again, and leaves it so.
        self._taken += filter(self._volume.take_ahead, run)
        offset = self.geometry.extent_of(run[0])[0]
        if not self._device.copy_nowait(offset, room):
            room[:] = await self._device.read(offset, len(room))

    def give_back(self) -> None:
        """The round has failed: nobody knows which of its chunks are stored, so all of them are dirty."""
        give_back(self._chunks, np.array(sorted(self._taken), dtype=np.int64))


class Round:
    """What is uploaded in one go, and succeeds or fails as one. Takes the place of a cut in the uploader."""

    overflowed = False

    def __init__(self, volumes: Mapping[str, TakenAhead]) -> None:
        self.volumes = volumes

    def give_back(self) -> None:
        """See `TakenAhead.give_back`."""
        for part in self.volumes.values():
            part.give_back()


class Forerunner:
    """Plans the rounds of one group and has them uploaded. One call at a time, and no cut meanwhile."""

    def __init__(
        self, group: Group, upload: Callable[[Round], Awaitable[None]], settings: SyncSettings
    ) -> None:
        self.rounds = 0
        """How many were stored."""
        self._group = group
        self._upload = upload
        self._settings = settings

    async def run(self, may_go_on: Callable[[], bool]) -> None:
        """Upload ahead until a cut can take the rest, or until that does not get less, or ``may_go_on`` says no.

        Raises as the upload of a cut. Then, and after a cancellation, what the last round took is dirty again.
        """
        before = math.inf
        while may_go_on() and is_worth_a_pass(left := self._dirty_bytes(), before, self._settings.cut_size):
            before = left
            async with aclosing(self._rounds()) as rounds:
                async for round_ in rounds:
                    await self._upload(round_)
                    self.rounds += 1
                    if not may_go_on():
                        return

    def _dirty_bytes(self) -> int:
        """Content that a cut would take now."""
        return sum(
            len(volume.chunks.select_dirty(SYNC_DIRTY, *WANTED)) * volume.geometry.chunk_size
            for volume in self._group.volumes.values()
        )

    async def _rounds(self) -> AsyncGenerator[Round, None]:
        """Everything that is dirty and not hot, in rounds. Looks at the maps as it goes on."""
        warmest = hottest_left(await self._survey(), self._settings.cut_size // 2)
        found: dict[str, list[Indices]] = {}
        room = self._settings.round_size
        for volume in list(self._group.volumes.values()):
            size = volume.geometry.chunk_size
            for chunks, levels in _windows(volume):
                cold = chunks[levels <= warmest]
                while len(cold):
                    part = cold[: max(1, room // size)]
                    cold = cold[len(part) :]
                    room -= len(part) * size
                    found.setdefault(volume.name, []).append(part)
                    if room < size:
                        yield self._round(found)
                        found, room = {}, self._settings.round_size
                await asyncio.sleep(0)
        if found:
            yield self._round(found)

    def _round(self, found: Mapping[str, list[Indices]]) -> Round:
        volumes = self._group.volumes
        return Round({name: TakenAhead(volumes[name], join_indices(parts)) for name, parts in found.items()})

    async def _survey(self) -> npt.NDArray[np.int64]:
        """Dirty bytes per level of heat."""
        total = np.zeros(LEVELS, dtype=np.int64)
        for volume in list(self._group.volumes.values()):
            for _, levels in _windows(volume):
                total += np.bincount(levels, minlength=LEVELS) * volume.geometry.chunk_size
                await asyncio.sleep(0)
        return total


def _windows(volume: Volume) -> Iterator[tuple[Indices, npt.NDArray[np.uint8]]]:
    """The dirty chunks with content and their levels of heat, for each stretch of the map that has any."""
    for low in range(0, volume.chunks.count, SCAN):
        chunks = volume.chunks.select(*WANTED, low, min(low + SCAN, volume.chunks.count))
        if len(chunks):
            yield chunks, levels_of(volume.heat.write_view[chunks])
