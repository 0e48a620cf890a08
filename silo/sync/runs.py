"""Which stored payloads to fetch with one request. Pure.

Neighbours in a segment are fetched together, because a request costs as much as some hundred KiB of transfer. Payloads
lie back to back, so the chunks of a segment that are all wanted make one run; a gap is bridged when fetching it
costs less than another request.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

__all__ = ["Run", "plan_runs"]


@attrs.frozen
class Run:
    """The bytes ``[start, end)`` of a segment, and which of the given spans lie in them."""

    start: int
    end: int
    members: tuple[int, ...]
    """Positions in the list that was planned, in the order of their offsets."""

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return self.end - self.start


def plan_runs(spans: Iterable[tuple[int, int]], *, gap: int, size: int) -> list[Run]:
    """Runs over all ``(offset, length)`` spans of one segment.

    A run bridges at most ``gap`` bytes at a time and is no longer than ``size``, unless it is a single span.
    """
    ordered = sorted((offset, length, member) for member, (offset, length) in enumerate(spans))
    runs: list[Run] = []
    start = end = 0
    members: list[int] = []
    for offset, length, member in ordered:
        grown = max(end, offset + length)
        if members and (offset - end > gap or grown - start > size):
            runs.append(Run(start, end, tuple(members)))
            members = []
        if not members:
            start, grown = offset, offset + length
        end = grown
        members.append(member)
    if members:
        runs.append(Run(start, end, tuple(members)))
    return runs
