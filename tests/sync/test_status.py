"""Which alarms there are, and when."""

from __future__ import annotations

import attrs
import pytest

from silo.sync.status import ALARMS, SyncPhase, SyncStatus, alarms_of

WELL = SyncStatus(
    phase=SyncPhase.WAITING, epoch=1, generation=5, cut_time=0.0, rpo_s=4.0, exposed_bytes=4096, target_s=10.0,
    rate_bps=None, backlog_bytes=4096, copied_bytes=0, holds=(), error="", attempts=0, failing_s=0.0, cuts=5,
    abandoned_cuts=0, sent_bytes=0, sent_objects=0, elided_chunks=0, window=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "alarms"),
    [
        ({}, ()),
        ({"rpo_s": 15.0}, ()),
        ({"rpo_s": 15.1}, ("behind",)),
        ({"rpo_s": 1000.0, "exposed_bytes": 0}, ()),
        ({"rpo_s": 1000.0, "generation": 0}, ()),
        ({"error": "access denied", "failing_s": 10.0}, ()),
        ({"error": "access denied", "failing_s": 10.1}, ("failing",)),
        ({"error": "access denied", "failing_s": 100.0, "rpo_s": 100.0}, ("behind", "failing")),
        ({"phase": SyncPhase.FENCED, "rpo_s": 100.0}, ("fenced",)),
    ],
)
def test_alarms(changes: dict[str, object], alarms: tuple[str, ...]) -> None:
    status = attrs.evolve(WELL, **changes)
    assert alarms_of(status) == status.alarms == alarms
    assert set(alarms) <= set(ALARMS)
