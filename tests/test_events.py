"""Events and reports as plain values, for JSON lines."""

from __future__ import annotations

import attrs
import msgspec
import pytest

from silo import events
from silo.events import MigrationEvent, MigrationReport, Outcome, Phase, PhaseEntered, PhaseTiming

KINDS = [
    kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, MigrationEvent)
]
SAMPLES = {
    "str": "text", "float": 1.5, "int": 7, "bool": True, "Phase": Phase.PRE_COPY, "int | None": 5,
    "float | None": None,
}  # fmt: skip


def sample(kind: type[MigrationEvent]) -> MigrationEvent:
    """An event of that kind, with something in every attribute."""
    return kind(**{field.name: SAMPLES[str(field.type)] for field in attrs.fields(kind)})


@pytest.mark.parametrize("kind", KINDS)
def test_every_event_is_a_line_of_json(kind):
    """Its kind, and every attribute under its own name."""
    line = msgspec.json.decode(msgspec.json.encode(sample(kind).as_dict()))
    assert set(line) == {"event", *(field.name for field in attrs.fields(kind))}
    assert line["group"] == "text"


def test_kinds_have_different_names():
    """Whoever reads the lines can tell them apart."""
    names = {sample(kind).as_dict()["event"] for kind in KINDS}
    assert len(names) == len(KINDS)
    assert {"phase-entered", "round-started", "progress", "link-changed"} <= names


def test_enumerations_become_words():
    """As they are written in the documentation."""
    event = PhaseEntered(group="vm1", at=2.0, phase=Phase.IN_DOUBT)
    assert event.as_dict() == {
        "event": "phase-entered", "group": "vm1", "at": 2.0, "phase": "in doubt", "reason": "",
    }  # fmt: skip


def test_a_report_is_plain_to_the_last_phase():
    """So that it is a line of JSON, too."""
    report = MigrationReport(
        group="vm1",
        migration="00ff",
        outcome=Outcome.RELEASED,
        phases=(PhaseTiming(Phase.PRE_COPY, 1.5), PhaseTiming(Phase.SWITCHOVER, 0.25)),
        downtime_ms=3.5,
    )
    plain = msgspec.json.decode(msgspec.json.encode(report.as_dict()))
    assert plain["outcome"] == "released"
    assert plain["downtime_ms"] == 3.5
    assert plain["phases"] == [
        {"phase": "pre-copy", "duration_s": 1.5},
        {"phase": "switchover", "duration_s": 0.25},
    ]


def test_events_cannot_be_changed():
    """Each observer gets the same one."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        sample(PhaseEntered).phase = Phase.ENDED
