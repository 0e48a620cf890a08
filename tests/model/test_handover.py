"""Every world that the handover tables allow, looked at; and each rule broken once, to see that it is noticed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import attrs
import pytest

from silo.p2p.handover import SOURCE, TARGET, Effect, Event, Mark, SourceState, Table, TargetState
from tests.model.handover_world import (
    KILLED,
    POWER_LOST,
    Map,
    Owner,
    Rules,
    U,
    World,
    following,
    start,
    unruled,
)

S, T, V, F = SourceState, TargetState, Event, Effect


class Broken(AssertionError):
    """A world that must not be, with the story of how it came about."""


def check(world: World, rules: Rules) -> str | None:
    """The first promise that a world breaks."""
    source, target = world.source, world.target
    sent = V.HANDOVER in world.sent
    promises = {
        "two guests run": not (source.guest and target.guest),
        "two gates are open": not (source.gate and target.gate),
        "the source runs after it gave the group away": not (
            sent and (source.guest or source.gate) and not world.source_won
        ),
        "the source commits after it gave the group away": not sent
        or source.held
        or world.source_won
        or source.state not in (S.OFFERED, S.RECLAIMING)
        or source.step == 0,  # a restarted process commits nothing before its first duty
        "the handover was sent before the source could prove it": not sent
        or world.source_won
        or source.mark is not None
        or source.state is S.FENCED,
        "the handover was sent before the disk was safe": not sent or world.source_flushed,
        "the target serves without a record": not target.gate or target.mark is not None or _has_ended(world),
        "the target serves content that was superseded": not target.gate
        or world.target_map is Map.TRUE
        or _has_ended(world),
        "the target serves without a claim": not (target.gate and world.owner is Owner.SOURCE),
        "the target commits before evacuation": not target.gate or target.held or world.u is U.DURABLE,
        "the source is released too early": source.state is not S.RELEASED or world.u is U.DURABLE,
        "the source forgets what it may still have to serve": source.mark is not Mark.RELEASED
        or world.u is U.DURABLE,
        "the target forgets what its guest may have written": not (
            rules.register and world.target_won and target.state in (T.DISCARDING, T.DISCARDED)
        ),
        "the target serves what was taken away": not (
            target.state is T.FENCED and target.step and target.gate
        ),
        "the target claims after it declined": not (
            world.target_withdrew and world.owner is Owner.TARGET and not _has_ended(world)
        ),
    }
    return next((promise for promise, kept in promises.items() if not kept), None)


def _has_ended(world: World) -> bool:
    return world.source.mark is Mark.RELEASED


def explore(rules: Rules) -> dict[World, list[tuple[str, World]]]:
    """Walk everything. Raises `Broken` with the shortest story when a promise is not kept."""
    first = start()
    came_from: dict[World, tuple[World, str] | None] = {first: None}
    graph: dict[World, list[tuple[str, World]]] = {}
    queue = deque([first])
    while queue:
        world = queue.popleft()
        broken = check(world, rules)
        if broken is not None:
            raise Broken(f"{broken}:\n{_story(world, came_from)}")
        graph[world] = list(following(world, rules))
        for what, after in graph[world]:
            if after not in came_from:
                came_from[after] = (world, what)
                queue.append(after)
    return graph


def _story(world: World, came_from: dict[World, tuple[World, str] | None]) -> str:
    steps: list[str] = []
    at: World = world
    while (before := came_from[at]) is not None:
        at, what = before
        steps.append(what)
    return "\n".join([*reversed(steps), str(world)])


@pytest.mark.parametrize("register", [True, False])
def test_no_world_breaks_a_promise(register):
    """With and without a register, no order of events ends in two guests, a lost chunk or a forked history."""
    worlds = explore(Rules(register=register))
    assert len(worlds) > 1000
    assert {hole for world in worlds for hole in unruled(world, Rules(register=register))} == set()
    reached = {world.source.state for world in worlds} | {world.target.state for world in worlds}
    unreachable = {*S, *T} - reached
    assert unreachable == (set() if register else {S.FENCED, T.FENCED}), (
        "a state that nothing leads to is dead code"
    )


@pytest.mark.parametrize("register", [True, False])
def test_no_world_is_a_dead_end(register):
    """From everywhere, a good end can still be reached without another crash."""
    assert dead_end(Rules(register=register, third_party=False)) is None


def dead_end(rules: Rules) -> World | None:
    """A world from which no good end can be reached, unless something dies (or the group is taken by force)."""
    worlds = explore(rules)
    moved = [world for world in worlds if _has_moved(world)]
    if not moved:
        return start()
    leads_to: dict[World, list[World]] = {}
    for world, afters in worlds.items():
        for what, after in afters:
            if not what.startswith((KILLED, POWER_LOST)):
                leads_to.setdefault(after, []).append(world)
    queue = deque([*moved, *(world for world in worlds if _has_stayed(world))])
    seen = set(queue)
    while queue:
        for before in leads_to.get(queue.popleft(), ()):
            if before not in seen:
                seen.add(before)
                queue.append(before)
    return next((world for world in worlds if world not in seen), None)


def _has_stayed(world: World) -> bool:
    source, target = world.source, world.target
    runs = source.state is S.ABORTED and source.guest and source.gate and not (source.held or source.mark)
    return runs and target.up and target.state in (T.DISCARDED, T.FENCED, None) and not target.guest


def _has_moved(world: World) -> bool:
    source, target = world.source, world.target
    runs = target.state is T.FINISHED and target.guest and target.gate and not (target.held or target.mark)
    return runs and source.state is S.RELEASED


# ------------------------------------------------------------------------------------------ broken on purpose


def with_step(table: Table, state: S | T, event: V, following: S | T) -> Table:
    return attrs.evolve(table, steps={**table.steps, (state, event): following})


def with_duties(table: Table, state: S | T, *duties: F) -> Table:
    return attrs.evolve(table, duties={**table.duties, state: duties})


def with_restart(table: Table, mark: Mark, state: S | T) -> Table:
    return attrs.evolve(table, restart={**table.restart, mark: state})


MUTATIONS: dict[str, Callable[[Rules], Rules]] = {
    "the source takes the group back when nobody answers": lambda rules: rules._replace(
        source=with_step(rules.source, S.OFFERED, V.TIMEOUT, S.RESUMING)
    ),
    "the source gives up waiting and takes the group back": lambda rules: rules._replace(
        source=with_step(rules.source, S.OFFERED, V.FAILED, S.RESUMING)
    ),
    "the source takes the group back though the register said no": lambda rules: rules._replace(
        source=with_step(rules.source, S.RECLAIMING, V.LOST, S.RESUMING)
    ),
    "the source sends before its offer is durable": lambda rules: rules._replace(
        source=with_duties(
            with_duties(rules.source, S.OFFERING, F.HOLD_COMMITS),
            S.OFFERED, F.SEND_HANDOVER, F.WRITE_OFFER, F.AWAIT_ANSWER,
        )
    ),
    "the source sends before the guest is suspended": lambda rules: rules._replace(
        source=with_duties(
            with_duties(rules.source, S.SUSPENDING, F.CLOSE_GATE, F.FLUSH),
            S.OFFERED, F.SEND_HANDOVER, F.SUSPEND, F.AWAIT_ANSWER,
        )
    ),
    "the source never closes its gate": lambda rules: rules._replace(
        source=with_duties(rules.source, S.SUSPENDING, F.SUSPEND, F.FLUSH)
    ),
    "the source does not flush before it offers": lambda rules: rules._replace(
        source=with_duties(rules.source, S.SUSPENDING, F.SUSPEND, F.CLOSE_GATE)
    ),
    "the source goes on committing": lambda rules: rules._replace(
        source=with_duties(rules.source, S.OFFERING, F.WRITE_OFFER)
    ),
    "a restarted source does not look for its offer": lambda rules: rules._replace(source_reads_mark=False),
    "a restarted source with an offer just resumes": lambda rules: rules._replace(
        source=with_restart(rules.source, Mark.OFFERED, S.RESUMING)
    ),
    "the source is released when the target runs": lambda rules: rules._replace(
        source=with_step(rules.source, S.OFFERED, V.TAKEN, S.RELEASING)
    ),
    "the target claims before the handover is durable": lambda rules: rules._replace(
        target=with_duties(
            with_duties(rules.target, T.RECORDING, F.APPLY_HANDOVER),
            T.RESUMING, F.OPEN_GATE, F.WRITE_HANDOVER, F.RESUME,
        )
    ),
    "the target records the handover before its map shows it": lambda rules: rules._replace(
        target=with_duties(rules.target, T.RECORDING, F.WRITE_HANDOVER, F.APPLY_HANDOVER)
    ),
    "the target opens its gate before it claims": lambda rules: rules._replace(
        target=with_duties(
            rules.target, T.CLAIMING, F.HOLD_COMMITS, F.SETTLE_MAPS, F.OPEN_GATE, F.CLAIM
        )
    ),
    "the target runs though its claim was refused": lambda rules: rules._replace(
        target=with_step(rules.target, T.CLAIMING, V.FENCED, T.RESUMING)
    ),
    "the claim does not compare epochs": lambda rules: rules._replace(claim_compares_epoch=False),
    "the target commits at once": lambda rules: rules._replace(
        target=with_duties(rules.target, T.CLAIMING, F.SETTLE_MAPS, F.CLAIM)
    ),
    "the target holds commits only the first time": lambda rules: rules._replace(
        target=with_duties(
            with_duties(rules.target, T.CLAIMING, F.SETTLE_MAPS, F.CLAIM),
            T.RECORDING, F.APPLY_HANDOVER, F.HOLD_COMMITS, F.WRITE_HANDOVER,
        )
    ),
    "evacuated without a flush": lambda rules: rules._replace(
        target=with_duties(rules.target, T.RUNNING, F.SEND_TAKEN, F.PULL)
    ),
    "a restarted target does not look for its handover": lambda rules: rules._replace(target_reads_mark=False),
    "a target that was fenced forgets what it has": lambda rules: rules._replace(
        target=with_step(rules.target, T.CLAIMING, V.FENCED, T.DISCARDING)
    ),
    "a withdrawn target claims all the same": lambda rules: rules._replace(
        target=with_step(
            with_duties(rules.target, T.DISCARDING, F.SEND_DECLINED, F.DROP_HANDOVER),
            T.DISCARDING, V.HANDOVER, T.RECORDING,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_breaking_a_rule_is_noticed(mutation):
    """Each rule is there for a reason: without it, with or without a register, some world breaks a promise."""
    noticed = []
    for register in (True, False):
        try:
            explore(MUTATIONS[mutation](Rules(register=register)))
        except Broken as broken:
            noticed.append(broken)
    assert noticed, f"nobody noticed that {mutation}"


IDLE = {
    # Waiting for something that the model lets happen by itself.
    *((S.COPYING, F.COPY), (S.OFFERED, F.AWAIT_ANSWER), (S.SERVING, F.SERVE), (T.RECEIVING, F.INSTALL)),
    # Courtesies: the other side would find out in another way, or later.
    *(
        (S.ABORTED, F.SEND_WITHDRAW),
        (T.RUNNING, F.SEND_TAKEN),
        (S.FENCED, F.FAIL_GATE),
        (T.FENCED, F.FAIL_GATE),
    ),
    # Savings: without the record a restarted target would go through the evacuation once more.
    (T.EVACUATING, F.WRITE_EVACUATED),
    # Belt and braces: a restarted process commits nothing before it has reclaimed.
    (S.RECLAIMING, F.HOLD_COMMITS),
}


@pytest.mark.parametrize(
    ("state", "effect"),
    [
        (state, effect)
        for table in (SOURCE, TARGET)
        for state, duties in table.duties.items()
        for effect in duties
        if (state, effect) not in IDLE
    ],
)
def test_no_duty_is_idle(state, effect):
    """Without any one duty, some world breaks a promise or cannot come to a good end."""
    side, table = ("source", SOURCE) if isinstance(state, S) else ("target", TARGET)
    without = with_duties(table, state, *(duty for duty in table.duties[state] if duty is not effect))
    register = effect not in (F.SEND_DECLINED, F.SEND_EVACUATED)  # with a register, nobody needs to be told
    rules = Rules(register=register, third_party=False)._replace(**{side: without})
    try:
        noticed = dead_end(rules)
    except Broken as broken:
        noticed = broken
    assert noticed is not None
