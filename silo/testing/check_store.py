"""The contract of `silo.abc.ObjectStore`, executable.

::

    async def make_store():
        return MyStore(bucket="test")

    await check_store(make_store)

Every function called ``_check_...``, here and in `silo.testing.store_names` and `silo.testing.store_races`, holds a
store to one sentence of the contract, which is its docstring. They depend on no test framework: a breach raises
``AssertionError`` with what was seen. Everything happens below the prefix ``check-store/``, which is emptied
before and after.

What it cannot do is prove absence: a race that is lost once in a million rounds may well be missed. Outages are
not provoked; `silo.sync.memory_store` does that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import attrs

from silo.abc import Buffer, ObjectStore
from silo.errors import InvalidRequestError
from silo.testing.store_bench import (
    Bench,
    body_of,
    data,
    empty,
    etag_of,
    expect,
    expect_bytes,
    listed,
    noted,
    raises,
)
from silo.testing.store_names import NAME_CHECKS
from silo.testing.store_races import CONCURRENT_CHECKS

__all__ = ["check_store"]

MakeStore = Callable[[], Awaitable[ObjectStore]]

_ROOT = "check-store/"
_NO_ETAG = "0" * 32


async def check_store(
    make_store: MakeStore, *, writers: int = 8, rounds: int = 5, big: int = 5 << 20, many: int = 30
) -> None:
    """Raise ``AssertionError`` when the stores that ``make_store`` makes break the contract.

    Every call of ``make_store`` must return another handle on one and the same store; ``writers`` of them (two at
    least) race, ``rounds`` times each. ``big`` is the size of the largest object, ``many`` the number of objects in
    the largest listing: above a thousand it needs several pages on S3.
    """
    checks = [
        _check_url,
        *NAME_CHECKS,
        _check_put_and_get,
        _check_put_keeps_no_buffer,
        _check_absent,
        _check_ranges,
        _check_wrong_ranges,
        _check_result_is_stable,
        _check_etags,
        _check_create,
        _check_replace,
        _check_replace_needs_the_object,
        *CONCURRENT_CHECKS,
    ]
    for check in checks:
        name = check.__name__.removeprefix("_check_").replace("_", "-")
        async with contextlib.AsyncExitStack() as closing:
            closing.enter_context(noted(f"{check.__name__}: {check.__doc__}"))
            stores = []
            for _ in range(max(writers, 2) + 1):
                stores.append(await make_store())
                closing.push_async_callback(stores[-1].aclose)
            bench = Bench(stores[1:], f"{_ROOT}{name}/", rounds, big, many)
            cleaner = attrs.evolve(bench, stores=stores[:1])
            await empty(cleaner)
            await check(bench)
            await empty(cleaner)


# ------------------------------------------------------------------------------------------------- the checks


async def _check_url(bench: Bench) -> None:
    """``url`` says where the store is and holds no credentials."""
    url = bench.store.url
    expect(isinstance(url, str) and ":" in url, f"url is {url!r}")
    expect("@" not in url, "url has room for a password")


async def _check_put_and_get(bench: Bench) -> None:
    """``put`` writes its buffers joined, whatever their kinds, replacing what was there; ``get`` reads it back."""
    store, key = bench.store, f"{bench.prefix}object"
    text = data(10_000, "put")
    bodies: list[list[Buffer]] = [
        [text],
        [],
        [b""],
        [text[:1], bytearray(text[1:5000]), memoryview(text)[5000:9000], b"", text[9000:]],
        [memoryview(bytearray(text))[100:9000:1]],
        [text[i : i + 7] for i in range(0, len(text), 7)],
        [b"\0"],
    ]
    for body in bodies:
        await store.put(key, body)
        expected = b"".join(body)
        found = await bench.other.get(key)
        expect(found is not None, "get found nothing after put had ended")
        if found is not None:
            expect_bytes(found.data, expected, f"{len(body)} buffers")
            expect(found.size == len(expected), f"size is {found.size}, not {len(expected)}")


async def _check_put_keeps_no_buffer(bench: Bench) -> None:
    """After a put has ended the caller may use its buffers again."""
    key, text = f"{bench.prefix}object", data(50_000, "buffer")
    reused = bytearray(text)
    await bench.store.put(key, [memoryview(reused)])
    reused[:] = bytes(len(reused))
    expect_bytes(await body_of(bench.other, key), text, "after the buffer was used again")
    reused.extend(b"and it can be resized")


async def _check_absent(bench: Bench) -> None:
    """Of what is not there ``get`` and ``head`` say ``None``, ``delete`` nothing, and ``list`` has no entry."""
    key = f"{bench.prefix}nowhere/object"
    expect(await bench.store.get(key) is None, "get found something")
    expect(await bench.store.get(key, start=5, length=5) is None, "a ranged get found something")
    expect(await bench.store.head(key) is None, "head found something")
    await bench.store.delete([key])
    await bench.store.delete([])
    expect(await listed(bench.store, bench.prefix) == [], "list found something")


async def _check_ranges(bench: Bench) -> None:
    """``get`` reads ``length`` bytes from ``start``, fewer at the end, and tells the size of the whole."""
    key, text = f"{bench.prefix}object", data(200_000, "ranges")
    etag = await bench.store.put(key, [text])
    ranges: list[tuple[int, int | None]] = [
        *((0, 1), (0, 200_000), (0, 200_001), (1, None), (65_535, 3), (199_999, 1), (199_999, None)),
        *((199_999, 100), (100_000, 10**12), (0, None)),
    ]
    for start, length in ranges:
        found = await bench.store.get(key, start=start, length=length)
        expect(found is not None, f"{start}+{length} of an object that is there")
        if found is not None:
            limit = None if length is None else start + length
            expect_bytes(found.data, text[start:limit], f"{start}+{length}")
            expect(
                (found.size, found.etag) == (200_000, etag),
                f"{found.size}, {found.etag} for {start}+{length}",
            )


async def _check_wrong_ranges(bench: Bench) -> None:
    """A range that starts at or past the end, or makes no sense, raises `InvalidRequestError`."""
    for size in (0, 10):
        key = f"{bench.prefix}{size}"
        await bench.store.put(key, [bytes(size)])
        for start, length in (
            (size, 1),
            (size, 100),
            (size + 1, None),
            (10**9, 5),
            (0, 0),
            (0, -1),
            (-1, None),
        ):
            with raises(InvalidRequestError, f"{start}+{length} of {size} bytes"):
                await bench.store.get(key, start=start, length=length)
        expect_bytes(await body_of(bench.store, key), bytes(size), "the whole of it")


async def _check_result_is_stable(bench: Bench) -> None:
    """What ``get`` returned does not change when the object does."""
    key, first = f"{bench.prefix}object", data(100_000, "first")
    await bench.store.put(key, [first])
    found = await bench.store.get(key, start=10, length=99_000)
    await bench.other.put(key, [data(100_000, "second")])
    await bench.other.delete([key])
    expect(found is not None, "get found nothing")
    if found is not None:
        expect_bytes(found.data, first[10:99_010], "after the object was replaced and deleted")


async def _check_etags(bench: Bench) -> None:
    """Every call names the same ETag for the same object, and another one for another content."""
    for size in (0, 100, 300_000):
        key = f"{bench.prefix}{size}"
        seen = []
        for body in (data(size, "one"), data(size + 1, "two")):
            etag = await bench.store.put(key, [body])
            got, head = await bench.store.get(key), await bench.other.head(key)
            found = await listed(bench.other, key)
            etags = {
                etag,
                got.etag if got else "",
                head.etag if head else "",
                *(info.etag for info in found),
            }
            expect(etags == {etag} and etag != "", f"put, get, head and list name {etags}")
            expect(head is not None and head.key == key and head.size == len(body), f"head says {head}")
            expect(head is not None and head.modified > 0, f"head says {head}")
            seen.append(etag)
        expect(seen[0] != seen[1], "two contents have one ETag")


async def _check_create(bench: Bench) -> None:
    """``put_if`` with ``match=None`` writes only where there is no object."""
    key = f"{bench.prefix}object"
    etag = await bench.store.put_if(key, [b"fi", b"rst"], match=None)
    expect(etag is not None, "an object could not be created")
    for body in (b"second", b"first", b""):
        expect(await bench.other.put_if(key, [body], match=None) is None, "an object was created twice")
    expect_bytes(await body_of(bench.store, key), b"first", "the object after others tried to create it")
    expect(etag_of(await bench.store.head(key)) == etag, "its ETag is not the one that put_if returned")
    await bench.store.delete([key])
    expect(
        await bench.other.put_if(key, [b""], match=None) is not None,
        "it could not be created again once deleted",
    )
    expect_bytes(await body_of(bench.store, key), b"", "an empty object")


async def _check_replace(bench: Bench) -> None:
    """``put_if`` with an ETag writes only over the object that has it."""
    for size in (10, 200_000):
        store, key = bench.store, f"{bench.prefix}{size}"
        first, second, third = (data(size, name) for name in ("first", "second", "third"))
        old = await store.put(key, [first])
        expect(await store.put_if(key, [third], match=_NO_ETAG) is None, "a wrong ETag was good enough")
        new = await store.put_if(key, [second], match=old)
        expect(new is not None and new != old, f"replaced {old}, got {new}")
        expect(
            await bench.other.put_if(key, [third], match=old) is None, "the ETag of before was good enough"
        )
        expect_bytes(await body_of(bench.other, key), second, "after two writes that should have failed")
        expect(etag_of(await store.head(key)) == new, "its ETag is not the one that put_if returned")
        newer = await bench.other.put(key, [third])
        expect(await store.put_if(key, [first], match=new) is None, "a plain put went unnoticed")
        expect(
            await store.put_if(key, [first], match=newer) is not None,
            "the ETag of a plain put does not match",
        )


async def _check_replace_needs_the_object(bench: Bench) -> None:
    """``put_if`` with an ETag writes nothing where there is no object, even if there was one."""
    key = f"{bench.prefix}object"
    expect(await bench.store.put_if(key, [b"x"], match=_NO_ETAG) is None, "replaced what was never there")
    etag = await bench.store.put(key, [b"x"])
    await bench.other.delete([key])
    expect(await bench.store.put_if(key, [b"y"], match=etag) is None, "replaced what had been deleted")
    expect(await bench.store.get(key) is None, "an object is there")
