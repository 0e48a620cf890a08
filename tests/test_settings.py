"""Sizes, durations and rates as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import InvalidRequestError
from silo.settings import format_duration, format_size, parse_duration, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("64KB", 65536),
        ("1.5G", 3 << 29),
        (" 8 GiB ", 8 << 30),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("7B", 7),
    ],
)
def test_sizes_are_powers_of_1024(text: str | int, expected: int) -> None:
    """Every way of writing a unit means the same."""
    assert expected == parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5s", 5), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("3", 3), (2.5, 2.5), ("1d", 86400)],
)
def test_durations_are_seconds(text: str | float, expected: float) -> None:
    """Every unit ends in seconds, and no unit means seconds."""
    assert expected == pytest.approx(parse_duration(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8bit", 1),
        ("100Mbit", 12.5e6),
        ("1Gbit/s", 125e6),
        ("1Gbps", None),
        ("20M/s", 20 << 20),
        ("20M", 20 << 20),
        (7, 7),
    ],
)
def test_rates_are_bytes_per_second(text: str | float, expected: float | None) -> None:
    """Bits are decimal, bytes are binary, and what is neither is refused."""
    if expected is None:
        with pytest.raises(InvalidRequestError):
            parse_rate(text)
    else:
        assert expected == pytest.approx(parse_rate(text))


@pytest.mark.parametrize("text", ["", "G", "8X", "-1", "1e9", "8 G B", "0x10", "٣"])
def test_nonsense_is_refused_with_a_hint(text: str) -> None:
    """The error shows the text and says what would have been right."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert caught.value.hint


@given(st.text(max_size=12))
def test_no_text_raises_anything_else(text: str) -> None:
    """Any text parses or is an `InvalidRequestError`."""
    for parse in (parse_size, parse_duration, parse_rate):
        with contextlib.suppress(InvalidRequestError):
            assert parse(text) >= 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (300 << 20, "300 MiB"),
        (5 << 50, "5.0 PiB"),
    ],
)
def test_sizes_are_shown_with_few_digits(value: int, expected: str) -> None:
    """What people read has at most three digits before the unit."""
    assert expected == format_size(value)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0123, "12.3 ms"), (5, "5.0 s"), (75, "1 min 15 s"), (3720, "1 h 2 min")]
)
def test_durations_are_shown_in_a_fitting_unit(value: float, expected: str) -> None:
    """Milliseconds below a second, minutes above one."""
    assert expected == format_duration(value)
