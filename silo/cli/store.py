"""Commands that need no daemon, only the store: ``restore``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from silo.cli.keys import KeyCommand, KeyFile
from silo.cli.output import console, print_json
from silo.errors import InvalidRequestError
from silo.settings import format_size

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(restore)


def restore(
    group: Annotated[str, typer.Argument(help="The group.")],
    store: Annotated[str, typer.Option(help="Where its copy is: file:///dir or s3://bucket/prefix.")],
    volume: Annotated[str, typer.Option(help="The volume to restore.")],
    to: Annotated[
        Path, typer.Option(help="The disk image to write. It must not exist, or be a block device.")
    ],
    encryption_key_file: KeyFile = "",
    encryption_key_command: KeyCommand = "",
    json: Annotated[bool, typer.Option("--json", help="One object when it is done.")] = False,
) -> None:
    """Write the newest stored generation of a volume to a file, every byte verified.

    Reads the store only; the group and whoever serves it are not disturbed. When it fails, what was written is
    removed.
    """
    if to.exists() and not to.is_block_device():
        raise InvalidRequestError(f"{to} exists already", hint="name a new file; nothing is overwritten")
    from silo.keysource import load_keys
    from silo.restoring import restore_volume

    keys = load_keys(encryption_key_file, encryption_key_command)

    with Progress(
        TextColumn("restoring"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(),
        console=console, transient=True, disable=json,
    ) as progress:  # fmt: skip
        task = progress.add_task("restoring", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = asyncio.run(restore_volume(store, group, volume, to, tell, keys))
    if json:
        print_json({"group": group, "volume": volume, **found})
    else:
        console.print(
            f"{group}/{volume}: generation {found['generation']}, {format_size(found['size'])}, "
            f"{format_size(found['bytes_store'])} from the store, written to {to}",
            markup=False,
        )
