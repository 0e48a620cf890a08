"""``silo demo``: watch it work."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from silo.cli.output import console, print_json
from silo.clock import SystemClock
from silo.settings import format_size

__all__ = ["add_to"]

MEANING = {
    "downtime_ms": "the guest stood still, its own suspend and resume apart",
    "evacuated_ms": "from the command until the first host could be killed (and was)",
    "hydrated_ms": "from then until the last chunk had come from the store",
    "bytes_peer": "sent from host to host",
    "bytes_store": "pulled from the store",
    "rpo_s": "the most that the store was ever behind",
    "guest_ops": "reads and writes of the guest, every read verified",
    "guest_read_max_ms": "the slowest of its reads",
}


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(demo)


def demo(
    store: Annotated[
        str | None,
        typer.Option(help="Use this store instead of a directory: s3://bucket/prefix, file:///dir."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Keep disks, logs and store in this new directory.", show_default=False),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Progress as JSON lines, ending with the report.")
    ] = False,
) -> None:
    """Move a disk under load between two hosts, kill the first one, and verify every byte.

    Two daemons on this machine stand for two hosts. Takes less than a minute and about 2 GiB of disk.
    """
    from silo.demo.play import DemoSettings, play

    clock = SystemClock()
    settings = DemoSettings(store=store, keep=keep)
    if json:
        said = ""

        def tell(what: str) -> None:
            nonlocal said
            if what != said:
                said = what
                print_json({"progress": what})

        print_json(msgspec.to_builtins(asyncio.run(play(settings, clock, tell))))
        return
    with console.status("starting") as progress:
        report = asyncio.run(play(settings, clock, progress.update))
    table = Table(title="every byte verified", title_justify="left", show_header=False)
    for name, meaning in MEANING.items():
        value = getattr(report, name)
        shown = format_size(value) if name.startswith("bytes_") else f"{value:,.1f}".removesuffix(".0")
        table.add_row(name, shown, meaning)
    console.print(table)
