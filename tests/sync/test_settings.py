"""Numbers that cannot work are refused where they enter."""

from __future__ import annotations

from typing import Any

import pytest

from silo.errors import InvalidRequestError
from silo.sync.settings import FetchSettings, SyncSettings


def test_defaults_are_sound() -> None:
    assert SyncSettings().window >= SyncSettings().segment_size
    assert FetchSettings().retry.request_timeout_s > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"rpo_s": 0},
        {"drain_timeout_s": -1},
        {"threads": 0},
        {"segment_size": 0},
        {"segment_size": 2 << 30},
        {"batch_size": 0},
        {"checkpoint_segments": 0},
        {"window": 1 << 20},
        {"rate_bps": 0},
    ],
)
def test_impossible_sync_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        SyncSettings(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"demand_lanes": 0},
        {"background_lanes": 0},
        {"threads": 0},
        {"run_size": 0},
        {"run_gap": -1},
        {"patience_s": -1},
    ],
)
def test_impossible_fetch_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        FetchSettings(**wrong)
