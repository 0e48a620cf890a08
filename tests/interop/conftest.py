"""An NBD server of ours in a process of its own, for programs of other projects to talk to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.nbd import NbdServerProcess

EXPORT_SIZE = 64 << 20

StartServer = Callable[..., NbdServerProcess]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NbdServerProcess]:
    """A writable export in memory, the same one for a whole module: tests write what they read."""
    with NbdServerProcess(tmp_path_factory.mktemp("nbd"), "--memory", str(EXPORT_SIZE)) as server:
        yield server
        server.check()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start more servers, with the options of ``benchmarks.nbd.serve_silo``; they are stopped at the end."""
    started: list[NbdServerProcess] = []

    def start(*options: str, tcp: bool = False) -> NbdServerProcess:
        directory = tmp_path / f"server{len(started)}"
        directory.mkdir()
        started.append(NbdServerProcess(directory, *options, tcp=tcp))
        return started[-1]

    yield start
    for server in started:
        server.stop()
