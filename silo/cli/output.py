"""What commands print: JSON for machines, tables and sentences for people, errors for both."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from silo.errors import SiloError

__all__ = ["console", "print_error", "print_json"]

console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One line of JSON on standard output, flushed, so that a reader sees events as they happen."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def print_error(error: SiloError) -> None:
    """The message in red and the hint below it; as JSON, on standard output, when ``--json`` was given."""
    if "--json" in sys.argv:
        print_json({"error": {"kind": type(error).__name__, "message": error.message, "hint": error.hint}})
        return
    _errors.print(Text.assemble(("error:", "red"), f" {error.message}"), soft_wrap=True)
    if error.hint:
        _errors.print(f"       {error.hint}", markup=False, soft_wrap=True)
