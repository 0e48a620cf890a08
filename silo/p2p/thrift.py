"""Whether it pays to compress what is pushed. Pure.

Compressing costs the source time, and saves some on the link. Both are known from what has just been seen: how fast the
link carries bytes, and how a sample of the chunks at hand has compressed, and in what time. On a fast link, or for
content that does not compress, raw bytes arrive sooner; on a slow one text arrives three times as soon.
"""

from __future__ import annotations

__all__ = ["LEAST_SAVED", "pays"]

LEAST_SAVED = 0.1
"""Less than a tenth is not worth the target's time either."""
MARGIN = 1.5
"""By so much the link must gain more than the compressor takes: rates are guesses."""


def pays(size: int, packed: int, took_s: float, rate_bps: float) -> bool:
    """A sample of ``size`` bytes became ``packed`` bytes in so many seconds; the link carries so many bytes per second.

    Of a link that has not carried anything yet nothing is known: no.
    """
    saved = size - packed
    if saved < LEAST_SAVED * size or rate_bps <= 0:
        return False
    return saved / rate_bps > MARGIN * took_s
