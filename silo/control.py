"""The control socket: how commands talk to a running daemon.

A Unix stream socket at ``<state-dir>/control.sock``, mode 0600, speaking JSON lines. A request is one line::

    {"version": 1, "id": 1, "verb": "migrate", "args": {"group": "vm1", "to": "tcp:hostb:5170"}}

The answer is any number of event lines and exactly one closing line, all with the request's id::

    {"id": 1, "event": {...}}
    {"id": 1, "result": {...}}          or      {"id": 1, "error": {"kind": ..., "message": ..., "hint": ...}}

Several requests may be under way on one connection. When the connection closes its requests are cancelled; a
verb whose work must outlive its caller (a migration past the claim) shields itself.

A verb is an async generator function taking the arguments as keywords: what it yields are events, and a
`Result` ends it. REST can later map onto the same verbs.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_type_hints

import attrs
import msgspec

from silo import errors
from silo.errors import InvalidRequestError, RemoteProtocolError, SiloError, UnavailableError

__all__ = ["VERSION", "ControlClient", "ControlServer", "Result", "Verb"]

VERSION = 1

LINE_MAX = 1 << 20
"""A status of thousands of volumes fits; a runaway client does not."""

REQUESTS_MAX = 64
"""Requests under way per connection."""


@attrs.frozen
class Result:
    """Yielded last by a verb: the value of the closing line."""

    value: Any


Verb = Callable[..., AsyncIterator[Any]]


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """One line from a client."""

    version: int
    id: int
    verb: str
    args: dict[str, Any] = {}


def _error_line(error: SiloError) -> dict[str, str]:
    return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


class ControlServer:
    """Serves verbs on a socket. Use as ``async with ControlServer(path, verbs):``."""

    def __init__(self, path: Path, verbs: Mapping[str, Verb]) -> None:
        self._path = path
        self._verbs = verbs
        self._listener: socket.socket
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = _bind(self._path)
        await self._group.__aenter__()
        self._start(self._accept())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)
        finally:
            self._listener.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            self._start(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=LINE_MAX)
        try:
            async with asyncio.TaskGroup() as group:
                requests: list[asyncio.Task[None]] = []
                try:
                    await self._listen(reader, writer, group, requests)
                finally:
                    for request in requests:
                        request.cancel()
        except* (ConnectionError, ValueError):
            writer.transport.abort()  # it broke the connection or the rules; only it suffers
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _listen(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        group: asyncio.TaskGroup,
        requests: list[asyncio.Task[None]],
    ) -> None:
        """Start what is asked for until the client goes. No deadline: it may stay connected and silent."""
        slots = asyncio.Semaphore(REQUESTS_MAX)
        while line := await reader.readline():
            try:
                request = msgspec.json.decode(line, type=Request)
            except msgspec.MsgspecError as error:
                await _send(writer, {"id": 0, "error": _error_line(RemoteProtocolError(str(error)))})
                return
            await slots.acquire()
            requests[:] = [task for task in requests if not task.done()]
            requests.append(group.create_task(self._answer(request, writer, slots)))

    async def _answer(self, request: Request, writer: asyncio.StreamWriter, slots: asyncio.Semaphore) -> None:
        try:
            async with contextlib.aclosing(self._run(request)) as lines:
                async for line in lines:
                    if isinstance(line, Result):
                        await _send(writer, {"id": request.id, "result": line.value})
                        return
                    await _send(writer, {"id": request.id, "event": line})
            await _send(writer, {"id": request.id, "result": None})
        except SiloError as error:
            await _send(writer, {"id": request.id, "error": _error_line(error)})
        finally:
            slots.release()

    def _run(self, request: Request) -> Any:
        if request.version != VERSION:
            raise RemoteProtocolError(
                f"the daemon speaks control version {VERSION}, the command {request.version}",
                hint="use the silo command of the same release as the daemon",
            )
        if (verb := self._verbs.get(request.verb)) is None:
            raise InvalidRequestError(f"the daemon does not know {request.verb!r}")
        try:
            inspect.signature(verb).bind(**request.args)
            hints = get_type_hints(verb if inspect.isroutine(verb) else type(verb).__call__)
            args = {
                name: msgspec.convert(value, hints.get(name, Any)) for name, value in request.args.items()
            }
        except (TypeError, msgspec.ValidationError) as error:
            raise InvalidRequestError(f"{request.verb}: {error}") from error
        return verb(**args)


async def _send(writer: asyncio.StreamWriter, line: Mapping[str, Any]) -> None:
    writer.write(msgspec.json.encode(line) + b"\n")
    await writer.drain()


def _bind(path: Path) -> socket.socket:
    """A listening socket. One that a dead daemon left is replaced, one that answers is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))  # locally this never blocks
        except OSError:
            path.unlink(missing_ok=True)
        else:
            raise InvalidRequestError(f"a daemon already serves {path}", hint="use another --state directory")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)  # the socket must never exist with a wider mode
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise UnavailableError(f"cannot listen at {path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    listener.listen(16)
    return listener


class ControlClient:
    """One connection to a daemon. ``async with ControlClient(path) as daemon: await daemon.call("status")``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._id = 0

    async def __aenter__(self) -> Self:
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(self._path, limit=LINE_MAX)
        except OSError as error:
            raise UnavailableError(
                f"no daemon answers at {self._path}",
                hint="is `silo serve` running with this --state directory?",
            ) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def stream(self, verb: str, **args: Any) -> AsyncIterator[Any]:
        """Events as they come, then one `Result`. One call at a time per client. Raises the daemon's error."""
        self._id += 1
        request = {"version": VERSION, "id": self._id, "verb": verb, "args": args}
        await _send(self._writer, request)
        while line := await self._reader.readline():
            answer = msgspec.json.decode(line)
            if "event" in answer:
                yield answer["event"]
            elif "error" in answer:
                raise _rebuild(answer["error"])
            else:
                yield Result(answer.get("result"))
                return
        raise UnavailableError("the daemon went away before it answered")

    async def call(self, verb: str, **args: Any) -> Any:
        """The value of the closing line; events are dropped."""
        async for line in self.stream(verb, **args):
            if isinstance(line, Result):
                return line.value
        raise UnavailableError("the daemon went away before it answered")


def _rebuild(error: Mapping[str, str]) -> SiloError:
    kind = getattr(errors, error["kind"], None)
    known = kind if isinstance(kind, type) and issubclass(kind, SiloError) else SiloError
    return known(error["message"], hint=error.get("hint", ""))
