"""What a month costs at the present rate: counted requests and stored bytes, times a table of prices. Pure.

The defaults of the table are assumptions: list prices of S3 Standard in us-east-1 as they have stood for years, in US
dollars, with reads from the same region, which cost no transfer. Other stores, regions and contracts differ; whoever
wants to know gives a table of their own.
"""

from __future__ import annotations

import attrs
import msgspec

from silo.errors import InvalidRequestError

__all__ = ["MonthlyCost", "PriceTable", "Usage", "monthly_cost"]

MONTH_S = 30 * 24 * 3600.0
GB = 1000**3


class PriceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prices in one currency."""

    currency: str = "USD"
    storage_gb_month: float = 0.023
    """For each 10^9 bytes that are stored for a month."""
    put_1000: float = 0.005
    """For a thousand PUT and LIST requests."""
    get_1000: float = 0.0004
    """For a thousand GET and HEAD requests."""
    out_gb: float = 0.0
    """For each 10^9 bytes that are read."""


@attrs.frozen(kw_only=True)
class Usage:
    """What was counted during ``elapsed_s``, and what is stored now."""

    elapsed_s: float
    puts: float = 0
    """PUT and LIST requests."""
    gets: float = 0
    out_bytes: float = 0
    stored_bytes: int = 0


@attrs.frozen(kw_only=True)
class MonthlyCost:
    """What 30 days of the same cost."""

    currency: str
    puts: float
    """Requests."""
    gets: float
    put_cost: float
    get_cost: float
    out_cost: float
    storage_cost: float
    stored_bytes: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.put_cost + self.get_cost + self.out_cost + self.storage_cost


def monthly_cost(usage: Usage, prices: PriceTable) -> MonthlyCost:
    """Stretch what was counted to a month. `InvalidRequestError` when nothing was counted for any time."""
    if usage.elapsed_s <= 0:
        raise InvalidRequestError("nothing was counted yet", hint="ask again after a while")
    months = usage.elapsed_s / MONTH_S
    puts, gets, out_bytes = usage.puts / months, usage.gets / months, usage.out_bytes / months
    return MonthlyCost(
        currency=prices.currency,
        puts=puts,
        gets=gets,
        put_cost=puts / 1000 * prices.put_1000,
        get_cost=gets / 1000 * prices.get_1000,
        out_cost=out_bytes / GB * prices.out_gb,
        storage_cost=usage.stored_bytes / GB * prices.storage_gb_month,
        stored_bytes=usage.stored_bytes,
    )
