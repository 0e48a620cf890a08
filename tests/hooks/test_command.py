"""A workload of shell commands, called by the runner as a migration does it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import attrs
import pytest

from silo.abc import STATE_SIZE_MAX, Capabilities, Health, Role, Step
from silo.clock import SystemClock
from silo.config import WorkloadConfig
from silo.errors import CapacityError, InvalidRequestError, UnavailableError
from silo.hooks.command import CommandWorkload, step_environment
from silo.hooks.inprocess import HOOKS
from silo.hooks.runner import WorkloadRunner

DISK = "nbd+unix:///vm1/disk?socket=/run/silo/vm1.sock"


def runner_of(commands: dict[str, str], clock: SystemClock, **options: object) -> WorkloadRunner:
    return WorkloadRunner(
        CommandWorkload(commands, clock), clock, group="vm1", devices=lambda: {"disk": DISK}, **options
    )


async def call(runner: WorkloadRunner, hook: str) -> object:
    """Call any of the runner's hooks."""
    return await getattr(runner, hook)(*([b"state"] if hook == "resume" else []))


def test_hooks_are_those_of_the_configuration():
    """One list of names, in the workload and in the configuration file."""
    assert WorkloadConfig.__struct_fields__ == HOOKS


@pytest.mark.parametrize("hook", HOOKS)
async def test_every_hook_runs_its_command_and_no_other(clock, tmp_path, hook):
    """With what it needs to know in its environment."""
    report = 'echo "$SILO_STEP $SILO_GROUP $SILO_ROLE $SILO_URI $SILO_URI_DISK"'
    runner = runner_of(dict.fromkeys(HOOKS, f"{report} >> {tmp_path}/log"), clock)
    await call(runner.for_migration(Role.TARGET), hook)
    assert (tmp_path / "log").read_text() == f"{hook} vm1 target {DISK} {DISK}\n"


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_hook_without_a_command_does_nothing(clock, hook):
    """It succeeds at once; nobody knows how the guest is."""
    expected = {"capture": b"", "probe": Health.UNKNOWN}
    assert await call(runner_of({}, clock), hook) == expected.get(hook)


@pytest.mark.parametrize("hook", sorted({*HOOKS} - {"unsuspend"}))
async def test_a_command_that_fails(clock, hook):
    """The error says which hook, how it ended, and the end of what it said."""
    runner = runner_of({hook: "echo no such machine >&2; exit 3"}, clock)
    with pytest.raises(
        UnavailableError,
        match=f"hook {hook} of the workload of vm1 failed: its command ended with status 3: no such machine",
    ):
        await call(runner, hook)


@pytest.mark.parametrize("hook", HOOKS)
async def test_an_overdue_command_is_killed(clock, hook, expect_log):
    """It gets no more time than its hook has."""
    expect_log("a command is interrupted")
    runner = runner_of({hook: "exec sleep 1000"}, clock, timeout_s=0.3)
    with pytest.raises(UnavailableError, match=f"hook {hook} of the workload of vm1 .* by its deadline"):
        await call(runner, hook)


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_cancelled_command_is_killed(clock, tmp_path, hook, expect_log):
    """At every step, and the next call finds everything in order."""
    expect_log("a command is interrupted")
    started = tmp_path / "started"
    os.mkfifo(started)
    command = f"if [ -p {started} ]; then echo > {started}; exec sleep 1000; fi"
    runner = runner_of({hook: command}, clock)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(call(runner, hook))
        await asyncio.get_running_loop().run_in_executor(None, started.read_text)
        task.cancel()
    assert task.cancelled()
    started.unlink()
    await call(runner, hook)


async def test_the_state_travels(clock, tmp_path):
    """From the output of one command to the input of another: the largest that is allowed, unchanged."""
    state = os.urandom(STATE_SIZE_MAX)
    (tmp_path / "state").write_bytes(state)
    commands = {
        "capture": f"echo capturing >&2; cat {tmp_path}/state",
        "resume": f"cat > {tmp_path}/arrived",
    }
    runner = runner_of(commands, clock)
    await runner.resume(await runner.capture())
    assert (tmp_path / "arrived").read_bytes() == state


async def test_a_state_that_is_too_large(clock, expect_log):
    """It is refused while it is being captured, not when it fills the memory."""
    expect_log("a command is interrupted")
    with pytest.raises(
        UnavailableError, match=r"capture of .* its command put out more than 16777216 bytes"
    ) as caught:
        await runner_of({"capture": "cat /dev/zero"}, clock).capture()
    assert isinstance(caught.value.__cause__, CapacityError)


@pytest.mark.parametrize(
    ("command", "health"),
    [
        ("echo running", Health.RUNNING),
        ("echo ' Suspended '", Health.SUSPENDED),
        ("echo gone; echo the rest is for people >&2", Health.GONE),
        ("true", Health.RUNNING),
        ("echo shut off", Health.UNKNOWN),
        ("printf '\\377'", Health.UNKNOWN),
    ],
)
async def test_what_probe_says(clock, command, health):
    """The words of `Health`, or silence; anything else is no answer."""
    assert await runner_of({"probe": command}, clock).probe() is health


async def test_commands_inherit_the_environment(clock, monkeypatch):
    """A command finds its programs and its credentials as the daemon does."""
    monkeypatch.setenv("VIRSH_DEFAULT_CONNECT_URI", "qemu:///system")
    await runner_of({"suspend": '[ "$VIRSH_DEFAULT_CONNECT_URI" = qemu:///system ]'}, clock).suspend()


