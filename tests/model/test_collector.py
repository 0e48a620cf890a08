"""Safety rule 17, walked through: every interleaving of committer, collectors, pinners and a claimant."""

from __future__ import annotations

import attrs
import pytest

from silo.errors import InvariantError
from tests.model.collector_world import Scenario, World, broken, steps


def walk(scenario: Scenario, *, limit: int = 100_000) -> tuple[int, int, str]:
    """Worlds seen, how many steps deleted something, and the first thing that was wrong."""
    seen = {World()}
    todo = [World()]
    deletions = 0
    while todo:
        world = todo.pop()
        if wrong := broken(world):
            return len(seen), deletions, wrong
        try:
            following = list(steps(world, scenario))
        except InvariantError as error:
            return len(seen), deletions, error.message
        for after in following:
            deletions += len(after.objects) < len(world.objects)
            if after not in seen:
                seen.add(after)
                todo.append(after)
        assert len(seen) < limit, "the world has grown: make it smaller"
    return len(seen), deletions, ""


SCENARIOS = {
    "two passes": Scenario(passes=2),
    "a record on the authority of another": Scenario(second=True),
    "a claimant": Scenario(claimant=True),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_that_is_needed_is_ever_deleted(name: str) -> None:
    """Whoever is stopped, slow or fenced, at whatever step."""
    worlds, deletions, wrong = walk(SCENARIOS[name])
    assert wrong == ""
    assert worlds > 1000
    assert deletions > 100


@pytest.mark.parametrize(
    ("flaw", "scenario"),
    [
        ("no floor", Scenario()),
        ("lists too early", Scenario()),
        ("does not look again", Scenario()),
        ("trusts the other record", Scenario(second=True)),
        ("forgets what is under way", Scenario()),
        ("judges what is not committed", Scenario()),
    ],
)
def test_the_walk_would_notice(flaw: str, scenario: Scenario) -> None:
    """Each part of the rule is needed: without it something is lost."""
    _, _, wrong = walk(attrs.evolve(scenario, flaw=flaw))
    assert wrong
