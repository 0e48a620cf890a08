"""What groups and volumes may be called.

A name stands in export names, object keys, file names and log lines, and comes from people and from other
hosts. So it is short, plain, and can be none of the things that a path gives a meaning to.
"""

from __future__ import annotations

import re

from silo.errors import InvalidRequestError

__all__ = ["NAME_MAX", "check_group_name", "check_volume_name"]

NAME_MAX = 128

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\Z")
_HINT = f"take up to {NAME_MAX} letters, digits, '_', '.' and '-', not beginning with '.'"


def check_group_name(name: str) -> str:
    """Return the name. Raise `InvalidRequestError` unless it may name a group."""
    return _check("group", name)


def check_volume_name(name: str) -> str:
    """Return the name. Raise `InvalidRequestError` unless it may name a volume."""
    return _check("volume", name)


def _check(what: str, name: str) -> str:
    if len(name) > NAME_MAX or _NAME.match(name) is None:
        raise InvalidRequestError(f"{name[:80]!r} cannot name a {what}", hint=_HINT)
    return name
