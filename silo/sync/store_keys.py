"""Which keys and byte ranges an object store accepts: the same everywhere, so that a key that works on one
store works on all of them.

A key is one or more components joined by ``/``. A component holds letters, digits, ``-``, ``_`` and ``.``: what no
client, server or proxy rewrites in an address, so that signatures cannot differ over it. It is neither ``.`` nor
``..``, and short enough to be a file name.
Everything here is pure; the stores call it before anything else.
"""

from __future__ import annotations

import re

from silo.errors import InvalidRequestError

__all__ = [
    "COMPONENT_SIZE_MAX",
    "KEY_SIZE_MAX",
    "check_key",
    "check_prefix",
    "check_range",
    "clip_range",
    "is_key",
    "just_before",
]

COMPONENT_SIZE_MAX = 255
"""NAME_MAX of every Linux file system that matters."""

KEY_SIZE_MAX = 768
"""S3 allows 1024 bytes; the difference is left for the prefix of the store's URL."""

_ALPHABET = "-.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"
"""The characters of a component, in the order in which stores sort them."""

_COMPONENT = rf"(?!\.{{1,2}}(?:/|\Z))[A-Za-z0-9_.-]{{1,{COMPONENT_SIZE_MAX}}}"
_KEY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_HINT = "components of letters, digits and -_. joined by '/', none of them empty, '.' or '..'"


def is_key(name: str) -> bool:
    """Whether ``name`` may name an object."""
    return len(name) <= KEY_SIZE_MAX and _KEY.match(name) is not None


def check_key(key: str) -> None:
    """Raise `InvalidRequestError` unless ``key`` may name an object."""
    if not is_key(key):
        raise InvalidRequestError(f"{key[:80]!r} is not a key", hint=_HINT)


def check_prefix(prefix: str) -> None:
    """Raise `InvalidRequestError` unless some key could start with ``prefix``. The empty one starts them all.

    A prefix is a string, not a directory: ``seg`` is a prefix of ``segments/1``.
    """
    # One more character turns an unfinished component ("a/", "a/.") into a finished one.
    if prefix and not is_key(prefix) and not is_key(prefix + "_"):
        raise InvalidRequestError(f"{prefix[:80]!r} is not the start of any key", hint=_HINT)


def just_before(prefix: str) -> str | None:
    """A string that sorts before every key that starts with ``prefix``, and after almost all that sort before those.

    For listings that can only start behind a string; it has only characters of keys. None: start at the beginning.
    """
    below = _ALPHABET.rpartition(prefix[-1])[0]
    return f"{prefix[:-1]}{below[-1]}{_ALPHABET[-1]}" if below else prefix[:-1].rstrip("/") or None


def check_range(start: int, length: int | None) -> None:
    """Raise `InvalidRequestError` for a range that is wrong whatever the size of the object."""
    if start < 0 or (length is not None and length <= 0):
        raise InvalidRequestError(
            f"range {start}+{length} is not usable", hint="take start >= 0 and length > 0"
        )


def clip_range(start: int, length: int | None, size: int) -> int:
    """How many bytes a range really has in an object of ``size`` bytes.

    Raises `InvalidRequestError` when it starts at or past the end, except that the whole of an empty object
    may be read.
    """
    check_range(start, length)
    if length is None and start == 0:
        return size
    if start >= size:
        raise InvalidRequestError(f"range starts at {start}, but the object has {size} bytes")
    return size - start if length is None else min(length, size - start)
