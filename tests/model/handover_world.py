"""A world in which two hosts hand over a group as `silo.p2p.handover` says, and everything goes wrong.

A world is one immutable value: both sides, the register, what was ever sent, and where the chunks of U (those
that only the source had) are. `following` gives every world that may come next:

* a side carries out its next effect, or fails to, or is cut off after it took effect but before it knew;
* a message that was ever sent arrives, now, again, or never. That covers loss, repetition, any delay and any
  order, and links that come and go;
* a process dies (what it had on disk and in the register stays), or its machine loses power (then what was not
  flushed is gone as well), between any two effects, and starts again;
* once, somebody else claims the group by force.

The meaning of each effect is written here a second time, as plainly as possible, apart from the drivers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import NamedTuple

from silo.p2p.handover import (
    SOURCE,
    TARGET,
    Effect,
    Event,
    Mark,
    SourceState,
    Table,
    TargetState,
)

S, T, V, F = SourceState, TargetState, Event, Effect

__all__ = ["KILLED", "POWER_LOST", "Map", "Owner", "Rules", "U", "World", "following", "start", "unruled"]


class Owner(Enum):
    """Whom the register names."""

    SOURCE = "source, at the epoch in the handover"
    SOURCE_AGAIN = "source, at a later epoch"
    TARGET = "target"
    OTHER = "a third party"


class U(Enum):
    """Where the newest content of U is, besides the source."""

    NOWHERE = 0
    INSTALLED = 1
    DURABLE = 2


class Map(Enum):
    """What the target's map says of the chunks that the handover names."""

    STALE = 0
    """It still shows content that was superseded."""
    REVERTED = 1
    """Everything is absent, and nobody has said where it is to be had."""
    TRUE = 2


class Rules(NamedTuple):
    """The tables under test, and the assumptions that tests break on purpose."""

    source: Table = SOURCE
    target: Table = TARGET
    register: bool = True
    source_reads_mark: bool = True
    target_reads_mark: bool = True
    claim_compares_epoch: bool = True
    third_party: bool = True


class Host(NamedTuple):
    """One side: its machine, what it has on disk, and what its guest may do."""

    state: SourceState | TargetState | None
    """``None``: the process is dead, or knows of no migration."""
    step: int = 0
    """How many duties of the state are done."""
    up: bool = True
    mark: Mark | None = None
    guest: bool = False
    gate: bool = False
    held: bool = False


class World(NamedTuple):
    source: Host
    target: Host
    owner: Owner = Owner.SOURCE
    sent: frozenset[Event] = frozenset()
    u: U = U.NOWHERE
    source_flushed: bool = False
    target_map: Map = Map.STALE
    source_won: bool = False
    """The source has won an epoch since it sent the handover."""
    target_won: bool = False
    """The target has won the group once."""
    target_withdrew: bool = False
    """The target has said that it will never claim."""


KILLED = "killed: "
POWER_LOST = "power lost: "

FROM_SOURCE = frozenset({V.HANDOVER, V.WITHDRAW, V.RELEASED})


def start() -> World:
    """The guest runs at the source; the target has accepted."""
    return World(Host(S.COPYING, guest=True, gate=True), Host(T.RECEIVING))


def following(world: World, rules: Rules) -> Iterator[tuple[str, World]]:
    """Every next world, with what happened."""
    yield from _side(world, rules, "source")
    yield from _side(world, rules, "target")
    if rules.third_party and rules.register and world.owner is not Owner.OTHER:
        yield "a third party claims", world._replace(owner=Owner.OTHER)


def _side(world: World, rules: Rules, side: str) -> Iterator[tuple[str, World]]:
    host: Host = getattr(world, side)
    table = rules.source if side == "source" else rules.target
    if not host.up:
        restart = _restart_source if side == "source" else _restart_target
        yield f"{side} restarts", restart(world, rules)
        return
    if host.state is T.FINISHED and host.mark is None:
        return  # an ordinary group; its later life is another story
    yield KILLED + side, _crash(world, side, power=False)
    yield POWER_LOST + side, _crash(world, side, power=True)
    if host.state is None:
        if side == "target" and host.mark is None:
            yield "target knows nothing", _say(world, V.DECLINED)._replace(target_withdrew=True)
        return
    yield from _messages(world, table, side)
    duties = table.duties[host.state]
    if host.step < len(duties):
        yield from _effect(world, rules, table, side, duties[host.step])
    elif (host.state, V.DONE) in table.steps:
        yield f"{side} {host.state.value}: done", _move(world, table, side, V.DONE)


