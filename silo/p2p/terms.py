"""What the two hosts and the register compare when a group changes hands. Values only."""

from __future__ import annotations

import enum
from typing import Annotated

import attrs
import msgspec
from msgspec import Meta

__all__ = ["Standing", "Terms", "Verdict"]


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a claim for a handover compares (safety rule 3); on disk on both sides, and part of the handover."""

    epoch: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    incarnation: Annotated[str, Meta(max_length=64)]
    """The source, as the register names it. Empty without a store."""
    generations: Annotated[tuple[int, ...], Meta(max_length=2)]
    """The committed generation, and the one whose commit was outstanding, if there was one."""
    nonce: Annotated[str, Meta(min_length=1, max_length=64)]
    """Names the target's claim. Drawn by the source, which recognises it after a restart."""


@attrs.frozen
class Standing:
    """How the group stands with the register, in one step with the chunk maps."""

    epoch: int
    incarnation: str
    generations: tuple[int, ...]
    """As in `Terms`; the first one is committed."""


class Verdict(enum.Enum):
    """What the register says to a source that wants its group back."""

    WON = "won"
    LOST = "lost"
    """The target has claimed, under the nonce of the terms."""
    FENCED = "fenced"
    """Somebody else has."""
