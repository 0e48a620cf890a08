"""The checks of `silo.testing.check_store` in which several callers act at the same time, or one stops half-way.

Each outcome is judged by asking which orders of the calls could have led to it; the sentence that a function
checks is its docstring. A racer may be told `UnavailableError` (real servers do that to losers, as 409 or 500): it
then finds out what became of its write as any caller must, by looking and by trying the same again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from silo.abc import Buffer, ObjectStore
from silo.errors import ClosedError, UnavailableError
from silo.testing.store_bench import Bench, body_of, data, expect, expect_bytes, listed, raises

__all__ = ["CONCURRENT_CHECKS"]

T = TypeVar("T")

_CANCELLATIONS = 8
_ATTEMPTS = 20


async def _check_big(bench: Bench) -> None:
    """Big objects are written and read like small ones, several at a time."""
    bodies = [data(bench.big + index, f"big {index}") for index in range(3)]
    keys = [f"{bench.prefix}{index}" for index in range(3)]
    async with asyncio.TaskGroup() as group:
        for key, body in zip(keys, bodies, strict=True):
            parts: list[Buffer] = [body[: len(body) // 3], memoryview(body)[len(body) // 3 :]]
            group.create_task(_call(partial(bench.store.put_if, key, parts, match=None)))
    for key, body in zip(keys, bodies, strict=True):
        expect_bytes(await body_of(bench.other, key), body, "the whole of a big object")
        half = len(body) // 2
        found = await bench.other.get(key, start=half, length=len(body) - half - 1)
        expect(found is not None and bytes(found.data) == body[half:-1], "the second half of a big object")
        info = await bench.other.head(key)
        expect(info is not None and info.size == len(body), f"head says {info}")


async def _check_race_to_create(bench: Bench) -> None:
    """Of many writers that create an object at the same time exactly one wins, and the object is its."""
    for number in range(bench.rounds):
        key = f"{bench.prefix}{number}"
        size = 100_000 if number % 2 else 50
        bodies = [data(size, f"writer {index}") for index in range(len(bench.stores))]
        racers = [
            partial(_create, store, key, body) for store, body in zip(bench.stores, bodies, strict=True)
        ]
        winners = [body for body, won in zip(bodies, await _together(racers), strict=True) if won]
        expect(len(winners) == 1, f"{len(winners)} of {len(bodies)} writers created one object")
        expect_bytes(await body_of(bench.other, key), winners[0], "the winner's object")


async def _check_race_to_replace(bench: Bench) -> None:
    """Of many writers that replace one version exactly one wins: a log to which all append loses no entry."""
    key = f"{bench.prefix}log"
    await bench.store.put(key, [b"begin"])
    entries = [[f"{writer}.{step}" for step in range(bench.rounds)] for writer in range(len(bench.stores))]
    racers = zip(bench.stores, entries, strict=True)
    await _together([partial(_append, store, key, own) for store, own in racers])
    found = bytes(await body_of(bench.other, key)).decode().split()
    expected = ["begin", *(entry for own in entries for entry in own)]
    expect(sorted(found) == sorted(expected), f"{len(expected)} entries were written, {len(found)} are there")
    for own in entries:
        expect(
            [entry for entry in found if entry in own] == own, "the entries of one writer are out of order"
        )


async def _check_delete_against_replace(bench: Bench) -> None:
    """``put_if`` is atomic against ``delete``: whichever comes first, the object is gone in the end."""
    for number in range(bench.rounds):
        key = f"{bench.prefix}{number}"
        old = await bench.store.put(key, [b"old"])
        racers: list[Callable[[], Awaitable[Any]]] = [
            partial(bench.store.put_if, key, [b"swapped"], match=old),
            partial(bench.other.delete, [key]),
        ]
        await _together([partial(_persist, racer) for racer in racers])
        expect(await bench.store.get(key) is None, "a deleted object came back through a compare-and-swap")


async def _check_readers_see_whole_objects(bench: Bench) -> None:
    """A reader sees one version of an object and its ETag, never a mixture, while writers replace it."""
    key, size = f"{bench.prefix}object", 200_000
    bodies = [data(size + index, f"version {index}") for index in range(3)]
    etags = {await bench.store.put(key, [body]): body for body in bodies}
    done = asyncio.Event()

    async def write() -> None:
        for number in range(4 * bench.rounds):
            await _persist(partial(bench.store.put, key, [bodies[number % 3]]))
        done.set()

    async def read() -> None:
        while not done.is_set():
            found = await _persist(partial(bench.other.get, key, start=1000, length=150_000))
            expect(found is not None, "an object was absent while it was replaced")
            if found is not None:
                whole = [body for body in bodies if len(body) == found.size]
                expect(bool(whole) and bytes(found.data) == whole[0][1000:151_000], "a torn object was read")
                expect(
                    etags.get(found.etag, whole[0]) == whole[0], "an ETag came with another version's content"
                )

    await _together([write, read, read])


async def _check_cancelled_put(bench: Bench) -> None:
    """A put that is cancelled writes all of its object or nothing of it, and the store goes on as before."""
    body = data(bench.big, "cancelled")
    for after_turns in range(_CANCELLATIONS):
        key = f"{bench.prefix}{after_turns}"
        async with asyncio.TaskGroup() as group:
            put = partial(bench.store.put_if, key, [body[:1000], body[1000:]], match=None)
            task = group.create_task(_call(put))
            for _ in range(after_turns + 1):
                await asyncio.sleep(0)
            task.cancel()
        found = await bench.other.get(key)
        expect(
            found is None or bytes(found.data) == body,
            f"half an object after {after_turns} turns of the loop",
        )
        sizes = {info.size for info in await listed(bench.other, key) if info.key == key}
        expect(sizes <= {len(body)}, f"the listing shows {sizes}")
        await bench.store.put(f"{key}-after", [b"after"])
        expect_bytes(await body_of(bench.store, f"{key}-after"), b"after", "written after a cancelled put")


async def _check_closed(bench: Bench) -> None:
    """``aclose`` may be called twice, and every other call after it raises `ClosedError`."""
    store, key = bench.store, f"{bench.prefix}object"
    await store.put(key, [b"x"])
    await store.aclose()
    await store.aclose()
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "put": lambda: store.put(key, [b"y"]),
        "put_if": lambda: store.put_if(key, [b"y"], match=None),
        "get": lambda: store.get(key),
        "head": lambda: store.head(key),
        "delete": lambda: store.delete([key]),
        "list": lambda: listed(store, bench.prefix),
    }
    for name, call in calls.items():
        with raises(ClosedError, f"{name} after aclose"):
            await call()
    expect_bytes(await body_of(bench.other, key), b"x", "read through a handle that is still open")


CONCURRENT_CHECKS = (
    _check_big,
    _check_race_to_create,
    _check_race_to_replace,
    _check_delete_against_replace,
    _check_readers_see_whole_objects,
    _check_cancelled_put,
    _check_closed,
)


async def _call(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call inside the task that runs this, so that a task cancelled before it began leaves no coroutine."""
    return await call()


async def _together(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Make all calls at the same time; their results in order."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_call(call)) for call in calls]
    return [task.result() for task in tasks]


async def _persist(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call again until its outcome is known."""
    for _ in range(_ATTEMPTS):
        try:
            return await call()
        except UnavailableError as error:
            unavailable = error
    raise unavailable


async def _create(store: ObjectStore, key: str, body: bytes) -> bool:
    """Create an object whose body nobody else writes; whether it was us who did."""
    created = await _persist(partial(store.put_if, key, [body], match=None))
    # An attempt without answer may have been the one that won.
    return created is not None or bytes(await body_of(store, key)) == body


async def _append(store: ObjectStore, key: str, entries: Sequence[str]) -> None:
    """Append entries to a log, one compare-and-swap each; whoever was slower looks again."""
    for entry in entries:
        while True:
            found = await store.get(key)
            expect(found is not None, "the log is gone")
            if found is None or entry in bytes(found.data).decode().split():
                break
            longer = bytes(found.data) + f" {entry}".encode()
            if await _persist(partial(store.put_if, key, [longer], match=found.etag)) is not None:
                break
