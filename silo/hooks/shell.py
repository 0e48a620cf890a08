"""One shell command, in a process group of its own, with nothing of it left when it was interrupted.

A command has *ended* when its shell has. Processes that it left running in the background are its own business
then: they live on, and what they say is not heard any more. (That is how a command starts a virtual machine. It
should redirect the machine's output: the pipe to here has no reader afterwards.)

An *interrupted* command, whose caller was cancelled or had enough, gets SIGTERM, all of its process group does,
and SIGKILL `GRACE_S` later or as soon as nobody holds its output open. The shell is reaped only after the last
signal, so that the group's number cannot have become somebody else's. A process that moved to another group
is out of reach, and so is one that belongs to another user or hangs in the kernel; that the shell itself would
not end is logged.

Waiting is done with a pidfd and with readiness of the pipes: no thread waits, no signal handler is needed, and
a grandchild that keeps a pipe open does not delay the end. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import subprocess
from collections.abc import Mapping
from typing import Final

import attrs

from silo.abc import Buffer, Clock
from silo.errors import CapacityError, InvariantError, UnavailableError
from silo.threads import run_to_completion

__all__ = ["GRACE_S", "ShellOutcome", "run_shell"]

log = logging.getLogger(__name__)

SHELL: Final = "/bin/sh"
GRACE_S: Final = 1.0
"""Between SIGTERM and SIGKILL."""
REAP_TIMEOUT_S: Final = 5.0
"""After SIGKILL. Whatever takes longer hangs in the kernel, perhaps on a disk that does not answer."""
WORDS_SIZE: Final = 1000
"""How much of what a command says is kept: the end tells why it failed."""
READ_SIZE: Final = 1 << 16
REST_READS: Final = 16
"""Enough, after the end, for what the largest pipe can hold; a process left behind could go on for ever."""


@attrs.frozen
class ShellOutcome:
    """What became of a command that ended by itself."""

    status: int
    """The exit status; negative when a signal ended it."""
    output: bytes
    """Standard output, if that was asked for."""
    words: str
    """The end of everything else that it wrote to standard output or error, for people."""

    @property
    def complaint(self) -> str:
        """How it failed, in words."""
        how = f"status {self.status}" if self.status >= 0 else signal.Signals(-self.status).name
        return f"its command ended with {how}" + (f": {self.words}" if self.words else "")


async def run_shell(
    command: str,
    env: Mapping[str, str],
    clock: Clock,
    *,
    stdin: Buffer | None = None,
    output_max: int | None = None,
) -> ShellOutcome:
    """Run ``/bin/sh -c command`` and wait for its end, for as long as it takes: the deadline is the caller's.

    ``env`` is the whole environment. ``stdin`` is all of its standard input, which is empty by default. With
    ``output_max``, standard output is kept, and one byte more than that is a `CapacityError`; without, it is
    joined to standard error. `UnavailableError` when no shell can be started. When this is cancelled or
    raises, the command's process group has been killed. Concurrent calls are allowed.
    """
    shell = _Shell(command, env, clock, stdin, output_max)
    try:
        await run_to_completion(None, shell.start)
        await shell.wait_ended()
    finally:
        await run_to_completion(None, shell.finish)
    return shell.outcome()


class _Shell:
    """The process. `start` and `finish` block and run in a thread, one after the other."""

    def __init__(
        self,
        command: str,
        env: Mapping[str, str],
        clock: Clock,
        stdin: Buffer | None,
        output_max: int | None,
    ) -> None:
        self._command = command
        self._env = env
        self._clock = clock
        self._stdin = stdin
        self._output_max = output_max
        self._output = bytearray()
        self._words = bytearray()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._ended = False

    def start(self) -> None:
        """Start it. Blocks until the shell is there, a few milliseconds."""
        stdin = subprocess.DEVNULL
        with contextlib.ExitStack() as files:
            try:
                if self._stdin is not None:
                    # A file in memory rather than a pipe: a command need not read it, and nobody has to feed it.
                    state = files.enter_context(open(os.memfd_create("silo-stdin"), "w+b"))
                    state.write(self._stdin)
                    state.seek(0)
                    stdin = state.fileno()
                self._process = subprocess.Popen(
                    (SHELL, "-c", self._command),
                    bufsize=0,
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT if self._output_max is None else subprocess.PIPE,
                    env=self._env,
                    start_new_session=True,
                )
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError as error:
                raise UnavailableError(f"{SHELL} cannot be started: {error.strerror}") from error
        for pipe in self._pipes():
            os.set_blocking(pipe, False)

    def _pipes(self) -> list[int]:
        process = self._process
        return [pipe.fileno() for pipe in (process.stdout, process.stderr) if pipe] if process else []

    async def wait_ended(self) -> None:
        """Hear what it says until its shell has ended. No deadline: see `run_shell`."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def hear(pipe: int) -> None:
            if not self._hear(pipe):
                loop.remove_reader(pipe)
            elif self._is_too_much():
                end()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        def has_ended() -> None:
            self._ended = True
            end()

        try:
            for pipe in self._pipes():
                loop.add_reader(pipe, hear, pipe)
            loop.add_reader(self._pidfd, has_ended)
            await ended
        finally:
            for file in (*self._pipes(), self._pidfd):
                loop.remove_reader(file)
        for pipe in self._pipes():
            for _ in range(REST_READS):
                if not self._hear(pipe):
                    break
        if self._is_too_much():
            raise CapacityError(f"its command put out more than {self._output_max} bytes")

    def _hear(self, pipe: int) -> bool:
        """Take what is there now. False when there will be no more."""
        try:
            data = os.read(pipe, READ_SIZE)
        except BlockingIOError:
            return True
        if self._output_max is not None and pipe == self._pipes()[0]:
            self._output += data
        else:
            self._words += data
            del self._words[:-WORDS_SIZE]
        return bool(data)

    def _is_too_much(self) -> bool:
        return self._output_max is not None and len(self._output) > self._output_max

    def finish(self) -> None:
        """Leave nothing behind. Blocks for no time when it has ended, else for little more than `GRACE_S`."""
        process = self._process
        if process is None:
            return
        try:
            if not self._ended:
                self._kill(process.pid)
            process.wait(timeout=REAP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.error("process %d does not end, though it was killed; it is left alone", process.pid)
        finally:
            for file in (process.stdout, process.stderr):
                if file is not None:
                    file.close()
            if self._pidfd >= 0:
                os.close(self._pidfd)

    def _kill(self, group: int) -> None:
        """Signal everybody, and wait a little in between."""
        for pipe in self._pipes():
            self._hear(pipe)
        log.warning("a command is interrupted; the last that it said: %s", self._last_words() or "nothing")
        _signal(group, signal.SIGTERM)
        waiting = select.poll()
        waiting.register(self._pidfd, select.POLLIN)
        for pipe in self._pipes():
            waiting.register(pipe, 0)  # reports only that the last writer is gone
        left = {self._pidfd, *self._pipes()}
        until = self._clock.monotonic() + GRACE_S
        while left and (left_s := until - self._clock.monotonic()) > 0:
            for file, _ in waiting.poll(left_s * 1e3):
                waiting.unregister(file)
                left.discard(file)
        _signal(group, signal.SIGKILL)

    def outcome(self) -> ShellOutcome:
        """What became of it, after `finish`."""
        process = self._process
        if process is None or process.returncode is None:
            raise InvariantError("a command was asked how it ended before it did")
        return ShellOutcome(process.returncode, bytes(self._output), self._last_words())

    def _last_words(self) -> str:
        return self._words.decode(errors="replace").strip()


def _signal(group: int, number: signal.Signals) -> None:
    """Signal a process group. One that is gone already, or belongs to another user, is not our business."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
