"""The runner: what it adds to a hook, and what it makes of what comes back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from silo.abc import STATE_SIZE_MAX, Capabilities, Health, Role, Step, Workload
from silo.clock import SystemClock
from silo.errors import CapacityError, InvalidRequestError, UnavailableError
from silo.hooks.inprocess import HOOKS, CallbackWorkload
from silo.hooks.runner import TIMEOUT_S, WorkloadRunner
from silo.p2p.ports import Guest
from silo.testing.loop import SimulatedClock, explore, run_simulated

BEFORE_CLAIM = {"prepare", "quiesce", "suspend", "flush", "capture"}
"""Hooks that serve nothing but the handover, and therefore end with the migration's deadline."""


class Machine(Workload):
    """Has every hook, writes down what it is asked, and does it as it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Step]] = []
        self.arrived: bytes | None = None
        self.takes_s = 0.0
        self.state: Any = b"state"
        self.health: Any = Health.RUNNING

    async def _hook(self, name: str, step: Step) -> None:
        self.steps.append((name, step))
        await asyncio.sleep(self.takes_s)

    async def prepare(self, step: Step) -> None:
        await self._hook("prepare", step)

    async def quiesce(self, step: Step) -> None:
        await self._hook("quiesce", step)

    async def suspend(self, step: Step) -> None:
        await self._hook("suspend", step)

    async def flush(self, step: Step) -> None:
        await self._hook("flush", step)

    async def capture(self, step: Step) -> bytes:
        await self._hook("capture", step)
        return self.state

    async def resume(self, step: Step, state: bytes) -> None:
        await self._hook("resume", step)
        self.arrived = state

    async def unquiesce(self, step: Step) -> None:
        await self._hook("unquiesce", step)

    async def unsuspend(self, step: Step) -> None:
        await self._hook("unsuspend", step)

    async def fence(self, step: Step) -> None:
        await self._hook("fence", step)

    async def probe(self, step: Step) -> Health:
        await self._hook("probe", step)
        return self.health


class Plain(Workload):
    """Has only what a workload must have."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def suspend(self, step: Step) -> None:
        self.calls.append("suspend")

    def resume(self, step: Step, state: bytes) -> None:
        self.calls.append("resume")

    def unsuspend(self, step: Step) -> None:
        self.calls.append("unsuspend")


async def call(runner: WorkloadRunner, hook: str) -> Any:
    """Call any of the runner's hooks."""
    return await getattr(runner, hook)(*([b"state"] if hook == "resume" else []))


def test_it_is_the_guest_of_a_migration(clock):
    """The port that the migration declares is satisfied; the limit on the state is the same on both sides."""
    from silo.p2p import records

    guest: Guest = WorkloadRunner(None, clock, group="vm1")
    assert all(callable(getattr(guest, hook)) for hook in HOOKS)
    assert guest.spent_s == 0.0
    assert records.STATE_SIZE_MAX == STATE_SIZE_MAX


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("role", Role)
def test_every_hook_gets_its_step(hook, role):
    """Role, group, the devices as they are at that moment, and the earlier of the two deadlines that concern it."""

    async def scenario(clock: SimulatedClock) -> None:
        machine, devices = Machine(), {"disk": "nbd://before"}
        runner = WorkloadRunner(machine, clock, group="vm1", devices=lambda: devices)
        devices["disk"] = "nbd://now"
        now = clock.monotonic()
        for deadline in (now + 5, now + 5000):
            machine.steps.clear()
            await call(runner.for_migration(role, deadline=deadline), hook)
            expected = min(deadline, now + TIMEOUT_S) if hook in BEFORE_CLAIM else now + TIMEOUT_S
            step = Step(role=role, deadline=expected, devices={"disk": "nbd://now"}, group="vm1")
            assert machine.steps == [(hook, step)]
        devices["disk"] = "nbd://later"
        assert machine.steps[0][1].devices == {"disk": "nbd://now"}

    run_simulated(scenario, seed=1)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_may_be_repeated(hook):
    """Each call is a call of the hook: being idempotent is the hook's part."""

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        runner = WorkloadRunner(machine, clock, group="vm1")
        assert await call(runner, hook) == await call(runner, hook)
        assert [name for name, _ in machine.steps] == [hook, hook]

    run_simulated(scenario, seed=1)


