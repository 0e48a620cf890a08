"""What the syncer decides, without doing it: order, batches, pace, window, when to write a checkpoint.

Everything here is a function or a small machine that takes the time as a number. None of it can make a commit
wrong; it can only make it late or expensive.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import numpy.typing as npt

from silo.chunkmap import Indices

__all__ = [
    "LEVELS",
    "Pace",
    "TokenBucket",
    "UploadWindow",
    "batches",
    "checkpoint_due",
    "coldest_first",
    "hottest_left",
    "is_worth_a_pass",
    "levels_of",
]

SCAN = 1 << 16
"""Chunks looked at in one step: below a tenth of a millisecond."""


def coldest_first(chunks: Indices, heat: npt.NDArray[np.float32]) -> Iterator[Indices]:
    """The chunks from the least to the most often written, in arrays of bounded length.

    ``heat`` has one value per chunk of the volume and is looked at only by the first step: it may change between
    two arrays, and every chunk still comes exactly once. Chunks whose heat differs by less than a factor of two
    keep the order of their indices, so that neighbours stay together in a segment and can be read back in one go.
    Never sorts: one pass per level of heat that occurs, over windows.
    """
    levels = np.empty(len(chunks), dtype=np.uint8)
    for start in range(0, len(chunks), SCAN):
        levels[start : start + SCAN] = levels_of(heat[chunks[start : start + SCAN]])
    for level in np.unique(levels):
        for start in range(0, len(chunks), SCAN):
            chosen = chunks[start : start + SCAN][levels[start : start + SCAN] == level]
            if len(chosen):
                yield chosen


LEVELS = 129
"""What `levels_of` may return is below this."""


def levels_of(heat: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The power of two below each value; 0 for everything below 1."""
    _, exponent = np.frexp(heat)
    return np.clip(exponent, 0, LEVELS - 1).astype(np.uint8)


def hottest_left(sizes: npt.NDArray[np.int64], keep: int) -> int:
    """Up to which level of heat chunks are uploaded ahead, so that at most ``keep`` bytes are left for the cut.

    ``sizes`` has the dirty bytes of each level. Chunks of one level go together, so a lot of equally hot ones all go.
    """
    above = np.cumsum(sizes[::-1])[::-1] - sizes
    return int(np.argmax(above <= keep))


def is_worth_a_pass(left: int, before: float, cut_size: int) -> bool:
    """Whether to upload once more ahead of the cut: ``left`` dirty bytes are too many for it, and fewer than before.

    A guest that dirties as fast as we upload would make us go on for ever; then the cut must do, with what it has for
    copies. ``before`` is what was left before the last pass.
    """
    return left > cut_size and left <= 0.7 * before


def batches(arrays: Iterator[Indices], size: int) -> Iterator[list[int]]:
    """Regroup chunk indices into lists of at most ``size``, in order."""
    batch: list[int] = []
    for array in arrays:
        start = 0
        while start < len(array):
            taken = array[start : start + size - len(batch)]
            batch += taken.tolist()
            start += len(taken)
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


class UploadWindow:
    """How many bytes may be on their way to the store: grows while that goes well, is halved when it does not.

    Additive increase and multiplicative decrease, as TCP does it: several senders that share a store or an
    uplink end with equal shares. One step up per window that was used in full and stored.
    """

    def __init__(self, least: int, most: int) -> None:
        self.limit = min(2 * least, most)
        self.used = 0
        self._least, self._most = least, most
        self._good = 0

    def fits(self, size: int) -> bool:
        """Whether ``size`` more bytes may be sent. Anything fits into an empty window."""
        return self.used == 0 or self.used + size <= self.limit

    def enter(self, size: int) -> None:
        """``size`` bytes are on their way."""
        self.used += size

    def leave(self, size: int) -> None:
        """They are not any more."""
        self.used -= size

    def succeeded(self, size: int) -> None:
        """An upload was stored."""
        self._good += size
        if self._good >= self.limit:
            self._good = 0
            self.limit = min(self._most, self.limit + self._least)

    def failed(self) -> None:
        """An upload was not answered, or the store asked to slow down."""
        self._good = 0
        self.limit = max(self._least, self.limit // 2)


class TokenBucket:
    """A limit on bytes per second: each transfer waits until the ones before it have paid for themselves."""

    BURST_S = 1.0

    def __init__(self, rate_bps: float | None) -> None:
        self._rate = rate_bps
        self._free_at = 0.0

    def delay(self, now: float, size: int) -> float:
        """Seconds that a transfer of ``size`` bytes must wait from ``now`` on. Counts it as sent."""
        if self._rate is None:
            return 0.0
        start = max(self._free_at, now - self.BURST_S)
        self._free_at = start + size / self._rate
        return max(0.0, start - now)


@attrs.define
class Pace:
    """When the next cut is due, so that its commit comes before the newest generation is older than the target.

    A generation is as old as its cut. Right before a commit the newest one is older by the time between two cuts
    and the time that a cut needs to be stored, so the latter is taken off the target.
    """

    rpo_s: float
    duration_s: float = 0.0
    """Smoothed time from a cut to its commit; rises at once, falls slowly."""

    def took(self, duration_s: float) -> None:
        """A cut was stored, with what was uploaded ahead of it. One that took longer than the target, such as the first
        one, says no more than that."""
        duration_s = min(duration_s, self.rpo_s)
        self.duration_s = max(duration_s, self.duration_s * 0.7 + duration_s * 0.3)

    def next_cut(self, last_cut: float) -> float:
        """The time of the next cut. At least a tenth of the target lies between two, lest a slow store make
        every cut smaller and dearer."""
        return last_cut + max(self.rpo_s - 1.25 * self.duration_s, self.rpo_s / 10)


def checkpoint_due(*, segments: int, soft_limit: int, page_bytes: int, stored_bytes: int) -> bool:
    """Whether to write the changed pages of the map and a new root.

    ``segments`` and ``stored_bytes`` count what was committed since the last root, ``page_bytes`` what would be
    written. A checkpoint should stay below 2 % of what it follows; but no restore should have to read more than
    four times ``soft_limit`` indexes.
    """
    if segments < soft_limit:
        return False
    return page_bytes * 50 <= stored_bytes or segments >= 4 * soft_limit
