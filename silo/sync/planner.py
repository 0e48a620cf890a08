"""What the syncer decides, without doing it: order, batches, pace, window, when to write a checkpoint.

Everything here is a function or a small machine that takes the time as a number. None of it can make a commit
wrong; it can only make it late or expensive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs
import numpy as np
import numpy.typing as npt

from silo.chunkmap import Indices

__all__ = [
    "LEVELS",
    "DrainRate",
    "Pace",
    "TokenBucket",
    "UploadWindow",
    "batches",
    "checkpoint_due",
    "coldest_first",
    "guest_limit",
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
    uplink end with equal shares. One step up per window that was used in full and stored. A failure halves it; so
    does a store that takes several times as long per byte as it once did, because it, or the way to it, is busy, and
    more at once would only make everybody wait longer.
    """

    SLOW = 4.0
    """So many times the best pace is slow. Our own requests share a link: two or three at once are not it."""
    FORGET = 1.02
    """The best pace is taken to be worse by this with every upload, for a link that has become another one."""

    def __init__(self, least: int, most: int) -> None:
        self.limit = min(2 * least, most)
        self.used = 0
        self._least, self._most = least, most
        self._good = self._slow = 0
        self._best_pace = math.inf

    def fits(self, size: int) -> bool:
        """Whether ``size`` more bytes may be sent. Anything fits into an empty window."""
        return self.used == 0 or self.used + size <= self.limit

    def enter(self, size: int) -> None:
        """``size`` bytes are on their way."""
        self.used += size

    def leave(self, size: int) -> None:
        """They are not any more."""
        self.used -= size

    def succeeded(self, size: int, took_s: float = 0.0) -> None:
        """An upload was stored."""
        if took_s and size * 4 >= self._least:  # small ones measure the round trip
            pace = took_s / size
            self._best_pace = min(pace, self._best_pace * self.FORGET)
            if pace > self.SLOW * self._best_pace:
                self._slow += size
                if self._slow >= self.limit:
                    self.failed()
                return
        self._good += size
        if self._good >= self.limit:
            self._good = self._slow = 0
            self.limit = min(self._most, self.limit + self._least)

    def failed(self) -> None:
        """An upload was not answered, or the store asked to slow down."""
        self._good = self._slow = 0
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


@attrs.define
class DrainRate:
    """How fast content gets into the store, by what the last cuts took. ``None`` until one was large enough to tell."""

    rate_bps: float | None = None

    LEAST = 4 * 1024 * 1024
    """Smaller cuts measure round trips."""

    def took(self, content: int, duration_s: float) -> None:
        """So many bytes of chunks were committed in this time. A slow one counts little at first: it may be small."""
        if content >= self.LEAST and duration_s > 0:
            self.rate_bps = max(content / duration_s, 0.8 * (self.rate_bps or 0.0))


def guest_limit(*, exposed: int, rate_bps: float | None, rpo_s: float) -> float | None:
    """How fast a guest may make content dirty, in bytes per second, lest the recovery point slips; ``None``: at will.

    What is stored at ``rate_bps`` within the target is the room. Half of it may be exposed freely. Beyond, the guest
    gets what the store takes, and less the more of the room is used, down to a tenth: enough to go on, and little
    enough for the backlog to shrink.
    """
    if rate_bps is None:
        return None
    room = rate_bps * rpo_s
    if exposed <= room / 2:
        return None
    return rate_bps * max(0.1, 2 * (1 - exposed / room))


def checkpoint_due(*, segments: int, soft_limit: int, page_bytes: int, stored_bytes: int) -> bool:
    """Whether to write the changed pages of the map and a new root.

    ``segments`` and ``stored_bytes`` count what was committed since the last root, ``page_bytes`` what would be
    written. A checkpoint should stay below 2 % of what it follows; but no restore should have to read more than
    four times ``soft_limit`` indexes.
    """
    if segments < soft_limit:
        return False
    return page_bytes * 50 <= stored_bytes or segments >= 4 * soft_limit
