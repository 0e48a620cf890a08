"""The servers that take turns: ours with and without maps, nbdkit, qemu-nbd; in memory and on a file.

Like is compared with like. In memory: ours on a `MemoryDevice`, nbdkit's memory plugin, and qemu-nbd (which has no
such thing) on a file in tmpfs. On a file: all three on a raw file in the same directory, through the page cache
(``--cache=writeback`` for qemu-nbd), where a flush is an fsync. Every server has written all of its bytes before
anything is measured, answers as many connections as fio opens, and gets its socket ready-made.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import attrs

from benchmarks.common.child import ListeningChild, listen_tcp, listen_unix

__all__ = ["CONTENDERS", "Contender", "Site"]


@attrs.frozen
class Site:
    """Where a contender may put its things, and how it is reached."""

    directory: Path
    """For sockets, logs, state."""
    disk: Path
    """A directory on a real file system, for the file contenders."""
    memory: Path
    """A directory in tmpfs."""
    transport: str
    """``unix`` or ``tcp``."""
    size: int

    def listener(self, name: str) -> socket.socket:
        """A fresh listening socket for a contender."""
        return listen_tcp() if self.transport == "tcp" else listen_unix(self.directory / f"{name}.sock")

    def image(self, name: str, *, on_disk: bool) -> Path:
        """A sparse file of the right size for a contender."""
        path = (self.disk if on_disk else self.memory) / f"{name}.img"
        with path.open("wb") as file:
            file.truncate(self.size)
        return path


@attrs.frozen
class Contender:
    """A server that can be started; ``medium`` says with which others it may be compared."""

    name: str
    medium: str
    """``memory`` or ``file``."""
    ours: bool
    command: Callable[[Site], list[str]]

    def start(self, site: Site) -> ListeningChild:
        """Start the server; the caller leaves the context to stop it."""
        return ListeningChild(
            self.command(site), site.listener(self.name), site.directory / f"{self.name}.log"
        )


def _silo(*options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.nbd.serve_silo", *options]


def _qemu_nbd(image: Path) -> list[str]:
    options = ["--persistent", "--shared=64", "--cache=writeback", "--discard=unmap"]
    return ["qemu-nbd", "--format=raw", *options, str(image)]


CONTENDERS = (
    Contender("silo-memory", "memory", True, lambda site: _silo("--memory", str(site.size))),
    Contender(
        "silo-memory-nomaps", "memory", True, lambda site: _silo("--memory", str(site.size), "--no-maps")
    ),
    Contender("nbdkit-memory", "memory", False, lambda site: ["nbdkit", "-f", "memory", str(site.size)]),
    Contender(
        "qemu-nbd-tmpfs", "memory", False, lambda site: _qemu_nbd(site.image("qemu-nbd-tmpfs", on_disk=False))
    ),
    Contender(
        "silo-file", "file", True, lambda site: _silo("--file", str(site.image("silo-file", on_disk=True)))
    ),
    Contender(
        "nbdkit-file",
        "file",
        False,
        lambda site: ["nbdkit", "-f", "file", str(site.image("nbdkit-file", on_disk=True))],
    ),
    Contender(
        "qemu-nbd-file", "file", False, lambda site: _qemu_nbd(site.image("qemu-nbd-file", on_disk=True))
    ),
)
