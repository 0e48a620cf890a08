"""Real shell commands: what they say, how they end, and that nothing of an interrupted one is left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from silo.clock import SystemClock
from silo.errors import CapacityError, UnavailableError
from silo.hooks import shell
from silo.hooks.shell import run_shell
from silo.threads import run_to_completion

ENV = {"PATH": os.environ["PATH"]}
WAIT_MS = 30_000


@attrs.frozen
class Watched:
    """A process that a command started and reported by number."""

    pidfd: int

    async def ended(self) -> bool:
        """Whether it ends before long, be it our child or not."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(await run_to_completion(None, poll.poll, WAIT_MS))

    @property
    def is_alive(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)


class Reports:
    """A named pipe, through which commands tell the test their process numbers."""

    def __init__(self, path: Path, files: contextlib.ExitStack) -> None:
        os.mkfifo(path)
        self.path = path
        self._files = files
        self._pipe = files.enter_context(io.FileIO(os.open(path, os.O_RDWR), "r+"))

    async def next(self) -> Watched:
        """The next process."""
        number = int(await run_to_completion(None, functools.partial(self._pipe.readline)))
        pidfd = os.pidfd_open(number)
        self._files.callback(os.close, pidfd)
        self._files.callback(_kill, pidfd)
        return Watched(pidfd)


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


@pytest.fixture
def reports(tmp_path: Path) -> Iterator[Reports]:
    with contextlib.ExitStack() as files:
        yield Reports(tmp_path / "reports", files)


async def run(command: str, clock: SystemClock, **options: object) -> shell.ShellOutcome:
    return await run_shell(command, ENV, clock, **options)


async def test_words_and_status(clock):
    """Both outputs are heard, in order; the status comes back as it is."""
    outcome = await run("echo one; echo two >&2; exit 3", clock)
    assert (outcome.status, outcome.output, outcome.words) == (3, b"", "one\ntwo")
    assert outcome.complaint == "its command ended with status 3: one\ntwo"


async def test_a_silent_failure(clock):
    """There is nothing to quote."""
    assert (await run("false", clock)).complaint == "its command ended with status 1"


async def test_a_command_that_a_signal_ended(clock):
    """The signal is named."""
    outcome = await run("kill -SEGV $$", clock)
    assert (outcome.status, outcome.complaint) == (-signal.SIGSEGV, "its command ended with SIGSEGV")


async def test_only_the_end_of_many_words_is_kept(clock):
    """Memory is bounded, and the end tells why it failed. Bytes that are no text do no harm."""
    outcome = await run("yes filler | head -n 200000; printf '\\377 the reason' >&2", clock)
    assert outcome.words.endswith("filler\n\N{REPLACEMENT CHARACTER} the reason")
    assert len(outcome.words) <= shell.WORDS_SIZE


async def test_output_is_kept_apart_when_it_is_wanted(clock):
    """Every byte of it, and only up to the limit, which is exact."""
    outcome = await run("head -c 300000 /dev/zero; echo why >&2", clock, output_max=300_000)
    assert (outcome.output, outcome.words) == (bytes(300_000), "why")


async def test_one_byte_too_many(clock, expect_log):
    """The limit is exact, and whatever puts out more is not waited for."""
    expect_log("a command is interrupted")
    with pytest.raises(CapacityError, match="its command put out more than 299999 bytes"):
        await run("head -c 300000 /dev/zero; exec sleep 1000", clock, output_max=299_999)


async def test_endless_output_is_stopped(clock, expect_log):
    """A command that floods us is killed at the limit."""
    expect_log("a command is interrupted")
    with pytest.raises(CapacityError, match="more than 1000000 bytes"):
        await run("cat /dev/zero", clock, output_max=1_000_000)


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
async def test_input_comes_back(clock, size):
    """Standard input holds exactly what was given, however much; it can also be opened anew."""
    state = os.urandom(size)
    assert (await run("cat", clock, stdin=state, output_max=size)).output == state
    assert (await run("cat /dev/stdin", clock, stdin=memoryview(state), output_max=size)).output == state


async def test_input_need_not_be_read(clock):
    """A command that ignores its input fails nobody."""
    assert (await run("true", clock, stdin=bytes(3_000_000))).status == 0


async def test_without_input_there_is_none(clock):
    """A command that reads does not hang, and does not read the daemon's terminal."""
    assert (await run("cat", clock, output_max=10)).output == b""


async def test_the_outputs_can_be_opened_by_name(clock):
    """As scripts do."""
    outcome = await run("echo a > /dev/stdout; echo b > /dev/stderr; echo c", clock, output_max=10)
    assert (outcome.output, outcome.words) == (b"a\nc\n", "b")


