"""The contract of `silo.abc.Transport`, executable.

::

    await check_transport(PlainTransport(), "unix:/tmp/check.sock")

Every function below that is called ``_check_...`` holds a transport to one sentence of the contract, which is its
docstring. It depends on no test framework: a breach raises ``AssertionError`` with what was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import blake3

from silo.abc import Buffer, Connection, Listener, Transport
from silo.errors import ClosedError, InvalidRequestError, UnavailableError

__all__ = ["check_transport"]

_LARGE = 8 << 20
"""More than any buffer between the two ends holds, so that a sender has to wait."""
_PATIENCE_S = 20.0


async def check_transport(transport: Transport, url: str, *, dialler: Transport | None = None) -> None:
    """Raise ``AssertionError`` when the transport breaks the contract. ``url`` must be free to listen on.

    ``dialler`` connects, when that takes another transport than listening does (another host, another key).
    """
    checks: list[Callable[[Transport, Transport, str], Awaitable[None]]] = [
        _check_nobody,
        _check_url,
        _check_bytes_arrive_in_order,
        _check_both_directions_at_once,
        _check_gathering,
        _check_end,
        _check_close_wakes_receiver,
        _check_close_wakes_sender,
        _check_cancelled_receive,
        _check_closed,
        _check_listener_closed,
        _check_many,
        _check_in_use,
    ]
    for check in checks:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await check(transport, dialler or transport, url)
        except BaseException as error:
            error.add_note(f"{check.__name__}: {check.__doc__}")
            raise


# ------------------------------------------------------------------------------------------------- the checks


async def _check_nobody(transport: Transport, dialler: Transport, url: str) -> None:
    """Where nobody listens, connecting raises UnavailableError."""
    with _expected(UnavailableError):
        await dialler.connect(url)


async def _check_url(transport: Transport, dialler: Transport, url: str) -> None:
    """A listener's url can be connected to."""
    async with _listening(transport, url) as listener:
        connection = await dialler.connect(listener.url)
        accepted = await listener.accept()
        assert connection.peer, "the connection does not say who is at the other end"
        await connection.aclose()
        await accepted.aclose()


async def _check_bytes_arrive_in_order(transport: Transport, dialler: Transport, url: str) -> None:
    """What is sent arrives, all of it and in order, however much it is."""
    async with _pair(transport, dialler, url) as (here, there):
        content = _bytes(_LARGE)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(here.send([content]))
            received = await _receive(there, len(content))
        assert received == content, "the bytes that arrived are not those that were sent"


async def _check_both_directions_at_once(transport: Transport, dialler: Transport, url: str) -> None:
    """Both ends may send while the other does not receive yet; neither direction waits for the other."""
    async with _pair(transport, dialler, url) as (here, there):
        forth, back = _bytes(_LARGE, b"forth"), _bytes(_LARGE, b"back")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(here.send([forth]))
            tasks.create_task(there.send([back]))
            first = tasks.create_task(_receive(there, len(forth)))
            second = tasks.create_task(_receive(here, len(back)))
        assert first.result() == forth
        assert second.result() == back


async def _check_gathering(transport: Transport, dialler: Transport, url: str) -> None:
    """A send takes any number of buffers of any kind and length, none and empty ones included."""
    async with _pair(transport, dialler, url) as (here, there):
        content = _bytes(200_000)
        buffers: list[Buffer] = [b"", bytearray(content[:7]), memoryview(content)[7:1000], b""]
        buffers += [content[index : index + 97] for index in range(1000, len(content), 97)]
        async with asyncio.TaskGroup() as tasks:
            await here.send([])
            tasks.create_task(here.send(buffers))
            received = await _receive(there, len(content))
        assert received == content


async def _check_end(transport: Transport, dialler: Transport, url: str) -> None:
    """After the peer closed, what it had sent can still be received; then receive returns 0."""
    async with _pair(transport, dialler, url) as (here, there):
        await here.send([b"last words"])
        await here.aclose()
        assert await _receive(there, 10) == b"last words"
        assert await there.receive_into(memoryview(bytearray(1))) == 0
        assert await there.receive_into(memoryview(bytearray(1))) == 0, "the end is not a one-time event"


async def _check_close_wakes_receiver(transport: Transport, dialler: Transport, url: str) -> None:
    """aclose makes a pending receive raise ClosedError."""
    async with _pair(transport, dialler, url) as (here, _), asyncio.TaskGroup() as tasks:
        pending = tasks.create_task(_outcome(here.receive_into(memoryview(bytearray(1)))))
        await _let_run()
        await here.aclose()
        assert isinstance(await pending, ClosedError), f"the pending receive ended with {pending.result()!r}"