async def test_commands_know_how_long_they_have(clock):
    """Seconds until they are killed, as a number that ``timeout`` and ``sleep`` understand."""
    runner = runner_of({"suspend": 'echo "$SILO_DEADLINE_S"; false'}, clock, timeout_s=25.0)
    with pytest.raises(UnavailableError) as caught:
        await runner.suspend()
    assert 0 < float(caught.value.message.split()[-1]) <= 25
    workload = CommandWorkload({"suspend": 'echo "$SILO_DEADLINE_S"; false'}, clock, timeout_s=5.0)
    with pytest.raises(UnavailableError) as caught:
        await workload.suspend(Step(role=Role.SOURCE, deadline=clock.monotonic() + 1000))
    assert 0 < float(caught.value.message.split()[-1]) <= 5


async def test_a_command_has_its_own_limit(clock, expect_log):
    """Also without a runner, and without any other deadline."""
    expect_log("a command is interrupted")
    workload = CommandWorkload({"suspend": "exec sleep 1000"}, clock, timeout_s=0.05)
    with pytest.raises(UnavailableError, match="its command was not done by its deadline, and was killed"):
        await workload.suspend(Step(role=Role.SOURCE, deadline=float("inf")))


async def test_secrets_stay_out_of_the_log(clock, monkeypatch, caplog, expect_log):
    """Neither the environment nor the command itself is shown, whatever goes wrong."""
    expect_log("a command is interrupted")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    caplog.set_level(0)
    for command in ("true swordfish; false", "true swordfish; exec sleep 1000"):
        with pytest.raises(UnavailableError) as caught:
            await runner_of({"suspend": command}, clock, timeout_s=0.3).suspend()
        shown = f"{caught.value} {caught.value.__cause__} {caplog.text}"
        assert "hunter2" not in shown
        assert "swordfish" not in shown


@attrs.frozen
class Devices:
    """What some volumes become in the environment."""

    uris: dict[str, str]
    variables: dict[str, str]


@pytest.mark.parametrize(
    "devices",
    [
        Devices({}, {}),
        Devices({"disk": "nbd://a"}, {"SILO_URI": "nbd://a", "SILO_URI_DISK": "nbd://a"}),
        Devices({"a.b-c": "nbd://a"}, {"SILO_URI": "nbd://a", "SILO_URI_A_B_C": "nbd://a"}),
        Devices(
            {"disk": "nbd://a", "ram0": "nbd://b"}, {"SILO_URI_DISK": "nbd://a", "SILO_URI_RAM0": "nbd://b"}
        ),
        Devices({"a-b": "nbd://a", "a.b": "nbd://b", "c": "nbd://c"}, {"SILO_URI_C": "nbd://c"}),
    ],
)
def test_variables_of_volumes(devices):
    """One per volume, one more for a volume that is alone, and none that would be ambiguous."""
    step = Step(role=Role.SOURCE, deadline=0.0, devices=devices.uris, group="vm1")
    assert step_environment("suspend", step, -1.0) == {
        "SILO_GROUP": "vm1",
        "SILO_ROLE": "source",
        "SILO_STEP": "suspend",
        "SILO_DEADLINE_S": "0.000",
        **devices.variables,
    }


@pytest.mark.parametrize(
    ("names", "caps"),
    [
        ("", Capabilities(quiesce=False, captures_state=False, can_unsuspend=True)),
        ("suspend resume", Capabilities(quiesce=False, captures_state=False, can_unsuspend=False)),
        ("suspend unsuspend", Capabilities(quiesce=False, captures_state=False, can_unsuspend=True)),
        ("quiesce capture", Capabilities(quiesce=True, captures_state=True, can_unsuspend=True)),
    ],
)
def test_it_can_do_what_it_has_commands_for(clock, names, caps):
    """An empty command is none."""
    commands = dict.fromkeys(HOOKS, " ") | dict.fromkeys(names.split(), "true")
    assert CommandWorkload(commands, clock).caps() == caps


def test_nonsense_is_refused(clock):
    """With the names that would have been right."""
    with pytest.raises(
        InvalidRequestError, match=r"no workload command pause, stop \(hooks are prepare, quiesce"
    ):
        CommandWorkload({"stop": "true", "pause": "true", "resume": "true"}, clock)
    with pytest.raises(InvalidRequestError, match="must be positive"):
        CommandWorkload({}, clock, timeout_s=0)


async def test_commands_like_those_of_the_demo(clock, tmp_path: Path):
    """Suspend, change of mind, suspend, resume elsewhere; each with the disk's address where it is needed."""
    say = f"echo {{}} >> {tmp_path}/guest"
    commands = {
        "suspend": say.format("suspend"),
        "unsuspend": say.format('resume "$SILO_URI"'),
        "resume": say.format('resume "$SILO_URI"'),
    }
    runner = runner_of(commands, clock)
    source, target = runner.for_migration(Role.SOURCE), runner.for_migration(Role.TARGET)
    for _ in range(2):
        for hook in ("quiesce", "suspend", "flush", "capture"):
            await call(source, hook)
        for hook in ("unsuspend", "unquiesce"):
            await call(source, hook)
    await target.prepare()
    await target.resume(b"")
    await target.unquiesce()
    await source.fence()
    log = (tmp_path / "guest").read_text().splitlines()
    assert log == ["suspend", f"resume {DISK}"] * 2 + [f"resume {DISK}"]
