"""Which seeds a simulation runs over: few by default, many on request, one to reproduce a failure."""

from __future__ import annotations

import os
from collections.abc import Sequence


def seeds(count: int) -> Sequence[int]:
    """``count`` seeds; ``SILO_SIM_SEEDS=1000`` makes it more, and ``SILO_SIM_SEED=17`` makes it that one."""
    if one := os.environ.get("SILO_SIM_SEED"):
        return [int(one)]
    return range(max(count, int(os.environ.get("SILO_SIM_SEEDS") or 0)))
