"""The options with which every command that reads a store takes its master keys."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["KeyCommand", "KeyFile"]

KeyFile = Annotated[
    str,
    typer.Option(
        "--encryption-key-file",
        help="Master keys of what is encrypted in the store, one per line, the newest first: openssl rand -hex 32.",
        show_default=False,
    ),
]
KeyCommand = Annotated[
    str,
    typer.Option(
        "--encryption-key-command",
        help="A shell command that prints what the file would hold.",
        show_default=False,
    ),
]
