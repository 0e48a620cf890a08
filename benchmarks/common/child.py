"""Servers as child processes that are reachable from the first moment, and their CPU time.

A server that opens its own socket has to be polled until it answers. Here the parent binds and listens, and the
child inherits the listening socket the way that socket activation does it (``LISTEN_FDS``, descriptor 3), which
nbdkit, qemu-nbd and our own scripts understand: a client that connects before the child has even started
merely waits in the backlog. A TCP port is chosen by the kernel, so that nothing collides.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from silo.errors import UnavailableError

__all__ = ["ListeningChild", "cpu_seconds", "listen_tcp", "listen_unix", "resident_bytes"]

_STOP_TIMEOUT_S = 20.0
_BACKLOG = 128


def listen_unix(path: Path) -> socket.socket:
    """A listening Unix socket at ``path``, which must not exist."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(_BACKLOG)
    return listener


def listen_tcp() -> socket.socket:
    """A listening socket on a free port of the loopback interface."""
    return socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)


class ListeningChild:
    """A server process that owns an inherited listening socket. A context manager: leaving it stops the child.

    ``stderr`` of the child goes to a file, whose end is part of the error when the child died by itself.
    """

    def __init__(self, argv: Sequence[str], listener: socket.socket, log: Path) -> None:
        self.address = listener.getsockname()
        self._log = log
        with listener, log.open("ab") as output:
            self.process = subprocess.Popen(
                _activated(argv, listener.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(listener.fileno(),),
            )

    @property
    def pid(self) -> int:
        """The server's process number; the shell has become the server."""
        return self.process.pid

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export of this child."""
        if isinstance(self.address, tuple):
            host, port = self.address
            return f"nbd://{host}:{port}/{export}"
        return f"nbd+unix:///{export}?socket={self.address}"

    def check(self) -> None:
        """Raise `UnavailableError` when the child has ended."""
        if self.process.poll() is not None:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise UnavailableError(f"the server ended with status {self.process.returncode}: {tail}")

    def kill(self) -> None:
        """``kill -9``, and wait until the child is gone."""
        self.process.kill()
        self.process.wait(_STOP_TIMEOUT_S)

    def stop(self) -> int:
        """Ask the child to end, force it when it does not, and return its status. May be called twice."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _activated(argv: Sequence[str], fd: int) -> list[str]:
    """A command line that gives a server its socket as descriptor 3.

    ``LISTEN_PID`` must be the number of the process that will read it; a shell knows it before turning into it.
    It is bash, because other shells copy no descriptors with more than one digit.
    """
    return ["bash", "-c", f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{fd}', "bash", *argv]


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far in all of its threads, user and kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM and its own, without pages of files and of tmpfs."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise UnavailableError(f"process {pid} has no memory any more")