async def test_the_environment_is_the_given_one(clock):
    """And nothing else but what a shell sets by itself."""
    outcome = await run("env", clock)
    assert set(outcome.words.splitlines()) >= {f"PATH={ENV['PATH']}"}
    assert "HOME=" not in outcome.words


async def test_it_leads_a_session_and_a_group(clock):
    """So that one signal reaches all of it, and Ctrl-C at the daemon's terminal does not."""
    number, *_, group, session = (await run("echo $$; cat /proc/$$/stat", clock)).words.split()[:7]
    assert number == group == session


async def test_nothing_is_left_of_it(clock):
    """No zombie, no open file."""
    files = set(os.listdir("/proc/self/fd"))
    number = int((await run("echo $$", clock)).words)
    assert not Path(f"/proc/{number}").exists()
    assert set(os.listdir("/proc/self/fd")) == files


async def test_what_it_leaves_running_lives_on(clock, reports):
    """The end of the shell is the end of the command, though a child holds its output: as when a machine is started."""
    outcome = await run(f"sh -c 'echo $$ > {reports.path}; exec sleep 1000' & echo started", clock)
    assert (outcome.status, outcome.words) == (0, "started")
    assert (await reports.next()).is_alive


@attrs.frozen
class Family:
    """A command that starts a shell that starts a shell, each of which reports its number and stays."""

    directory: Path
    reports: Reports

    def command(self, prelude: str = ":") -> str:
        """``prelude`` is what each of them does first."""
        leaf, child = self.directory / "leaf.sh", self.directory / "child.sh"
        report = f"echo $$ > {self.reports.path}"
        leaf.write_text(f"{prelude}; {report}; exec sleep 1000")
        child.write_text(f"{prelude}; sh {leaf} & {report}; wait")
        return f"{prelude}; echo I am busy; sh {child} & {report}; wait"

    async def members(self) -> list[Watched]:
        """All three, alive."""
        members = [await self.reports.next() for _ in range(3)]
        assert all(member.is_alive for member in members)
        return members


@pytest.fixture
def family(tmp_path: Path, reports: Reports) -> Family:
    return Family(tmp_path, reports)


@pytest.mark.parametrize("prelude", [":", "trap '' TERM"], ids=["polite", "deaf"])
async def test_a_cancelled_command_is_killed_with_all_that_it_started(
    clock, family, expect_log, monkeypatch, prelude
):
    """Whether they heed SIGTERM or not; the shell is reaped before the caller goes on."""
    monkeypatch.setattr(shell, "GRACE_S", 0.05)
    expect_log("a command is interrupted; the last that it said: I am busy")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(run(family.command(prelude), clock))
        members = await family.members()
        task.cancel()
    assert task.cancelled()
    assert [await member.ended() for member in members] == [True] * 3


async def test_many_cancellations_are_as_one(clock, family, expect_log):
    """The clean-up cannot be interrupted."""
    expect_log("a command is interrupted")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(run(family.command(), clock))
        members = await family.members()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    assert task.cancelled()
    assert [await member.ended() for member in members] == [True] * 3


async def test_sigterm_comes_first(clock, reports, tmp_path, expect_log):
    """A command that cleans up behind itself has the time to do so."""
    expect_log("a command is interrupted")
    note = tmp_path / "note"
    command = f"trap 'echo tidy > {note}; exit' TERM; echo $$ > {reports.path}; while :; do sleep 0.01; done"
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(run(command, clock))
        await reports.next()
        task.cancel()
    assert note.read_text() == "tidy\n"


def children_named(name: str) -> list[int]:
    """Our own children, zombies included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, command, _, parent = stat.read_text().split()[:4]
            if (command, parent) == (f"({name})", str(os.getpid())):
                found.append(int(number))
    return found


@pytest.mark.parametrize("turns", range(4))
async def test_cancelled_at_the_very_start(clock, turns, expect_log):
    """Even while the shell is being started it is not forgotten."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(run("exec sleep 1000", clock))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()
    if turns:
        expect_log("a command is interrupted; the last that it said: nothing")
    assert children_named("sleep") == []


async def test_many_at_once(clock):
    """They do not get into one another's way."""
    async with asyncio.TaskGroup() as tasks:
        runs = [
            tasks.create_task(run(f"cat; exit {n}", clock, stdin=bytes([n]) * n * 10_000, output_max=1 << 20))
            for n in range(20)
        ]
    for n, done in enumerate(runs):
        assert (done.result().status, done.result().output) == (n, bytes([n]) * n * 10_000)


async def test_a_shell_that_cannot_be_started(clock):
    """The kernel's own words; and nothing is left behind."""
    files = set(os.listdir("/proc/self/fd"))
    with pytest.raises(UnavailableError, match="/bin/sh cannot be started: Argument list too long"):
        await run_shell("true", {"BIG": "x" * (1 << 20)}, clock)
    assert set(os.listdir("/proc/self/fd")) == files
