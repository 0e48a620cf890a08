"""A group: volumes that belong together, such as a disk, the memory and the device state of one machine.

They share one gate, so they stop at one instant; one cut, which names one instant of all of them; and one
writer, whose epoch the register knows. A lone disk is a group of one. All of a group lives on one event loop,
whatever thread serves its frontends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack

import attrs

from silo.abc import BlockDevice, Clock
from silo.chunkmap import SYNC_DIRTY, SYNC_IN_CUT, ChunkMap, Indices, Residency
from silo.dirtymap import take_migration
from silo.errors import InvalidRequestError, InvariantError
from silo.frozen import CopySpace, Cut, VolumeCut
from silo.gate import Gate
from silo.geometry import Geometry
from silo.heatmap import HALF_LIFE_DEFAULT_S, HeatMap
from silo.localchunks import MapKeeper
from silo.names import check_group_name, check_volume_name
from silo.throttle import Throttle
from silo.volume import Volume

__all__ = ["CopyLimits", "Group"]


@attrs.frozen
class CopyLimits:
    """Room for copy-before-write during a cut, in bytes; ``directory`` takes what does not fit in memory."""

    memory: int = 64 << 20
    spill: int = 4 << 30
    directory: str | None = None


class Group:
    """See the module. Made open and empty; `add` volumes before serving them."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        *,
        is_open: bool = True,
        copies: CopyLimits | None = None,
        half_life_s: float = HALF_LIFE_DEFAULT_S,
    ) -> None:
        self.name = check_group_name(name)
        self.clock = clock
        self.gate = Gate(is_open=is_open)
        self.throttle = Throttle(clock, self._slow_down)
        """Whoever must carry away what the guest writes may limit that here."""
        self.volumes: dict[str, Volume] = {}
        self._copies = copies or CopyLimits()
        self._half_life_s = half_life_s
        self._cut: Cut | None = None

    def add(
        self,
        name: str,
        device: BlockDevice,
        geometry: Geometry | None = None,
        *,
        chunks: ChunkMap | None = None,
        keeper: MapKeeper | None = None,
        read_only: bool = False,
    ) -> Volume:
        """Put a volume on a device. Without ``chunks`` everything counts as present on the device."""
        if check_volume_name(name) in self.volumes:
            raise InvalidRequestError(f"group {self.name} already has a volume {name}")
        shape = geometry or Geometry(device.size)
        heat = HeatMap(shape.chunk_count, now=self.clock.monotonic(), half_life_s=self._half_life_s)
        volume = Volume(
            name, device, shape, self.gate, chunks=chunks, heat=heat, keeper=keeper, read_only=read_only
        )
        self.volumes[name] = volume
        self._slow_down()
        return volume

    def _slow_down(self) -> None:
        throttle = self.throttle if self.throttle.rate_bps is not None else None
        for volume in self.volumes.values():
            volume.slow_down(throttle)

    @property
    def cut(self) -> Cut | None:
        """The cut that is not decided yet."""
        return self._cut

    def take(self) -> Cut:
        """Freeze the dirty chunks of all volumes at this instant. One synchronous step.

        The caller must end the cut with exactly one of `Cut.commit` and `Cut.abandon` before the next.
        """
        if self._cut is not None:
            raise InvariantError(f"group {self.name} took a cut while another one is not decided")
        self.advance_heat()
        space = CopySpace(
            memory_limit=self._copies.memory,
            spill_limit=self._copies.spill,
            directory=self._copies.directory,
        )
        parts: dict[str, VolumeCut] = {}
        cut = Cut(
            volumes=parts,
            time_wall=self.clock.wall(),
            time_monotonic=self.clock.monotonic(),
            maps={name: volume.chunks for name, volume in self.volumes.items()},
            space=space,
            on_end=self._forget_cut,
        )
        for name, volume in self.volumes.items():
            part = VolumeCut(name, volume.geometry, volume.device, volume.chunks, space, cut.overflow)
            parts[name] = part
            volume.begin_cut(part)
        self._cut = cut
        return cut

    def _forget_cut(self) -> None:
        self._cut = None
        for volume in self.volumes.values():
            volume.cut = None

    def record_migration(self, on: bool) -> None:
        """Start the migration recorder of all volumes with everything clean, or stop it."""
        for volume in self.volumes.values():
            volume.record_migration(on)

    def take_migration(self) -> Mapping[str, Indices]:
        """The chunks of each volume written since the last call. The caller owns them from here on."""
        return {name: take_migration(volume.chunks) for name, volume in self.volumes.items()}

    def unsynced(self) -> Mapping[str, Indices]:
        """The chunks whose newest content is not known to be committed: dirty, or taken for an open cut."""
        return {
            name: volume.chunks.select_dirty(SYNC_DIRTY | SYNC_IN_CUT)
            for name, volume in self.volumes.items()
        }

    @property
    def exposed_bytes(self) -> int:
        """Upper bound of the bytes that would be lost with this host: dirty or uncommitted chunks."""
        return sum(
            volume.chunks.count_dirty(SYNC_DIRTY | SYNC_IN_CUT) * volume.geometry.chunk_size
            for volume in self.volumes.values()
        )

    @property
    def backlog_bytes(self) -> int:
        """Upper bound of what no upload has begun with: dirty chunks."""
        return sum(
            volume.chunks.count_dirty(SYNC_DIRTY) * volume.geometry.chunk_size
            for volume in self.volumes.values()
        )

    def absent_counts(self, residencies: Iterable[Residency]) -> int:
        """How many chunks of all volumes are in one of the given residencies."""
        wanted = set(residencies)
        return sum(
            count
            for volume in self.volumes.values()
            for residency, count in volume.chunks.count_residency().items()
            if residency in wanted
        )

    def advance_heat(self) -> None:
        """Move the heat maps to now. Called by the owner about once a second."""
        now = self.clock.monotonic()
        for volume in self.volumes.values():
            volume.heat.advance(now)

    async def flush(self) -> None:
        """Flush every volume, as `Volume.flush`."""
        for volume in self.volumes.values():
            await volume.flush()

    async def checkpoint(self) -> None:
        """Before the volumes are given up: punch what was zeroed, so that the bare devices read as the volumes do,
        and make all maps durable."""
        for volume in self.volumes.values():
            await volume.punch()
            await volume.checkpoint()

    async def aclose(self) -> None:
        """Close all devices, also when one of them raises. Does not flush: the host decides what must be durable."""
        async with AsyncExitStack() as stack:
            for volume in self.volumes.values():
                stack.push_async_callback(volume.device.aclose)
