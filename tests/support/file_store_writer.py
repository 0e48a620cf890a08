"""A process that writes to a file store until it is told to stop or is killed; the tests read what it says.

``python -m tests.support.file_store_writer DIRECTORY stamp``: replaces ``head`` and creates objects, for ever. Every
body is its own proof (see `stamped`); a line on the output says what has been acknowledged.

``... DIRECTORY count TIMES``: waits for a line on its input, then adds one to ``counter`` so many times by
compare-and-swap and tries to create ``first``; the last line says whether it did.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys

from silo.clock import SystemClock
from silo.sync.file_store import FileStore

SIZES = (100, 70_000, 1_000_000)


def stamped(number: int) -> bytes:
    """A body that says its number and cannot be half of anything."""
    text = f"{number:010} ".encode()
    padding = hashlib.blake2b(text).digest() * (SIZES[number % 3] // 64)
    body = text + padding
    return body + hashlib.sha256(body).digest()


def number_of(body: bytes) -> int:
    """The number of a body, which must be whole."""
    number = int(body[:10])
    assert body == stamped(number), f"object {number} is torn"
    return number


async def stamp(store: FileStore) -> None:
    found = await store.get("head")
    number = 0 if found is None else number_of(bytes(found.data))
    etag = None if found is None else found.etag
    while True:
        number += 1
        created = await store.put_if(f"segments/{number % 4}/{number:010}", [stamped(number)], match=None)
        etag = await store.put_if("head", [stamped(number)], match=etag)
        assert etag is not None
        print(number, "created" if created else "found", flush=True)


async def count(store: FileStore, times: int) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    done = 0
    while done < times:
        found = await store.get("counter")
        assert found is not None
        body = str(int(bytes(found.data)) + 1).encode()
        done += await store.put_if("counter", [body], match=found.etag) is not None
    print(await store.put_if("first", [b"x"], match=None) is not None, flush=True)


async def main(directory: str, what: str, times: str = "0") -> None:
    store = FileStore(directory, SystemClock())
    await (stamp(store) if what == "stamp" else count(store, int(times)))
    await store.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