def _messages(world: World, table: Table, side: str) -> Iterator[tuple[str, World]]:
    host: Host = getattr(world, side)
    for event in world.sent:
        # A message that no rule mentions costs the connection, so it is as good as lost.
        moves = table.steps.get((host.state, event), host.state) is not host.state
        if moves and (event in FROM_SOURCE) == (side == "target"):
            yield f"{event.value} arrives", _move(world, table, side, event)


def unruled(world: World, rules: Rules) -> list[str]:
    """Messages that can arrive, while no rule says what follows."""
    found = []
    for host, table, of_source in ((world.source, rules.source, False), (world.target, rules.target, True)):
        if host.up and host.state is not None and host.state not in table.final:
            arriving = [event for event in world.sent if (event in FROM_SOURCE) == of_source]
            found += [f"{e.name} in {host.state}" for e in arriving if (host.state, e) not in table.steps]
    return found


def _move(world: World, table: Table, side: str, event: Event) -> World:
    host: Host = getattr(world, side)
    return world._replace(**{side: host._replace(state=table.steps[host.state, event], step=0)})


def _say(world: World, event: Event) -> World:
    return world._replace(sent=world.sent | {event})


def _effect(
    world: World, rules: Rules, table: Table, side: str, effect: Effect
) -> Iterator[tuple[str, World]]:
    """Carry out one effect: it succeeds, or fails with or without having happened."""
    host: Host = getattr(world, side)
    what = f"{side} {host.state.value}: {effect.value}"
    outcomes = dict(_OUTCOMES[effect](world, rules, side) if effect in _OUTCOMES else {})
    if not outcomes:
        changed = _apply(world, side, effect)
        after: Host = getattr(changed, side)
        yield what, changed._replace(**{side: after._replace(step=after.step + 1)})
        outcomes = {V.FAILED: world} if changed == world else {V.FAILED: world, "failed late": changed}
    for event, changed in outcomes.items():
        if event is None:
            yield f"{what}, no answer", changed
            continue
        kind = V.FAILED if event == "failed late" else event
        if (host.state, kind) in table.steps:
            yield f"{what}: {getattr(event, 'value', event)}", _move(changed, table, side, kind)


def _apply(world: World, side: str, effect: Effect) -> World:
    """Effects that only change something."""
    host: Host = getattr(world, side)
    marks = {
        F.WRITE_OFFER: Mark.OFFERED,
        F.WRITE_RELEASED: Mark.RELEASED,
        F.WRITE_HANDOVER: Mark.HANDED,
        F.WRITE_EVACUATED: Mark.EVACUATED,
        F.DROP_OFFER: None,
        F.DROP_HANDOVER: None,
    }
    says = {
        F.SEND_HANDOVER: V.HANDOVER,
        F.SEND_TAKEN: V.TAKEN,
        F.SEND_EVACUATED: V.EVACUATED,
        F.SEND_RELEASED: V.RELEASED,
        F.SEND_DECLINED: V.DECLINED,
        F.SEND_WITHDRAW: V.WITHDRAW,
    }
    fields: Mapping[Effect, Mapping[str, bool]] = {
        F.HOLD_COMMITS: {"held": True},
        F.RELEASE_COMMITS: {"held": False},
        F.SUSPEND: {"guest": False},
        F.UNSUSPEND: {"guest": True},
        F.RESUME: {"guest": True},
        F.CLOSE_GATE: {"gate": False},
        F.FAIL_GATE: {"gate": False},
        F.OPEN_GATE: {"gate": True},
    }
    if effect in marks:
        return world._replace(**{side: host._replace(mark=marks[effect])})
    if effect in says:
        world = _say(world, says[effect])
        return world._replace(target_withdrew=world.target_withdrew or effect is F.SEND_DECLINED)
    if effect in fields:
        return world._replace(**{side: host._replace(**fields[effect])})
    if effect is F.FLUSH:
        return world._replace(source_flushed=True)
    if effect is F.APPLY_HANDOVER:
        return world._replace(target_map=Map.TRUE if world.target_map is Map.STALE else world.target_map)
    if effect is F.FLUSH_INSTALLED:
        return world._replace(u=U.DURABLE if world.u is U.INSTALLED else world.u)
    if effect is F.SETTLE_MAPS:
        return world._replace(target_map=Map.TRUE if world.target_map is Map.REVERTED else world.target_map)
    raise AssertionError(f"nobody has said what {effect.name} means")


