"""How hot every chunk is: reads and writes apart, decayed by age, at constant cost per request.

Forward decay (Cormode, Shkapenyuk, Srivastava and Xu, ICDE 2009): instead of letting old counts shrink, new
requests weigh more. A request at time ``t`` adds ``2 ** ((t - landmark) / half_life)``; dividing by the
weight of *now* gives the decayed count. So a request is one addition whatever the history, and the order of
two chunks never needs the division. When the weight approaches the end of a float32 everything is divided
once and the landmark moves.

The weight is a plain attribute that the guest's path adds without reading a clock. The owner of the group
calls `advance` about once a second; between two calls requests count as simultaneous.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from silo.errors import InvalidRequestError

__all__ = ["HALF_LIFE_DEFAULT_S", "HeatMap"]

HALF_LIFE_DEFAULT_S = 600.0
"""Ten minutes: long enough to see a periodic job twice, short enough to forget a boot."""

_WEIGHT_MAX = 2.0**64
"""Far below the float32 limit of 2^128, so that 2^64 requests at the largest weight still fit."""

_SHORT_RUN = 16
"""Up to here a loop costs less than numpy's detour, whose code a large request has driven from the cache."""


class HeatMap:
    """Decayed read and write counts per chunk: 8 bytes per chunk, allocated when touched.

    ``reads`` and ``writes`` are float32 memoryviews for the hot path (``heat.reads[chunk] += heat.weight``).
    """

    __slots__ = ("_half_life_s", "_landmark", "read_view", "reads", "weight", "write_view", "writes")

    def __init__(self, count: int, *, now: float = 0.0, half_life_s: float = HALF_LIFE_DEFAULT_S) -> None:
        if half_life_s <= 0:
            raise InvalidRequestError("the half-life of heat must be positive")
        self.read_view: npt.NDArray[np.float32] = np.zeros(count, dtype=np.float32)
        self.write_view: npt.NDArray[np.float32] = np.zeros(count, dtype=np.float32)
        self.reads = cast("memoryview[float]", self.read_view.data)
        self.writes = cast("memoryview[float]", self.write_view.data)
        self.weight = 1.0
        self._landmark = now
        self._half_life_s = half_life_s

    def advance(self, now: float) -> None:
        """Requests from here on happen at ``now`` (monotonic seconds, never less than before)."""
        exponent = (now - self._landmark) / self._half_life_s
        if exponent > 64:
            # After a long pause everything old has decayed below what a float32 can tell from zero.
            factor = np.float32(2.0 ** -min(exponent, 126.0))
            self.read_view *= factor
            self.write_view *= factor
            self._landmark = now
            exponent = 0.0
        self.weight = 2.0**exponent

    def note_reads(self, first: int, limit: int) -> None:
        """A read has touched a run of chunks."""
        _add(self.reads, self.read_view, first, limit, self.weight)

    def note_writes(self, first: int, limit: int) -> None:
        """A write has touched a run of chunks."""
        _add(self.writes, self.write_view, first, limit, self.weight)

    def read_heat(self, first: int = 0, limit: int | None = None) -> npt.NDArray[np.float32]:
        """Decayed read counts as of the last `advance`."""
        return self.read_view[first:limit] / np.float32(self.weight)

    def write_heat(self, first: int = 0, limit: int | None = None) -> npt.NDArray[np.float32]:
        """Decayed write counts as of the last `advance`."""
        return self.write_view[first:limit] / np.float32(self.weight)

    def adopt(self, reads: npt.NDArray[np.float32], writes: npt.NDArray[np.float32]) -> None:
        """Take over decayed counts that another host has seen (added to our own)."""
        self.read_view += reads * np.float32(self.weight)
        self.write_view += writes * np.float32(self.weight)


def _add(
    heats: memoryview[float], view: npt.NDArray[np.float32], first: int, limit: int, weight: float
) -> None:
    if limit - first > _SHORT_RUN:
        view[first:limit] += weight
    else:
        for chunk in range(first, limit):
            heats[chunk] += weight
