"""From samples to tables. Nothing here measures anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from benchmarks.common.table import Table
from benchmarks.common.turns import Sample, Summary, ratio, summarise
from benchmarks.migration.scenario import Scenario

__all__ = ["Measured", "moved_ratio", "tables"]


COMPARED = (("silo", "nbdcopy"), ("silo, TLS", "silo"), ("silo, TLS", "nbdcopy"))


@attrs.frozen
class Measured:
    """The samples of every part that was measured, by contender and round. A part that was left out is empty."""

    bulk: Mapping[str, Sequence[Sample]] = attrs.field(factory=dict)
    """``silo``, ``silo, TLS`` and ``nbdcopy``."""
    downtime: Sequence[Sample] = ()
    moved: Sequence[Sample] = ()
    moved_scenario: Scenario | None = None
    evacuation: Mapping[str, Sequence[Sample]] = attrs.field(factory=dict)
    """``small`` and ``large``."""
    circumstances: Mapping[str, str] = attrs.field(factory=dict)
    """By part: when and how it was measured, for people."""

    def joined(self, other: Measured) -> Measured:
        """This, with the parts that the other one has."""
        there = {name: value for name, value in attrs.asdict(other, recurse=False).items() if value}
        return attrs.evolve(self, **{**there, "circumstances": {**self.circumstances, **other.circumstances}})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measured:
        """What ``attrs.asdict`` made, perhaps among other things, after a journey through JSON."""
        known = {field.name: values[field.name] for field in attrs.fields(cls) if values.get(field.name)}
        if (scenario := known.get("moved_scenario")) is not None:
            known["moved_scenario"] = Scenario(**scenario)
        return cls(**known)


def tables(measured: Measured) -> list[Table]:
    """One table per part."""
    found = []
    if measured.bulk:
        found.append(_bulk_table(measured.bulk))
    if measured.downtime:
        found.append(_downtime_table(measured.downtime))
    if measured.moved and measured.moved_scenario is not None:
        found.append(_moved_table(measured.moved, measured.moved_scenario))
    if measured.evacuation:
        found.append(_evacuation_table(measured.evacuation))
    return found


def moved_ratio(sample: Sample, scenario: Scenario) -> float:
    """Content moved by peer and store ÷ (used chunks + chunks written again while it moved)."""
    return (sample["bytes_peer"] + sample["bytes_store"]) / (scenario.used + sample["rewritten_bytes"])


def _bulk_table(samples: Mapping[str, Sequence[Sample]]) -> Table:
    rows = [
        (name, _spread(_of(taken, "mb_s"), 0), _spread(_of(taken, "cpu_s_per_gib"), 2))
        for name, taken in samples.items()
    ]
    for ours, theirs in COMPARED:
        if ours in samples and theirs in samples:
            rate, cpu = (ratio(samples[ours], samples[theirs], what) for what in ("mb_s", "cpu_s_per_gib"))
            rows.append((f"{ours} ÷ {theirs}", _spread(rate, 2), _spread(cpu, 2)))
    return Table("Full migration over loopback", ("", "MB/s", "CPU s/GiB, all processes"), rows)


def _downtime_table(samples: Sequence[Sample]) -> Table:
    rows = [
        ("downtime, ms", _spread(_of(samples, "downtime_ms"), 1), str(len(samples))),
        ("CPU of both hosts, s per migration", _spread(summarise(_cpu_s(samples)), 2), str(len(samples))),
    ]
    return Table("Downtime", ("", "median [range]", "runs"), rows)


def _moved_table(samples: Sequence[Sample], scenario: Scenario) -> Table:
    mib = 1 / (1 << 20)
    moved = summarise([moved_ratio(sample, scenario) for sample in samples])
    rows = [
        ("used, MiB", f"{scenario.used * mib:.1f}"),
        ("written again meanwhile, MiB", _spread(_of(samples, "rewritten_bytes").scaled(mib), 1)),
        ("from the peer, MiB", _spread(_of(samples, "bytes_peer").scaled(mib), 1)),
        ("from the store, MiB", _spread(_of(samples, "bytes_store").scaled(mib), 1)),
        ("moved ÷ (used + written again)", _spread(moved, 3)),
    ]
    return Table("Bytes moved", ("", "median [range]"), rows)


def _evacuation_table(samples: Mapping[str, Sequence[Sample]]) -> Table:
    rows = [(f"{name} disk, ms", _spread(_of(taken, "evacuated_ms"), 0)) for name, taken in samples.items()]
    rows += [
        (f"{name} disk, CPU of both hosts, s", _spread(summarise(_cpu_s(taken)), 2))
        for name, taken in samples.items()
    ]
    rows.append(("large ÷ small", _spread(ratio(samples["large"], samples["small"], "evacuated_ms"), 2)))
    return Table("Evacuation of the same unsynced bytes", ("", "median [range]"), rows)


def _cpu_s(samples: Sequence[Sample]) -> list[float]:
    return [sample.get("source_cpu_s", 0.0) + sample.get("target_cpu_s", 0.0) for sample in samples]


def _of(samples: Sequence[Sample], quantity: str) -> Summary:
    return summarise([sample[quantity] for sample in samples])


def _spread(summary: Summary, digits: int) -> str:
    return f"{summary.median:.{digits}f} [{summary.low:.{digits}f}-{summary.high:.{digits}f}]"
