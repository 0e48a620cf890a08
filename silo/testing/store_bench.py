"""What the checks of `silo.testing.check_store` share: the bench that each one works on, and how it complains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import attrs
import blake3

from silo.abc import Buffer, ObjectInfo, ObjectStore

__all__ = [
    "Bench",
    "body_of",
    "data",
    "empty",
    "etag_of",
    "expect",
    "expect_bytes",
    "listed",
    "noted",
    "raises",
]


@attrs.frozen
class Bench:
    """Handles on one store, a prefix that is the check's own, and how hard to try."""

    stores: Sequence[ObjectStore]
    prefix: str
    rounds: int
    big: int
    many: int

    @property
    def store(self) -> ObjectStore:
        """The handle for most things."""
        return self.stores[0]

    @property
    def other(self) -> ObjectStore:
        """Another handle on the same store, to look from elsewhere."""
        return self.stores[-1]


def data(length: int, seed: str) -> bytes:
    """Bytes that look like chance and follow from the seed."""
    return blake3.blake3(seed.encode()).digest(length=length)


async def listed(store: ObjectStore, prefix: str) -> list[ObjectInfo]:
    """The whole of a listing."""
    return [info async for info in store.list(prefix)]


async def body_of(store: ObjectStore, key: str) -> Buffer:
    """The whole content of an object that must be there."""
    found = await store.get(key)
    if found is None:
        raise AssertionError(f"{key} is not there")
    return found.data


async def empty(bench: Bench) -> None:
    """Delete everything below the bench's prefix."""
    await bench.store.delete([info.key for info in await listed(bench.store, bench.prefix)])


def etag_of(info: ObjectInfo | None) -> str | None:
    """The ETag that ``head`` named."""
    return None if info is None else info.etag


@contextlib.contextmanager
def noted(note: str) -> Iterator[None]:
    """Whatever is raised inside becomes an ``AssertionError`` that says which check it was."""
    try:
        yield
    except Exception as error:
        cause = error
        while isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[0]
        failure = (
            cause if isinstance(cause, AssertionError) else AssertionError(f"the store raised {cause!r}")
        )
        failure.add_note(note)
        raise failure from (None if failure is cause else cause)


@contextlib.contextmanager
def raises(kind: type[Exception], where: str) -> Iterator[None]:
    """Expect an error of a kind."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{where} did not raise {kind.__name__}")


def expect(condition: bool, message: str) -> None:
    """An ``assert`` that ``python -O`` does not remove."""
    if not condition:
        raise AssertionError(message)


def expect_bytes(found: Buffer, expected: Buffer, where: str) -> None:
    """Expect the same bytes; say where they begin to differ."""
    found, expected = bytes(found), bytes(expected)
    expect(len(found) == len(expected), f"{where}: {len(found)} bytes instead of {len(expected)}")
    if found != expected:
        wrong = next(i for i in range(len(found)) if found[i] != expected[i])
        raise AssertionError(
            f"{where}: byte {wrong} is {found[wrong]:#04x} instead of {expected[wrong]:#04x}"
        )
