"""Is this store fit to be written to? Asked at every open for writing, because some servers lie.

There are servers that speak S3, answer 200 to a conditional write, and ignore the condition: on those two
writers would both believe that they had won. Others know only one form of ETag in ``If-Match``, or answer a ranged
GET with the whole object. The probe finds out with one small object of its own below ``probe/``: written, refused,
replaced, read and removed. It says nothing about races between writers, which no sequence of requests
can; the conformance kit (`silo.testing.check_store`) has those.

Called by whoever opens a group for writing, and by the target of a migration before pre-copy.
"""

from __future__ import annotations

import contextlib
from typing import Protocol, runtime_checkable

import attrs

from silo.abc import Clock, ObjectStore
from silo.errors import InvalidRequestError, SiloError
from silo.sync.s3_location import EtagForm

__all__ = ["ChoosesEtagForm", "Probe", "probe_store"]

_FIRST = b"silo probe, version 1, first body"
_SECOND = b"silo probe, version 1, second body"
_WRONG_ETAG = "0" * 32
_RANGE_FIRST, _RANGE_LENGTH = 5, 7
_HINT = "Silo fences writers with conditional writes; use a store that has them"


@runtime_checkable
class ChoosesEtagForm(Protocol):
    """A store that can write ETags in either form; the probe leaves it with one that works."""

    etag_form: EtagForm


@attrs.frozen
class Probe:
    """What was found. A probe that returns has found everything that writing needs."""

    etag_forms: tuple[EtagForm, ...]
    """Forms of ETag that work, the chosen one first. Empty for stores to which an ETag is just a string."""


async def probe_store(store: ObjectStore, clock: Clock, *, prefix: str = "") -> Probe:
    """Find out whether ``store`` compares and swaps, and choose the form of its ETags.

    ``prefix`` (empty, or ending in ``/``) is where ``probe/`` lies. Raises `InvalidRequestError` when the store must
    not be written to, `UnavailableError` when it could not be asked. Concurrent probes do not disturb one another;
    cancelled, a probe leaves an object of some thirty bytes behind.
    """
    key = f"{prefix}probe/{clock.token(8).hex()}"
    try:
        found = await _probe(store, key)
    except SiloError:
        with contextlib.suppress(SiloError):  # the first error is the one to tell
            await store.delete([key])
        raise
    await store.delete([key])
    return found


async def _probe(store: ObjectStore, key: str) -> Probe:
    etag = await store.put_if(key, [_FIRST], match=None)
    if etag is None:
        raise InvalidRequestError(f"the store holds {key}, which nobody can have written", hint=_HINT)
    if await store.put_if(key, [_SECOND], match=None) is not None:
        raise _unfit("overwrote an object that it was told to create only if absent")
    await _check_range(store, key)
    if not isinstance(store, ChoosesEtagForm):
        await _check_replace(store, key, etag)
        return Probe(())
    return Probe(await _choose_etag_form(store, store, key, etag))


async def _choose_etag_form(
    store: ObjectStore, chooser: ChoosesEtagForm, key: str, etag: str
) -> tuple[EtagForm, ...]:
    working: list[EtagForm] = []
    for form in EtagForm:
        chooser.etag_form = form
        try:
            swapped = await store.put_if(key, [_FIRST if working else _SECOND], match=etag)
        except InvalidRequestError:
            continue  # it does not even parse this form
        if swapped is not None:
            working.append(form)
            etag = swapped
    if not working:
        raise _unfit("refused to replace an object whose ETag it had just named")
    chooser.etag_form = working[0]
    await _check_replace(store, key, etag)
    return tuple(working)


async def _check_replace(store: ObjectStore, key: str, etag: str) -> None:
    """With the right ETag an object is replaced, with a wrong one or that of its last content it is not."""
    if await store.put_if(key, [_SECOND], match=_WRONG_ETAG) is not None:
        raise _unfit("replaced an object whose ETag was not the one it was told to match")
    newer = await store.put_if(key, [_FIRST, _SECOND], match=etag)
    if newer is None:
        raise _unfit("refused to replace an object whose ETag it had just named")
    if await store.put_if(key, [_SECOND], match=etag) is not None:
        raise _unfit("replaced an object although it had changed meanwhile")
    found = await store.get(key)
    if found is None or bytes(found.data) != _FIRST + _SECOND or found.etag != newer:
        raise _unfit("did not read back what it had just written")


async def _check_range(store: ObjectStore, key: str) -> None:
    found = await store.get(key, start=_RANGE_FIRST, length=_RANGE_LENGTH)
    if found is None or bytes(found.data) != _FIRST[_RANGE_FIRST : _RANGE_FIRST + _RANGE_LENGTH]:
        raise _unfit("did not answer with the part of an object that was asked for")
    if found.size != len(_FIRST):
        raise _unfit("did not tell the size of an object of which it was asked a part")


def _unfit(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"this store must not be written to: it {what}", hint=_HINT)
