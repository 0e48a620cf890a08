"""The document on VM managers and the example for QEMU: what can be checked of them without a machine."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest

from silo.config import load_config
from silo.hooks.inprocess import HOOKS
from tests.support.source import ROOT

DOCUMENT = (ROOT / "docs" / "vm-managers.md").read_text()
EXAMPLE = ROOT / "examples" / "qemu"


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL))
def test_every_configuration_is_one(block, tmp_path):
    """Each can be copied into a file and is understood."""
    path = tmp_path / "silo.toml"
    path.write_text(block)
    assert set(load_config(path).workload.commands) >= {"suspend", "unsuspend", "resume"}


def test_every_hook_is_explained():
    """In the table of the hooks."""
    table = DOCUMENT.partition("## The hooks")[2].partition("\n## ")[0]
    assert [hook for hook in HOOKS if f"| `{hook}` |" not in table] == []


def test_every_script_is_one():
    """At least a shell can read them."""
    scripts = [*re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL), (EXAMPLE / "hook").read_text()]
    for script in scripts:
        result = subprocess.run(["/bin/sh", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")


@attrs.define
class Monitor:
    """QEMU's side of QMP: answers commands from a script, with whatever else it says before and after."""

    script: dict[str, Sequence[object]]
    heard: list[str] = attrs.field(factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"QMP": {"version": {}, "capabilities": []}}\n')
        while line := await reader.readline():
            self.heard.append(json.loads(line)["execute"])
            for message in self.script.get(self.heard[-1], [{"return": {}}]):
                writer.write(json.dumps(message).encode() + b"\n")
        writer.close()

    async def play(self, directory: Path, *steps: str) -> tuple[int, str]:
        """The exit status and the complaint of ``qmp.py`` with these steps."""
        path = directory / "monitor"
        async with await asyncio.start_unix_server(self.serve, path):
            process = await asyncio.create_subprocess_exec(
                sys.executable, EXAMPLE / "qmp.py", path, *steps, stderr=subprocess.PIPE
            )
            _, complaint = await process.communicate()
        return process.returncode, complaint.decode().strip()


def event(status: str) -> dict[str, object]:
    return {"event": "MIGRATION", "data": {"status": status}}


STOP = '{"execute": "stop"}'
MIGRATE = '{"execute": "migrate"}'


async def test_commands_in_their_order(tmp_path):
    """Each waits for the answer to the one before; events in between are no answers."""
    monitor = Monitor({"stop": [{"event": "STOP"}, {"return": {}}]})
    assert await monitor.play(tmp_path, STOP, MIGRATE) == (0, "")
    assert monitor.heard == ["qmp_capabilities", "stop", "migrate"]


async def test_a_command_that_fails(tmp_path):
    """The rest is not tried."""
    monitor = Monitor({"stop": [{"error": {"class": "GenericError", "desc": "not now"}}]})
    assert await monitor.play(tmp_path, STOP, MIGRATE) == (1, "stop: not now")
    assert monitor.heard == ["qmp_capabilities", "stop"]


@pytest.mark.parametrize("before", [0, 1, 2, 3])
async def test_waiting_for_a_status(tmp_path, before):
    """It may be reached before the command is answered, or after."""
    events = [event("setup"), event("active"), event("pre-switchover")]
    monitor = Monitor({"migrate": [*events[:before], {"return": {}}, *events[before:]]})
    assert await monitor.play(tmp_path, MIGRATE, "@pre-switchover", STOP) == (0, "")
    assert monitor.heard[-1] == "stop"


async def test_a_status_that_will_never_come(tmp_path):
    """Failed is failed."""
    monitor = Monitor({"migrate": [{"return": {}}, event("active"), event("failed")]})
    complaint = "the migration of the memory is failed, not pre-switchover"
    assert await monitor.play(tmp_path, MIGRATE, "@pre-switchover", STOP) == (1, complaint)


@pytest.mark.parametrize("end", [{}, {"status": "cancelled"}, {"status": "completed"}])
async def test_waiting_for_the_end(tmp_path, end):
    """A cancelled migration goes on for a moment, in which the machine cannot be continued."""
    states = iter([{"status": "active"}, {"status": "cancelling"}, end])

    class Ending(Monitor):
        async def serve(self, reader, writer):
            writer.write(b'{"QMP": {}}\n')
            while line := await reader.readline():
                self.heard.append(json.loads(line)["execute"])
                answer = next(states) if self.heard[-1] == "query-migrate" else {}
                writer.write(json.dumps({"return": answer}).encode() + b"\n")
            writer.close()

    monitor = Ending({})
    assert await monitor.play(tmp_path, "@over", STOP) == (0, "")
    assert monitor.heard == ["qmp_capabilities", *["query-migrate"] * 3, "stop"]


async def test_nobody_is_there(tmp_path):
    """A hook must not take silence for success."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, EXAMPLE / "qmp.py", tmp_path / "nowhere", STOP, stderr=subprocess.PIPE
    )
    _, complaint = await process.communicate()
    assert process.returncode == 1
    assert b"FileNotFoundError" in complaint