@pytest.mark.parametrize("hook", HOOKS)
def test_cancellation_at_every_step(hook):
    """The hook has ended when the caller has, and the next hook can be called."""

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        machine.takes_s = 20.0
        runner = WorkloadRunner(machine, clock, group="vm1")
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(call(runner, hook))
            await asyncio.sleep(1)
            task.cancel()
        assert task.cancelled()
        assert runner.spent_s == 1.0
        machine.takes_s = 0.0
        await runner.unsuspend()

    explore(scenario, seeds=range(3))


@pytest.mark.parametrize("hook", HOOKS)
def test_an_overdue_hook(hook):
    """It ends with its deadline, and the error names it."""

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        machine.takes_s = 1000.0
        runner = WorkloadRunner(machine, clock, group="vm1", timeout_s=7.0)
        with pytest.raises(UnavailableError, match=f"hook {hook} of the workload of vm1 was not done"):
            await call(runner, hook)
        assert runner.spent_s == 7.0

    run_simulated(scenario, seed=1)


@pytest.mark.parametrize("hook", HOOKS)
def test_after_the_migration_deadline(hook):
    """What would serve the handover is not begun any more; what must be done is."""

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        runner = WorkloadRunner(machine, clock, group="vm1")
        late = runner.for_migration(Role.SOURCE, deadline=clock.monotonic())
        if hook in BEFORE_CLAIM:
            with pytest.raises(UnavailableError, match="not done by its deadline"):
                await call(late, hook)
        else:
            await call(late, hook)
        assert len(machine.steps) == (hook not in BEFORE_CLAIM)

    run_simulated(scenario, seed=1)


def test_the_time_that_hooks_take():
    """Added up whatever their outcome, by hook and in all, and for each migration anew."""

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        runner = WorkloadRunner(machine, clock, group="vm1").for_migration(Role.SOURCE)
        machine.takes_s = 0.5
        await runner.suspend()
        await runner.suspend()
        machine.takes_s = 2.0
        await runner.capture()
        assert runner.spent_s == 3.0
        assert runner.took_s == {"suspend": 1.0, "capture": 2.0}
        assert runner.for_migration(Role.SOURCE).spent_s == 0.0

    run_simulated(scenario, seed=1)


def test_runners_of_one_workload_take_turns():
    """An outgoing and an incoming migration do not call hooks at the same time."""

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        machine.takes_s = 1.0
        runner = WorkloadRunner(machine, clock, group="vm1")
        started = clock.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for role in Role:
                tasks.create_task(runner.for_migration(role).probe())
        assert clock.monotonic() - started == 2.0

    explore(scenario, seeds=range(5))


async def test_a_late_suspend_cannot_overtake_unsuspend(clock, expect_log):
    """The guest runs in the end, because the overdue hook ended before the one that undid it began."""
    expect_log("hook suspend of the workload of vm1 ended long after its deadline")
    go_on, events = threading.Event(), []

    def suspend(step: Step) -> None:
        assert go_on.wait(30)
        events.append("suspended")

    workload = CallbackWorkload(suspend=suspend, unsuspend=lambda step: events.append("running"))
    source = WorkloadRunner(workload, clock, group="vm1").for_migration(
        Role.SOURCE, deadline=clock.monotonic() + 0.02
    )
    with pytest.raises(UnavailableError, match="hook suspend"):
        await source.suspend()
    async with asyncio.TaskGroup() as tasks:
        undo = tasks.create_task(source.unsuspend())
        await asyncio.sleep(0)
        assert events == []
        go_on.set()
    assert undo.done()
    assert events == ["suspended", "running"]


