"""What a process that is killed in the middle of a call could leave in memory that outlives it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

Trace = Callable[[FrameType, str, Any], Any]


def moments(buffer: bytearray, call: Callable[[], object]) -> list[bytes]:
    """The contents of ``buffer`` before every line of Python that ``call`` runs, and in the end."""
    seen: list[bytes] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Trace:
        seen.append(bytes(buffer))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return [*seen, bytes(buffer)]
