"""The chunks of a volume as a picture: brightness is heat, colour is where the content is.

Every cell stands for a run of chunks, row by row from the start of the disk. Reads shine green, writes red, and a
cell that has seen neither shows only its residency: dark blue in the store, violet at the peer, grey present,
black zero.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import attrs
from rich.text import Text

__all__ = ["Cell", "draw", "write_png"]

_BASE = {
    "ABSENT_STORE": (20, 30, 90),
    "ABSENT_PEER": (80, 20, 90),
    "ZERO": (0, 0, 0),
    "ZERO_UNPUNCHED": (0, 0, 0),
    "PRESENT": (55, 55, 55),
}


@attrs.frozen
class Cell:
    """A run of chunks: heat relative to the hottest cell, from 0 to 1, and the commonest residency."""

    reads: float
    writes: float
    residency: str

    @property
    def colour(self) -> tuple[int, int, int]:
        """Red, green and blue from 0 to 255."""
        red, green, blue = _BASE.get(self.residency, (55, 55, 55))
        # The root lets a cell with a hundredth of the heat still be seen.
        return (
            min(255, int(red + (255 - red) * self.writes**0.5)),
            min(255, int(green + (255 - green) * self.reads**0.5)),
            blue,
        )


def draw(cells: Sequence[Cell], width: int) -> Text:
    """Two rows of cells per line of the terminal, with the upper half block."""
    picture = Text()
    rows = [cells[start : start + width] for start in range(0, len(cells), width)]
    for upper, lower in zip(rows[::2], [*rows[1::2], []], strict=False):
        for column, cell in enumerate(upper):
            style = "#{:02x}{:02x}{:02x}".format(*cell.colour)
            if column < len(lower):
                style += " on #{:02x}{:02x}{:02x}".format(*lower[column].colour)
            picture.append("▀", style)
        picture.append("\n")
    return picture


def write_png(cells: Sequence[Cell], width: int, scale: int = 8) -> bytes:
    """The same picture as a PNG file, ``scale`` pixels per cell."""
    rows = []
    for start in range(0, len(cells), width):
        line = b"".join(bytes(cell.colour) * scale for cell in cells[start : start + width])
        rows.extend([b"\0" + line.ljust(3 * width * scale, b"\0")] * scale)
    header = struct.pack(">IIBBBBB", width * scale, len(rows), 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _png_part(b"IHDR", header)
        + _png_part(b"IDAT", zlib.compress(b"".join(rows)))
        + _png_part(b"IEND", b"")
    )


def _png_part(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
