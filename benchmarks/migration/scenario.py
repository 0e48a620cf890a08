"""What is migrated, as both processes and the report know it. Values and the content of disks only.

The content is a function of the seed, so the target can verify every byte without having seen the source. Used
blocks are spread evenly over the disk, each 1 MiB long and incompressible.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Self

import attrs
import numpy as np

__all__ = ["BLOCK", "CHUNK", "Scenario", "block_content", "chunk_content", "chunks_of_blocks", "used_blocks"]

MIB = 1 << 20
BLOCK = MIB
"""The unit in which disks are filled."""
CHUNK = 64 << 10
"""Silo's chunk, at its default size."""


@attrs.frozen(kw_only=True)
class Scenario:
    """One migration. Sizes in bytes; ``synced`` and ``unsynced`` are whole blocks."""

    name: str
    size: int
    synced: int = 0
    """Written, and stored before the migration begins; needs ``store``."""
    unsynced: int = 0
    """Written after that, so that only the source has it."""
    medium: str = "memory"
    """``memory`` or ``file``: where both hosts keep the disk."""
    store: bool = False
    """Whether both hosts have a store (and with it a register), in a directory."""
    dirty_chunks: int = 0
    """Chunks of what is synced that are written once more before the migration begins."""
    rewrites_per_s: int = 0
    """Chunks that a guest at the source writes again while the migration runs."""
    tls: bool = False
    """Whether the hosts talk over mutual TLS."""
    seed: int = 1

    @property
    def used(self) -> int:
        """Bytes of the disk that hold data."""
        return self.synced + self.unsynced

    def to_json(self) -> str:
        """For the command line of a child."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` gave."""
        return cls(**json.loads(text))


def used_blocks(scenario: Scenario) -> list[int]:
    """The offsets of the used blocks, ascending, evenly spread."""
    count, room = scenario.used // BLOCK, scenario.size // BLOCK
    return [index * room // count * BLOCK for index in range(count)] if count else []


def block_content(scenario: Scenario, offset: int) -> bytes:
    """The incompressible content of a used block."""
    return np.random.default_rng((scenario.seed, offset)).bytes(BLOCK)


def chunk_content(scenario: Scenario, chunk: int, version: int) -> bytes:
    """The content of a chunk after it was written again; no two versions share it."""
    return np.random.default_rng((scenario.seed, chunk, version)).bytes(CHUNK)


def chunks_of_blocks(blocks: list[int]) -> Iterator[int]:
    """The chunks of these blocks, ascending."""
    for offset in blocks:
        yield from range(offset // CHUNK, (offset + BLOCK) // CHUNK)
