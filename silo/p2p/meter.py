"""How fast bytes have gone lately, and how long to wait so that they go no faster. Pure."""

from __future__ import annotations

from collections import deque

__all__ = ["Meter", "Pacer"]

SPAN_S = 3.0
"""What *lately* means."""
GRAIN_S = 0.05


class Meter:
    """Counts, and forgets what is older than three seconds when it is asked for the rate."""

    def __init__(self) -> None:
        self.total = 0
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, count: int, now: float) -> None:
        """So many more bytes, at this time."""
        if not self._samples or now - self._samples[-1][0] >= GRAIN_S:
            self._samples.append((now, self.total))
        self.total += count
        while now - self._samples[0][0] > SPAN_S and len(self._samples) > 1:
            self._samples.popleft()

    def rate_bps(self, now: float) -> float:
        """Bytes per second over the last three seconds, or since the first byte; 0 when there was none."""
        while len(self._samples) > 1 and now - self._samples[0][0] > SPAN_S:
            self._samples.popleft()
        if not self._samples:
            return 0.0
        since, before = self._samples[0]
        return (self.total - before) / max(now - since, GRAIN_S)


class Pacer:
    """Spreads bytes so that they keep to a rate; ``None`` is no limit."""

    def __init__(self, rate_bps: float | None) -> None:
        self._rate_bps = rate_bps
        self._free_at = 0.0

    def delay_s(self, count: int, now: float) -> float:
        """So many bytes have been sent: how long to wait before the next ones."""
        if self._rate_bps is None:
            return 0.0
        self._free_at = max(self._free_at, now) + count / self._rate_bps
        return self._free_at - now
