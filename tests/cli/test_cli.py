"""The command as a user meets it: help, errors with hints and exit codes, and every command on a running daemon."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec
import pytest

from silo.clock import SystemClock
from silo.exports.nbd_client import NbdClient
from tests.support.daemons import Daemon

MIB = 1 << 20
SIZE = 4 * MIB
COMMANDS = (
    "serve",
    "status",
    "heat",
    "migrate",
    "sync",
    "restore",
    "verify",
    "fork",
    "delete",
    "gc",
    "cost",
    "import",
    "demo",
    "certs",
)
TIMEOUT_S = 40.0
"""Many times what the slowest of them takes on a busy machine."""


async def silo(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command; exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "silo", *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
    )  # fmt: skip
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return process.returncode or 0, out.decode(), err.decode()


async def test_help_names_every_command_and_each_has_its_own() -> None:
    """And nothing needs more than this to be found."""
    code, out, _ = await silo("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out
    for command in COMMANDS:
        code, out, err = await silo(command, "--help")
        assert code == 0, err
        assert "Usage: " in out
        assert "--json" in out or "Commands" in out, "or it is a family of commands"


async def test_the_version_is_printed() -> None:
    """One line."""
    code, out, _ = await silo("--version")
    assert code == 0
    assert out.startswith("silo ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stat = 'x'", "there is no setting `stat`"),
        ("[sync]\ninterval = '5 bananas'", "bananas"),
        ("[sync]\ninterval = '0s'", "positive"),
        ("[groups.vm1.volumes.disk]\npath = 'x'\nsize = '8Q'", "8Q"),
        ("[groups.vm1.volumes.disk]\npath = 'x'\nchunk_size = '5000'", "power of two"),
        ("[groups.'../vm1'.volumes.disk]\npath = 'x'", "cannot name a group"),
        ("peer = 'tcp:0.0.0.0:5170'", "insecure_peer"),
        ("listen = 'carrier pigeon'", "tcp:HOST:PORT"),
        ("state = [", "not valid TOML"),
    ],
)
async def test_a_wrong_config_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    """Exit code 1, the file, what is wrong in it, and no traceback."""
    path = tmp_path / "silo.toml"
    path.write_text(text)
    code, out, err = await silo("serve", path)
    assert code == 1
    assert str(path) in err
    assert expected in err
    assert "Traceback" not in out + err


async def test_errors_are_shown_whatever_they_hold(tmp_path: Path) -> None:
    """A path with brackets is no markup, and with ``--json`` the error is one object."""
    path = tmp_path / "[/red]" / "silo[bold].toml"
    code, _, err = await silo("serve", path)
    assert code == 1
    assert str(path) in err
    code, out, err = await silo("serve", path, "--json")
    assert code == 1
    error = msgspec.json.decode(out)["error"]
    assert error["kind"] == "InvalidRequestError"
    assert str(path) in error["message"]
    assert not err


async def test_without_a_daemon_commands_say_so(tmp_path: Path) -> None:
    """And hint at the state directory."""
    for command in (("status",), ("heat", "vm1"), ("sync", "vm1"), ("migrate", "vm1", "--to", "unix:/x")):
        code, _, err = await silo(*command, "--state", tmp_path)
        assert code == 1
        assert "no daemon answers" in err
        assert "--state" in err


@pytest.mark.slow
async def test_every_command_on_a_running_daemon(tmp_path: Path) -> None:
    """Status, heat as picture and file, sync, restore; unknown groups and volumes; a second daemon; an orderly end."""
    content = SystemClock().token(MIB)
    store = f"file://{tmp_path}/store"
    daemon = Daemon(
        tmp_path / "a", "--group", "vm1", "--volume", f"disk={tmp_path}/disk.img,size=4M",
        "--volume", f"swap={tmp_path}/swap.img,size=1M,chunk_size=16K",
        "--listen", f"unix:{tmp_path}/a.sock", "--store", store, "--sync-interval", "1h",
    )  # fmt: skip
    async with daemon:
        async with await NbdClient.connect(f"nbd+unix:///vm1/disk?socket={tmp_path}/a.sock") as guest:
            await guest.write(MIB, content)
            await guest.read(MIB, 4096)
        state = ("--state", daemon.state)

        code, out, _ = await silo("status", *state)
        assert code == 0
        assert "vm1: running" in out
        assert "nbd+unix:///vm1/disk" in out
        code, out, _ = await silo("status", *state, "--json")
        assert msgspec.json.decode(out)["groups"][0]["exposed_bytes"] >= MIB

        code, out, _ = await silo("sync", "vm1", *state, "--json")
        assert msgspec.json.decode(out) == {"generation": 1}
        code, out, err = await silo("sync", "vm2", *state)
        assert code == 1
        assert "known groups: vm1" in err

        code, out, _ = await silo("heat", "vm1", *state)
        assert code == 0
        assert "▀" in out
        code, out, _ = await silo("heat", "vm1", "--png", tmp_path / "heat.png", *state)
        assert code == 0
        for volume in ("disk", "swap"):
            picture = (tmp_path / f"heat-{volume}.png").read_bytes()
            assert picture.startswith(b"\x89PNG\r\n\x1a\n")
            assert picture.endswith(b"IEND\xaeB`\x82")

        code, _, err = await silo("serve", *state)
        assert code == 1
        assert "Traceback" not in err
    await restore_all_ways(tmp_path, store, content)


async def restore_all_ways(tmp_path: Path, store: str, content: bytes) -> None:
    """Into a new file; not over an existing one; not what does not exist, leaving nothing behind."""
    common = ("--store", store, "--volume")
    copy = tmp_path / "copy.img"
    code, out, err = await silo("restore", "vm1", *common, "disk", "--to", copy, "--json")
    assert code == 0, err
    assert msgspec.json.decode(out)["generation"] == 1
    assert copy.read_bytes() == bytes(MIB) + content + bytes(2 * MIB)
    code, _, err = await silo("restore", "vm1", *common, "disk", "--to", copy)
    assert code == 1
    assert "exists already" in err
    for group, volume in (("vm1", "disc"), ("vm2", "disk"), ("../vm1", "disk")):
        code, out, err = await silo("restore", group, *common, volume, "--to", tmp_path / "none.img")
        assert code == 1
        assert "error:" in err
        assert "Traceback" not in err
        assert not (tmp_path / "none.img").exists()


async def test_sigterm_ends_a_daemon_with_zero(tmp_path: Path) -> None:
    """After what was written last has been stored."""
    daemon = Daemon(
        tmp_path / "a", "--group", "vm1", "--volume", f"disk={tmp_path}/disk.img,size=4M",
        "--listen", f"unix:{tmp_path}/a.sock", "--store", f"file://{tmp_path}/store", "--sync-interval", "1h",
    )  # fmt: skip
    async with daemon:
        async with await NbdClient.connect(f"unix:{tmp_path}/a.sock") as guest:
            await guest.write(0, b"last words")
        assert await daemon.stop() == 0
        assert not daemon.log
    copy = tmp_path / "copy.img"
    code, _, err = await silo(
        "restore", "vm1", "--store", f"file://{tmp_path}/store", "--volume", "disk", "--to", copy
    )
    assert code == 0, err
    assert copy.read_bytes().startswith(b"last words")