@pytest.mark.parametrize(
    "state", [b"", b"x", bytearray(b"x"), memoryview(b"xyz")[::2], bytes(STATE_SIZE_MAX)]
)
def test_states_that_can_travel(state):
    """Anything that is bytes, up to the limit; what arrives is `bytes`."""

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        machine.state = state
        runner = WorkloadRunner(machine, clock, group="vm1")
        captured = await runner.capture()
        assert type(captured) is bytes
        assert captured == bytes(state)
        await runner.resume(captured)
        assert machine.arrived == captured

    run_simulated(scenario, seed=1)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ("text", InvalidRequestError, "capture of the workload of vm1 returned str, not bytes"),
        (None, InvalidRequestError, "returned NoneType, not bytes"),
        (bytes(STATE_SIZE_MAX + 1), CapacityError, "returned 16777217 bytes, 16777216 can travel"),
    ],
    ids=["text", "nothing", "too large"],
)
def test_states_that_cannot_travel(state, error, message):
    """Found at the source, before anything is sent."""

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        machine.state = state
        with pytest.raises(error, match=message):
            await WorkloadRunner(machine, clock, group="vm1").capture()

    run_simulated(scenario, seed=1)


def test_probe_must_return_a_health():
    """A word is none."""

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        machine.health = "running"
        with pytest.raises(
            InvalidRequestError, match="probe of the workload of vm1 returned str, not a Health"
        ):
            await WorkloadRunner(machine, clock, group="vm1").probe()

    run_simulated(scenario, seed=1)


@pytest.mark.parametrize("hook", HOOKS)
async def test_no_workload(clock, hook):
    """Every step succeeds, and there is nothing to carry over."""
    expected = {"capture": b"", "probe": Health.UNKNOWN}
    assert await call(WorkloadRunner(None, clock, group="vm1"), hook) == expected.get(hook)


async def test_hooks_that_a_workload_does_not_have(clock):
    """They cost no time; those that it has are called."""
    workload = Plain()
    runner = WorkloadRunner(workload, clock, group="vm1")
    for hook in HOOKS:
        await call(runner, hook)
    assert workload.calls == ["suspend", "resume", "unsuspend"]
    assert set(runner.took_s) == {"suspend", "resume", "unsuspend"}


def test_a_workload_can_do_what_it_has_hooks_for():
    """Unless it says otherwise."""
    assert Plain().caps() == Capabilities(quiesce=False, captures_state=False, can_unsuspend=True)
    assert Machine().caps() == Capabilities(quiesce=True, captures_state=True, can_unsuspend=True)


def test_nothing_is_asked_that_the_workload_cannot_do(expect_log):
    """Hooks are there, but the workload says that now they are of no use. That the guest stays down is an error."""
    expect_log("the workload of vm1 cannot run on after its suspension: start it again")

    async def scenario(clock: SimulatedClock) -> None:
        machine = Machine()
        machine.caps = lambda: Capabilities(quiesce=False, captures_state=False, can_unsuspend=False)
        runner = WorkloadRunner(machine, clock, group="vm1")
        for hook in HOOKS:
            await call(runner, hook)
        skipped = {"quiesce", "capture", "unquiesce", "unsuspend"}
        assert [name for name, _ in machine.steps] == [hook for hook in HOOKS if hook not in skipped]

    run_simulated(scenario, seed=1)


async def test_capabilities_that_fail(clock):
    """An error like that of any hook."""

    def caps() -> Capabilities:
        raise RuntimeError("no agent")

    machine = Machine()
    machine.caps = caps
    with pytest.raises(UnavailableError, match="caps of the workload of vm1 failed: no agent"):
        await WorkloadRunner(machine, clock, group="vm1").quiesce()


def test_a_timeout_that_leaves_no_time(clock: SystemClock):
    """It is refused where it is given."""
    with pytest.raises(InvalidRequestError, match="must be positive"):
        WorkloadRunner(None, clock, group="vm1", timeout_s=0.0)


async def test_callbacks(clock):
    """Functions of either kind, and nothing where there is none."""
    calls = []

    async def suspend(step: Step) -> None:
        calls.append("suspend")

    def capture(step: Step) -> bytes:
        calls.append("capture")
        return b"state"

    workload = CallbackWorkload(
        suspend=suspend, capture=capture, resume=lambda step, state: calls.append(state)
    )
    assert workload.caps() == Capabilities(captures_state=True)
    runner = WorkloadRunner(workload, clock, group="vm1")
    for hook in HOOKS:
        await call(runner, hook)
    assert calls == ["suspend", "capture", b"state"]
    with pytest.raises(InvalidRequestError, match=r"a workload has no hook stop \(hooks are prepare, "):
        CallbackWorkload(stop=suspend)
