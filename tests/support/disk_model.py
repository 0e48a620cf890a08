"""What a disk may contain after writes of which some were never answered.

Block by block (512 bytes, the unit that no crash tears): the certain content, or a set of possible ones while a
request is unanswered, or its answer leaves the content open (TRIM). Reading a block decides: from then on only what
was read is possible, because a disk that shows new bytes and then old ones again has lost a write.
"""

from __future__ import annotations

BLOCK = 512


class DiskModel:
    """A disk of zeros in the beginning. Offsets and lengths are multiples of `BLOCK`."""

    def __init__(self, size: int) -> None:
        self._certain = bytearray(size)
        self._possible: dict[int, set[bytes]] = {}

    def begin(self, offset: int, data: bytes) -> None:
        """A write (or zeroing) is on its way: from now on each of its blocks may be the old or the new one."""
        for position, content in _blocks(offset, data):
            old = bytes(self._certain[position : position + BLOCK])
            self._possible.setdefault(position, {old}).add(content)

    def acknowledge(self, offset: int, data: bytes) -> None:
        """The write was answered: all of its blocks are the new ones."""
        for position, _ in _blocks(offset, data):
            self._possible.pop(position, None)
        self._certain[offset : offset + len(data)] = data

    def check(self, offset: int, data: bytes) -> None:
        """``data`` was read. AssertionError when it is not possible; else it is certain now."""
        for position, content in _blocks(offset, data):
            possible = self._possible.pop(position, None)
            if possible is None:
                possible = {bytes(self._certain[position : position + BLOCK])}
            if content not in possible:
                shown = " or ".join(sorted(_shown(block) for block in possible))
                raise AssertionError(f"block at {position}: read {_shown(content)}, expected {shown}")
            self._certain[position : position + BLOCK] = content


def _blocks(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    return [(offset + start, bytes(data[start : start + BLOCK])) for start in range(0, len(data), BLOCK)]


def _shown(block: bytes) -> str:
    return "zeros" if not any(block) else f"{block[:8].hex()}…"
