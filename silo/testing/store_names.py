"""The checks of `silo.testing.check_store` that are about keys: which there are, what lies beside what, listings."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from silo.errors import InvalidRequestError
from silo.testing.store_bench import Bench, body_of, empty, expect, expect_bytes, listed, raises

__all__ = ["NAME_CHECKS"]

_BAD_KEYS = (
    *("", "/", "/a", "a/", "a//b", ".", "..", "./a", "a/.", "a/../b", "a/..", "../a"),
    *("a b", "a\n", "a\0b", "caf\u00e9", "\N{SNOWMAN}", "a\\b", "a%2fb", "a?b", "a#b", "a~", "k" * 2000),
)
_BAD_PREFIXES = ("/", "/a", "a//", "../", "a/./", "caf\u00e9", "a b", "~")


async def _check_keys(bench: Bench) -> None:
    """What is not a key raises `InvalidRequestError` in every call; what is one works."""
    store = bench.store
    for key in _BAD_KEYS:
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "put": partial(store.put, key, [b"x"]),
            "put_if": partial(store.put_if, key, [b"x"], match=None),
            "get": partial(store.get, key),
            "head": partial(store.head, key),
            "delete": partial(store.delete, [key]),
        }
        for name, call in calls.items():
            with raises(InvalidRequestError, f"{name} of {key[:20]!r}"):
                await call()
    for prefix in _BAD_PREFIXES:
        with raises(InvalidRequestError, f"list of {prefix!r}"):
            await listed(store, prefix)
    for name in (".hidden", "..two", "end.", "-", "_", "a-b_c.D", "0/1/2/3/4/5", "k" * 200):
        key = bench.prefix + name
        await store.put(key, [key.encode()])
        expect_bytes(await body_of(store, key), key.encode(), name)


async def _check_delete(bench: Bench) -> None:
    """``delete`` removes exactly the objects that it names, whether they are there or not."""
    names = [f"{bench.prefix}{name}" for name in ("a", "b", "c", "d", "ab", "a.b")]
    for name in names:
        await bench.store.put(name, [b"x"])
    await bench.other.delete([names[0], f"{bench.prefix}missing", names[2], names[0]])
    left = [info.key for info in await listed(bench.store, bench.prefix)]
    expect(left == sorted(set(names) - {names[0], names[2]}), f"{left} are left")
    expect(await bench.store.get(names[0]) is None, "a deleted object can be read")


async def _check_list(bench: Bench) -> None:
    """``list`` yields every object whose key starts with the prefix, ascending, and tells its size."""
    names = [
        "a/0",
        "a/1",
        "a/10",
        "a/1x",
        "a-b",
        "a.b",
        "a0",
        "a_b",
        "aa/b/c/d",
        "A",
        "b/a",
        "b/b/b",
        "b0",
        "z",
        "-",
    ]
    names += [f"many/{i:05}" for i in range(bench.many)]
    limit = asyncio.Semaphore(16)

    async def put(index: int, name: str) -> None:
        async with limit:
            await bench.store.put(bench.prefix + name, [bytes(index % 100)])

    async with asyncio.TaskGroup() as group:
        for index, name in enumerate(names):
            group.create_task(put(index, name))
    for prefix in (
        "",
        "a",
        "a/",
        "a/1",
        "a-",
        "a.b",
        "aa/",
        "aa/b/c",
        "A",
        "b",
        "b/b/",
        "many/",
        "many/0000",
        "-",
        "q",
    ):
        found = [
            info.key.removeprefix(bench.prefix) for info in await listed(bench.other, bench.prefix + prefix)
        ]
        expect(
            found == sorted(name for name in names if name.startswith(prefix)),
            f"{prefix!r} lists {found[:20]}",
        )
    sizes = {
        info.key.removeprefix(bench.prefix): info.size for info in await listed(bench.other, bench.prefix)
    }
    expect(sizes == {name: index % 100 for index, name in enumerate(names)}, "sizes in the listing are wrong")


async def _check_key_below_key(bench: Bench) -> None:
    """A key below another one either works or is refused with `InvalidRequestError`; neither object suffers."""
    upper, lower = f"{bench.prefix}p", f"{bench.prefix}p/q"
    for first, second in ((upper, lower), (lower, upper)):
        await empty(bench)
        await bench.store.put(first, [b"first"])
        expected = [first]
        with contextlib.suppress(InvalidRequestError):
            await bench.store.put(second, [b"second"])
            expected = sorted((first, second))
        found = [info.key for info in await listed(bench.store, bench.prefix)]
        expect(found == expected, f"{found} are there instead of {expected}")
        expect_bytes(await body_of(bench.store, first), b"first", "the object that was there first")
        if len(expected) == 1:
            with raises(InvalidRequestError, "put_if where put is refused"):
                await bench.store.put_if(second, [b"x"], match=None)
            expect(await bench.store.get(second) is None, "get found a key that put refuses")
            await bench.store.delete([second])
            expect_bytes(
                await body_of(bench.store, first), b"first", "after deleting the key that is not there"
            )


NAME_CHECKS = (_check_keys, _check_delete, _check_list, _check_key_below_key)
