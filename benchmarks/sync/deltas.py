"""What sub-chunk deltas would upload: a model, run over the same kinds of writes as the real thing.

A chunk of sixteen 4 KiB blocks is stored whole, its *base*, or as deltas against it: the blocks that changed, and an
entry that names the base and the deltas. ``chain`` bounds how many deltas a chunk may have, and so how many requests a
read of it may need. When there are as many, the next upload takes the place of all of them: it holds every block that
differs from the base, or is a new base when those are too many. With a chain of one each delta holds all that
changed since the base. Whole chunks and chains without bound are the two ends.
"""

from __future__ import annotations

import attrs
import numpy as np

from benchmarks.sync.traces import BLOCK, block_numbers

__all__ = ["Outcome", "run_model"]

BLOCKS_PER_CHUNK = 16
ENTRY = 64
NAMES_ANOTHER = 24
"""Bytes that an entry needs to name one more object."""


@attrs.frozen
class Outcome:
    """What came of a model run."""

    upload_ratio: float
    """Bytes uploaded ÷ bytes written."""
    gets_per_chunk: float
    """Requests that a read of a chunk needs at the end, over those that were ever written."""
    space_ratio: float
    """Bytes of bases and deltas that are referred to ÷ bytes of those chunks."""


@attrs.define
class _Chunk:
    deltas: list[int] = attrs.field(factory=list)
    """Bits of the blocks in each delta."""


def run_model(kind: str, *, chain: int, writes: int, size: int, cuts: int, seed: int) -> Outcome:
    """Run ``cuts`` cuts of ``writes`` writes each over a disk of ``size`` bytes; the first half only warms up."""
    generator = np.random.default_rng(seed)
    chunks: dict[int, _Chunk] = {}
    uploaded = written = 0
    for number in range(cuts):
        touched: dict[int, int] = {}
        for block in block_numbers(kind, writes, size // BLOCK, generator, number):
            chunk, position = divmod(block, BLOCKS_PER_CHUNK)
            touched[chunk] = touched.get(chunk, 0) | 1 << position
        cost = sum(
            _store(chunks.setdefault(chunk, _Chunk()), changed, chain) for chunk, changed in touched.items()
        )
        if number >= cuts // 2:
            uploaded += cost
            written += writes * BLOCK
    gets = [1 + len(chunk.deltas) for chunk in chunks.values()]
    kept = [BLOCKS_PER_CHUNK + sum(delta.bit_count() for delta in chunk.deltas) for chunk in chunks.values()]
    return Outcome(uploaded / written, sum(gets) / len(gets), sum(kept) / (BLOCKS_PER_CHUNK * len(kept)))


def _store(chunk: _Chunk, changed: int, chain: int) -> int:
    """Bytes that a cut uploads of a chunk."""
    if len(chunk.deltas) >= chain:
        for delta in chunk.deltas:
            changed |= delta
        chunk.deltas.clear()
    if chain == 0 or changed.bit_count() > BLOCKS_PER_CHUNK // 3:
        chunk.deltas.clear()
        return BLOCKS_PER_CHUNK * BLOCK + ENTRY
    chunk.deltas.append(changed)
    return changed.bit_count() * BLOCK + ENTRY + NAMES_ANOTHER * len(chunk.deltas)