def _waiting(world: World, rules: Rules, side: str) -> dict[Event | None, World]:
    """Copying, waiting and serving end by themselves at any time, or when they cannot go on."""
    events: dict[Event | None, World] = {V.DONE: world, V.FAILED: world, V.TIMEOUT: world}
    if world.owner is Owner.OTHER:
        events[V.FENCED] = world
    return events


def _awaiting(world: World, rules: Rules, side: str) -> dict[Event | None, World]:
    return {V.TIMEOUT: world, V.FAILED: world}


def _serving(world: World, rules: Rules, side: str) -> dict[Event | None, World]:
    """A commit of the target in the register says as much as its message; none comes before it is evacuated."""
    committed = rules.register and world.owner is Owner.TARGET and world.target.mark is Mark.EVACUATED
    return {None: world, V.EVACUATED: world} if committed else {None: world}


def _installing(world: World, rules: Rules, side: str) -> dict[Event | None, World]:
    return {V.FAILED: world}


def _reclaim(world: World, rules: Rules, side: str) -> dict[Event | None, World]:
    if not rules.register:
        asked = _say(world, V.WITHDRAW)
        answers: dict[Event | None, World] = {None: asked}
        if V.DECLINED in world.sent:
            answers[V.WON] = asked._replace(source_won=True)
        if V.TAKEN in world.sent:
            answers[V.LOST] = asked
        return answers
    if world.owner is Owner.TARGET:
        return {V.LOST: world, None: world}
    if world.owner is Owner.OTHER:
        return {V.FENCED: world, None: world}
    won = world._replace(owner=Owner.SOURCE_AGAIN, source_won=True)
    return {V.WON: won, None: won}


def _claim(world: World, rules: Rules, side: str) -> dict[Event | None, World]:
    if not rules.register:
        return {V.WON: world._replace(owner=Owner.TARGET)}
    compared = not rules.claim_compares_epoch
    if world.owner in (Owner.SOURCE, Owner.TARGET) or (compared and world.owner is Owner.SOURCE_AGAIN):
        won = world._replace(owner=Owner.TARGET, target_won=True)
        return {V.WON: won, None: won}
    if world.target_won:
        return {V.FENCED: world, None: world}
    return {V.LOST: world, V.FENCED: world, None: world}  # when in doubt it counts as won


def _pull(world: World, rules: Rules, side: str) -> dict[Event | None, World]:
    """U arrives when the source serves it, or when the guest overwrites it."""
    target = world.target
    came = world._replace(
        u=U.INSTALLED if world.u is U.NOWHERE else world.u, target=target._replace(step=target.step + 1)
    )
    return {None: came}


_OUTCOMES = {
    F.COPY: _waiting,
    F.AWAIT_ANSWER: _awaiting,
    F.SERVE: _serving,
    F.INSTALL: _installing,
    F.RECLAIM: _reclaim,
    F.CLAIM: _claim,
    F.PULL: _pull,
}


def _crash(world: World, side: str, *, power: bool) -> World:
    host: Host = getattr(world, side)
    dead = host._replace(state=None, step=0, up=False, gate=False, held=False, guest=host.guest and not power)
    if side == "target" and power and world.u is not U.DURABLE:
        # The map falls back to a checkpoint that is older than the handover: everything is absent.
        world = world._replace(u=U.NOWHERE, target_map=Map.REVERTED)
    return world._replace(**{side: dead})


def _restart_source(world: World, rules: Rules) -> World:
    host = world.source._replace(up=True)
    if host.mark is not None and rules.source_reads_mark:
        return world._replace(source=host._replace(state=rules.source.restart[host.mark]))
    if rules.register and world.owner in (Owner.TARGET, Owner.OTHER):
        return world._replace(source=host._replace(state=S.FENCED, guest=False))
    owner = Owner.SOURCE_AGAIN if rules.register else world.owner
    running = host._replace(state=S.ABORTED, gate=True, guest=True, mark=None)
    return world._replace(source=running, owner=owner, source_won=rules.register or world.source_won)


def _restart_target(world: World, rules: Rules) -> World:
    host = world.target._replace(up=True)
    if host.mark is None or not rules.target_reads_mark:
        return world._replace(target=host._replace(guest=False, mark=None))
    state = rules.target.restart[host.mark]
    gate = host.mark is Mark.EVACUATED
    return world._replace(target=host._replace(state=state, gate=gate, guest=host.guest or gate))
