"""Safety rules broken on purpose, one at a time: the simulation of whole hosts must notice each.

A mutation makes one place of Silo forget its rule. Then the stories of `tests.sim.test_hosts_sim` are played, seed
after seed, until one of them comes to a bad end: a wrong read, two guests, a generation that never was, a group that
never arrives. Those of the handover's tables have mutations of their own (`tests/model/test_handover.py`), and so has
power loss (`tests/crash/test_power_loss.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from silo.chunkmap import FROZEN
from silo.frozen import VolumeCut
from silo.localchunks import LocalChunks
from silo.p2p.installer import Installer
from silo.p2p.records import VolumeSets
from silo.p2p.rounds import Rounds
from silo.p2p.target_effects import TargetEffects
from silo.storelink import StoreLink
from silo.testing.loop import SimulatedClock, SimulationError, run_simulated
from tests.sim import test_hosts_sim
from tests.sim.test_hosts_sim import Story
from tests.support.logs import ExpectedLogs

pytestmark = [pytest.mark.sim, pytest.mark.slow]

SEEDS = 40
PATIENCE_S = 150.0
"""Of virtual time: what has not arrived by then never does."""


async def _nothing(*_: object, **__: object) -> None:
    """Where something should have been done."""


def _commits_are_never_held(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StoreLink, "hold_commits", _nothing)


def _the_handover_is_not_written_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TargetEffects, "write_handover", _nothing)


def _nothing_counts_as_unsynced(patch: pytest.MonkeyPatch) -> None:
    end = Rounds.end

    def forgetful(self: Rounds, *arguments: object) -> tuple[VolumeSets, ...]:
        return tuple(msgspec.structs.replace(sets, unsynced=(), missing=()) for sets in end(self, *arguments))

    patch.setattr(Rounds, "end", forgetful)


def _writes_leave_no_mark(patch: pytest.MonkeyPatch) -> None:
    begin = LocalChunks.__init__

    def forgetful(self: LocalChunks, *arguments: object, **options: object) -> None:
        begin(self, *arguments, **options)
        self._marks = 0

    patch.setattr(LocalChunks, "__init__", forgetful)


def _frozen_chunks_are_overwritten(patch: pytest.MonkeyPatch) -> None:
    begin = LocalChunks.begin_cut

    def forgetful(self: LocalChunks, cut: VolumeCut) -> None:
        begin(self, cut)
        states = self.chunks.view
        states &= np.uint8(0xFF & ~FROZEN)

    patch.setattr(LocalChunks, "begin_cut", forgetful)


def _what_changed_after_it_was_sent_is_not_said(patch: pytest.MonkeyPatch) -> None:
    async def forgetful(self: Installer, message: object) -> None:
        self._round = message.round

    patch.setattr(Installer, "invalidate", forgetful)
    patch.setattr(Installer, "_is_current", lambda *_: True)
    patch.setattr(Installer, "apply", _nothing)


def _zeroing_is_not_stored(patch: pytest.MonkeyPatch) -> None:
    begin = VolumeCut.__init__

    def forgetful(self: VolumeCut, *arguments: object, **options: object) -> None:
        begin(self, *arguments, **options)
        self.zeros = []

    patch.setattr(VolumeCut, "__init__", forgetful)


def _what_the_peer_has_newer_is_read_from_the_store(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Installer, "settle", lambda self, body: setattr(self, "is_final", True))


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "1: commits are never held": _commits_are_never_held,
    "2: the handover is not written down": _the_handover_is_not_written_down,
    "3: nothing counts as unsynced": _nothing_counts_as_unsynced,
    "8: writes leave no mark": _writes_leave_no_mark,
    "10: frozen chunks are overwritten": _frozen_chunks_are_overwritten,
    "12: what changed after it was sent is not said": _what_changed_after_it_was_sent_is_not_said,
    "15: zeroing is not stored": _zeroing_is_not_stored,
    "what the handover says of the maps is not applied": _what_the_peer_has_newer_is_read_from_the_store,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rule_is_noticed(
    mutation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expect_log: ExpectedLogs
) -> None:
    """The name begins with the number of the rule."""
    monkeypatch.setattr(test_hosts_sim, "MOVE_S", PATIENCE_S)
    MUTATIONS[mutation](monkeypatch)
    noticed: BaseException | None = None
    for seed in range(SEEDS):

        async def scenario(clock: SimulatedClock, seed: int = seed) -> None:
            await Story(clock, tmp_path / str(seed)).play()

        try:
            with contextlib.suppress(SimulationError):  # a story that broke off may leave its tasks behind
                run_simulated(scenario, seed=seed, rounds_max=3_000_000)
        except Exception as error:
            noticed = error
            break
    expect_log.seen.clear()
    assert noticed is not None, f"{SEEDS} stories went well although {mutation}"
