"""The picture of a volume's chunks."""

from __future__ import annotations

import struct
import zlib

from silo.cli.picture import Cell, draw, write_png


def pixels(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and raw rows of a PNG as `write_png` makes them."""
    width, height = struct.unpack(">II", png[16:24])
    length = struct.unpack(">I", png[33:37])[0]
    return width, height, zlib.decompress(png[41 : 41 + length])


def test_heat_and_residency_can_be_told_apart() -> None:
    """Reads are green, writes red, and places have colours of their own."""
    hot_read, hot_write = Cell(1, 0, "PRESENT"), Cell(0, 1, "PRESENT")
    assert 255 == hot_read.colour[1] > hot_read.colour[0]
    assert 255 == hot_write.colour[0] > hot_write.colour[1]
    assert len({Cell(0, 0, name).colour for name in ("PRESENT", "ZERO", "ABSENT_STORE")}) == 3


def test_a_png_has_one_square_per_cell() -> None:
    """Also in a last row that is not full."""
    cells = [Cell(0, 0, "PRESENT"), Cell(1, 0, "PRESENT"), Cell(0, 1, "ZERO")]
    width, height, raw = pixels(write_png(cells, 2, scale=2))
    assert (width, height) == (4, 4)
    rows = [raw[start + 1 : start + 13] for start in range(0, len(raw), 13)]
    assert bytes(cells[0].colour) * 2 + bytes(cells[1].colour) * 2 == rows[0] == rows[1]
    assert bytes(cells[2].colour) * 2 + bytes(6) == rows[2]


def test_a_terminal_line_holds_two_rows() -> None:
    """An odd last row stands alone."""
    text = draw([Cell(0, 0, "PRESENT")] * 5, 2)
    assert text.plain.split() == ["▀▀", "▀"]