async def _check_close_wakes_sender(transport: Transport, dialler: Transport, url: str) -> None:
    """aclose makes a pending send raise ClosedError."""
    async with _pair(transport, dialler, url) as (here, _), asyncio.TaskGroup() as tasks:
        pending = tasks.create_task(_outcome(here.send([_bytes(_LARGE)])))
        await _let_run()
        await here.aclose()
        outcome = await pending
        assert isinstance(outcome, ClosedError | UnavailableError), f"the pending send ended with {outcome!r}"


async def _check_cancelled_receive(transport: Transport, dialler: Transport, url: str) -> None:
    """A cancelled receive has taken nothing from the stream."""
    async with _pair(transport, dialler, url) as (here, there):
        async with asyncio.TaskGroup() as tasks:
            pending = tasks.create_task(there.receive_into(memoryview(bytearray(4))))
            await _let_run()
            pending.cancel()
        await here.send([b"kept"])
        assert await _receive(there, 4) == b"kept"


async def _check_closed(transport: Transport, dialler: Transport, url: str) -> None:
    """aclose may be called twice; sending and receiving afterwards raise ClosedError."""
    async with _pair(transport, dialler, url) as (here, _):
        await here.aclose()
        await here.aclose()
        with _expected(ClosedError):
            await here.send([b"x"])
        with _expected(ClosedError):
            await here.receive_into(memoryview(bytearray(1)))


async def _check_listener_closed(transport: Transport, dialler: Transport, url: str) -> None:
    """A closed listener wakes its accept with ClosedError, frees the address, and leaves connections alone."""
    listener = await transport.listen(url)
    here = await dialler.connect(listener.url)
    there = await listener.accept()
    async with asyncio.TaskGroup() as tasks:
        pending = tasks.create_task(_outcome(listener.accept()))
        await _let_run()
        await listener.aclose()
        await listener.aclose()
        assert isinstance(await pending, ClosedError), f"the pending accept ended with {pending.result()!r}"
    with _expected(UnavailableError):
        await dialler.connect(listener.url)
    await here.send([b"still here"])
    assert await _receive(there, 10) == b"still here"
    await here.aclose()
    await there.aclose()
    await (await transport.listen(url)).aclose()


async def _check_many(transport: Transport, dialler: Transport, url: str) -> None:
    """Connections do not mix, and may be made before anybody accepts."""
    async with _listening(transport, url) as listener:
        ours = [await dialler.connect(listener.url) for _ in range(5)]
        for number, connection in enumerate(ours):
            await connection.send([bytes([number])])
        theirs = [await listener.accept() for _ in range(5)]
        seen = sorted([(await _receive(connection, 1))[0] for connection in theirs])
        assert seen == list(range(5))
        for connection in (*ours, *theirs):
            await connection.aclose()


async def _check_in_use(transport: Transport, dialler: Transport, url: str) -> None:
    """An address that somebody listens on is refused, and the first listener goes on."""
    async with _listening(transport, url) as listener:
        with _expected(InvalidRequestError):
            await transport.listen(listener.url)
        connection = await dialler.connect(listener.url)
        await (await listener.accept()).aclose()
        await connection.aclose()


# -------------------------------------------------------------------------------------------------- the tools


@contextlib.asynccontextmanager
async def _listening(transport: Transport, url: str) -> AsyncIterator[Listener]:
    listener = await transport.listen(url)
    try:
        yield listener
    finally:
        await listener.aclose()


@contextlib.asynccontextmanager
async def _pair(
    transport: Transport, dialler: Transport, url: str
) -> AsyncIterator[tuple[Connection, Connection]]:
    async with _listening(transport, url) as listener:
        here = await dialler.connect(listener.url)
        there = await listener.accept()
        try:
            yield here, there
        finally:
            await here.aclose()
            await there.aclose()


@contextlib.contextmanager
def _expected(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


async def _outcome(call: Awaitable[object]) -> object:
    try:
        return await call
    except (ClosedError, UnavailableError) as error:
        return error


async def _receive(connection: Connection, length: int) -> bytes:
    content = bytearray(length)
    view = memoryview(content)
    while len(view):
        count = await connection.receive_into(view)
        assert count, f"the stream ended {len(view)} bytes early"
        view = view[count:]
    return bytes(content)


async def _let_run() -> None:
    """Long enough for another task to reach its wait: nothing else is going on."""
    for _ in range(50):
        await asyncio.sleep(0)


def _bytes(length: int, key: bytes = b"") -> bytes:
    return blake3.blake3(b"check_transport" + key).digest(length)
