"""The control socket: verbs, events, errors, and clients that misbehave."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from silo.control import ControlClient, ControlServer, Result
from silo.errors import CapacityError, InvalidRequestError, RemoteProtocolError, UnavailableError


async def count(limit: int) -> AsyncIterator[Any]:
    for number in range(limit):
        yield {"number": number}
    yield Result("done")


async def fail() -> AsyncIterator[Any]:
    yield {"about": "to fail"}
    raise CapacityError("no room", hint="make some")


class Hanging:
    """A verb that never ends, and notices when it is cancelled."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    async def __call__(self) -> AsyncIterator[Any]:
        try:
            self.started.set()
            await asyncio.Event().wait()
            yield Result(None)
        finally:
            self.ended.set()


async def test_events_come_before_the_result(tmp_path: Path) -> None:
    """A stream gives every event in order and ends with the result; a call gives just that."""
    path = tmp_path / "control.sock"
    async with ControlServer(path, {"count": count}), ControlClient(path) as client:
        lines = [line async for line in client.stream("count", limit=2)]
        assert [{"number": 0}, {"number": 1}, Result("done")] == lines
        assert await client.call("count", limit=0) == "done"


async def test_an_error_crosses_with_its_class_and_hint(tmp_path: Path) -> None:
    """The client raises what the daemon raised, and the connection lives on."""
    path = tmp_path / "control.sock"
    async with ControlServer(path, {"fail": fail, "count": count}), ControlClient(path) as client:
        with pytest.raises(CapacityError) as caught:
            await client.call("fail")
        assert (caught.value.message, caught.value.hint) == ("no room", "make some")
        assert await client.call("count", limit=1) == "done"


async def test_unknown_verbs_and_wrong_arguments_are_errors(tmp_path: Path) -> None:
    """Neither ends the connection."""
    path = tmp_path / "control.sock"
    async with ControlServer(path, {"count": count}), ControlClient(path) as client:
        with pytest.raises(InvalidRequestError, match="dance"):
            await client.call("dance")
        with pytest.raises(InvalidRequestError, match="limit"):
            await client.call("count", speed=3)
        assert await client.call("count", limit=1) == "done"


async def test_only_the_owner_may_talk_to_it(tmp_path: Path) -> None:
    """The socket has mode 0600 and is gone afterwards."""
    path = tmp_path / "deep" / "control.sock"
    async with ControlServer(path, {}):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_a_dead_daemons_socket_is_replaced_and_a_live_one_respected(tmp_path: Path) -> None:
    """What answers is refused; what does not is removed."""
    path = tmp_path / "control.sock"
    path.touch()
    async with ControlServer(path, {"count": count}):
        with pytest.raises(InvalidRequestError, match="already"):
            async with ControlServer(path, {}):
                pass
        async with ControlClient(path) as client:
            assert await client.call("count", limit=0) == "done"


async def test_leaving_cancels_what_a_client_asked_for(tmp_path: Path) -> None:
    """A request does not outlive its connection, nor the server."""
    path = tmp_path / "control.sock"
    hanging = Hanging()
    async with ControlServer(path, {"hang": hanging}):
        async with ControlClient(path) as client:
            lines = client.stream("hang")
            async with asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(anext(lines))
                await hanging.started.wait()
                waiting.cancel()
        await hanging.ended.wait()
    assert hanging.ended.is_set()


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[]\n", b'{"version": 1}\n', b"\xff\xfe\n", b"x" * (2 << 20) + b"\n"]
)
async def test_garbage_hurts_only_its_own_connection(tmp_path: Path, line: bytes) -> None:
    """A client that sends garbage is told and dropped; another one is served."""
    path = tmp_path / "control.sock"
    async with ControlServer(path, {"count": count}), ControlClient(path) as client:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(line)
        try:
            assert b"error" in await reader.read()
        except ConnectionResetError:
            assert len(line) > 1 << 20  # it was cut off in the middle of a line
        writer.close()
        assert await client.call("count", limit=1) == "done"


async def test_another_version_is_refused_with_a_hint(tmp_path: Path) -> None:
    """A command of another release learns which one the daemon speaks."""
    path = tmp_path / "control.sock"
    async with ControlServer(path, {"count": count}):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"version": 99, "id": 7, "verb": "count", "args": {"limit": 0}}\n')
        answer = await reader.readline()
        assert RemoteProtocolError.__name__.encode() in answer
        assert b'"id":7' in answer
        writer.close()


async def test_no_daemon_is_said_plainly(tmp_path: Path) -> None:
    """The hint asks the right question."""
    with pytest.raises(UnavailableError, match="silo serve"):
        async with ControlClient(tmp_path / "control.sock"):
            pass
