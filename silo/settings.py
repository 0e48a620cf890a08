"""Numbers with units, validated where they enter.

People write ``8G``, ``500ms`` or ``100Mbit``; the library works in bytes, seconds and bytes per second. The
parsers here are the only place that converts, and their errors say what would have been right. Settings are
frozen values; the objects that use them (stores, devices, clocks) are passed separately.
"""

from __future__ import annotations

import re

from silo.errors import InvalidRequestError

__all__ = [
    "format_duration",
    "format_size",
    "parse_duration",
    "parse_rate",
    "parse_size",
]

_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z/]*)\s*", re.ASCII)

_SIZE = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_DURATION_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_RATE_BIT = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def _split(text: str, what: str, example: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise InvalidRequestError(f"{text!r} is not a {what}", hint=f"write something like {example}")
    return float(match[1]), match[2].lower()


def parse_size(text: str | int) -> int:
    """Bytes from ``4096``, ``64K``, ``8G``, ``1.5TiB``. Units are powers of 1024, ``B`` and ``iB`` are optional."""
    if isinstance(text, int):
        return text
    number, unit = _split(text, "size", "64K, 512M or 8GiB")
    factor = _SIZE.get(unit.removesuffix("ib") if len(unit) > 1 else unit)
    if factor is None:
        factor = _SIZE.get(unit.removesuffix("b"))
    if factor is None:
        raise InvalidRequestError(f"{text!r} has an unknown unit", hint="sizes end in K, M, G, T or P")
    return round(number * factor)


def parse_duration(text: str | float) -> float:
    """Seconds from ``5s``, ``500ms``, ``2m``, ``1h``, or a bare number of seconds."""
    if not isinstance(text, str):
        return float(text)
    number, unit = _split(text, "duration", "500ms, 5s or 2m")
    if (factor := _DURATION_S.get(unit or "s")) is None:
        raise InvalidRequestError(f"{text!r} has an unknown unit", hint="durations end in ms, s, m, h or d")
    return number * factor


def parse_rate(text: str | float) -> float:
    """Bytes per second from ``100Mbit``, ``1Gbit``, ``20M/s`` or a bare number of bytes per second."""
    if not isinstance(text, str):
        return float(text)
    number, unit = _split(text, "rate", "100Mbit, 1Gbit or 20M/s")
    if (bits := _RATE_BIT.get(unit.removesuffix("/s").removesuffix("ps"))) is not None:
        return number * bits / 8
    return float(parse_size(f"{number}{unit.removesuffix('/s')}"))


def format_size(count: float) -> str:
    """``1536`` as ``1.5 KiB``: at most three digits before the unit and one behind the point."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"


def format_duration(seconds: float) -> str:
    """``0.0123`` as ``12.3 ms``, ``75`` as ``1 min 15 s``."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
