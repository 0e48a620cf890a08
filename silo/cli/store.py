"""Commands about what a group has in its store: ``restore``, ``verify``, ``fork``, ``delete``, ``gc``, ``cost``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from silo.cli.group import STATE_DEFAULT, call_daemon
from silo.cli.keys import KeyCommand, KeyFile
from silo.cli.output import console, print_json
from silo.cli.point import State, parse_instant, show_instant
from silo.cli.point import Store as PerhapsStore
from silo.errors import InvalidRequestError
from silo.settings import format_size, parse_duration

__all__ = ["add_to"]

Group = Annotated[str, typer.Argument(help="The group.")]
Store = Annotated[str, typer.Option(help="Where its copy is: file:///dir or s3://bucket/prefix.")]
Generation = Annotated[
    int | None, typer.Option(help="A kept generation instead of the newest.", show_default=False)
]
Time = Annotated[
    str | None,
    typer.Option(
        "--time", help="The last kept generation not after 2026-05-01T12:00:00 (UTC).", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One object when it is done.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (restore, verify, fork, delete, gc, cost):
        app.command()(command)


def _progress(what: str, json: bool) -> Progress:
    return Progress(
        TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(),
        console=console, transient=True, disable=json,
    )  # fmt: skip


def restore(
    group: Group,
    store: Store,
    volume: Annotated[str, typer.Option(help="The volume to restore.")],
    to: Annotated[
        Path, typer.Option(help="The disk image to write. It must not exist, or be a block device.")
    ],
    generation: Generation = None,
    time: Time = None,
    encryption_key_file: KeyFile = "",
    encryption_key_command: KeyCommand = "",
    json: Json = False,
) -> None:
    """Write a stored generation of a volume to a file, every byte verified.

    The newest one, or a kept one (see `silo point list`). Reads the store only, but for a note that keeps the collector
    away meanwhile; the group and whoever serves it are not disturbed. When it fails, what was written is removed.
    """
    if to.exists() and not to.is_block_device():
        raise InvalidRequestError(f"{to} exists already", hint="name a new file; nothing is overwritten")
    at = parse_instant(time)
    from silo.keysource import load_keys
    from silo.restoring import restore_volume

    keys = load_keys(encryption_key_file, encryption_key_command)
    with _progress("restoring", json) as progress:
        task = progress.add_task("restoring", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = asyncio.run(
            restore_volume(store, group, volume, to, tell, keys, generation=generation, at=at)
        )
    if json:
        print_json({"group": group, "volume": volume, **found})
    else:
        console.print(
            f"{group}/{volume}: generation {found['generation']} of {show_instant(found['cut_time'])}, "
            f"{format_size(found['size'])}, "
            f"{format_size(found['bytes_store'])} from the store, written to {to}",
            markup=False,
            soft_wrap=True,
        )


def verify(
    group: Group,
    store: Store,
    generation: Generation = None,
    sample: Annotated[
        float, typer.Option(help="The part of the chunks to fetch, from 0 to 1, chosen by chance.")
    ] = 1.0,
    encryption_key_file: KeyFile = "",
    encryption_key_command: KeyCommand = "",
    json: Json = False,
) -> None:
    """Fetch what a generation is made of and compare every digest. Exit code 1 when anything is damaged or missing."""
    from silo import keeping
    from silo.keysource import load_keys

    keys = load_keys(encryption_key_file, encryption_key_command)
    with _progress("verifying", json) as progress:
        task = progress.add_task("verifying", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        report = asyncio.run(
            keeping.verify(store, group, generation=generation, sample=sample, progress=tell, keys=keys)
        )
    if json:
        print_json(report)
    else:
        for damage in report["damages"]:
            chunks = f"chunks {damage['first']} to {damage['limit'] - 1} of {damage['volume']}"
            console.print(f"{chunks}: {damage['why']}", markup=False, soft_wrap=True)
        verdict = "sound" if report["sound"] else f"{report['damaged_chunks']} chunks are damaged"
        console.print(
            f"{group}: generation {report['generation']}: {verdict}; {report['chunks']} chunks compared, "
            f"{format_size(report['bytes_store'])} read",
            markup=False,
        )
    if not report["sound"]:
        raise typer.Exit(1)


def fork(
    source: Annotated[str, typer.Argument(help="The group to begin as.")],
    group: Annotated[str, typer.Argument(help="The new group.")],
    store: Store,
    generation: Generation = None,
    time: Time = None,
    json: Json = False,
) -> None:
    """Make a new group that begins as a stored generation of another one, and shares what both have in the store.

    Takes a moment, whatever the size. The new group can be served at once, on any host:
    silo serve --group NEW --volume disk=new.img,size=... --store ...
    """
    from silo import keeping

    made = asyncio.run(keeping.fork(store, source, group, generation, parse_instant(time)))
    if json:
        print_json(made)
        return
    volumes = ", ".join(f"{volume['name']} ({format_size(volume['size'])})" for volume in made["volumes"])
    shown = show_instant(made["cut_time"])
    console.print(f"{group} is {source} as of {shown}: {volumes}", markup=False, soft_wrap=True)


def delete(
    group: Group,
    store: Store,
    host_is_dead: Annotated[
        bool,
        typer.Option(
            "--host-is-dead",
            help="Delete it although its last owner did not release it. Nobody may serve it.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete a group with all its generations and points from the store. It cannot be had back."""
    if not yes:
        typer.confirm(f"Delete everything that {store} has of {group}?", abort=True)
    from silo import keeping

    gone = asyncio.run(keeping.delete(store, group, force=host_is_dead))
    if json:
        print_json(gone)
    else:
        console.print(f"{group} is deleted: {format_size(gone['deleted_bytes'])}", markup=False)


def gc(
    group: Group,
    store: PerhapsStore = None,
    state: State = STATE_DEFAULT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what could be deleted.")] = False,
    grace: Annotated[
        str | None,
        typer.Option(
            help="Leave alone what has been dead for less than this. Default: as configured; with --store, 0s."
        ),
    ] = None,
    encryption_key_file: KeyFile = "",
    encryption_key_command: KeyCommand = "",
    json: Json = False,
) -> None:
    """Delete what nothing needs any more from a group's store. The daemon does the same by itself, now and then.

    With --store for a group that nobody serves; else through the daemon that serves it.
    """
    if store is not None:
        from silo import keeping
        from silo.keysource import load_keys

        keys = load_keys(encryption_key_file, encryption_key_command)
        report = asyncio.run(keeping.collect(store, group, dry_run=dry_run, keys=keys))
    else:
        grace_s = None if grace is None else parse_duration(grace)
        report = asyncio.run(call_daemon(state, "gc", group=group, dry_run=dry_run, grace_s=grace_s))
    if json:
        print_json(report)
        return
    table = Table(
        title=f"{group}: generation {report['generation']}", title_justify="left", show_header=False
    )
    deleted = "could be deleted" if dry_run else "deleted"
    for name, objects, size in (
        ("stored before", report["stored_objects"], report["stored_bytes"]),
        ("needed by the newest generation", "", report["live_bytes"]),
        ("kept by records alone", "", report["record_bytes"]),
        (deleted, report["deleted_objects"], report["deleted_bytes"]),
        ("dead, and left alone for a while", report["dead_objects"], report["dead_bytes"]),
        ("stored again to empty segments", "", report["rewritten_bytes"]),
    ):
        table.add_row(name, f"{objects} objects" if objects != "" else "", format_size(size))
    if report["forks"]:
        table.add_row("forks", "", ", ".join(report["forks"]))
    console.print(table)


def cost(
    group: Group,
    store: PerhapsStore = None,
    state: State = STATE_DEFAULT,
    prices: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file: currency, storage_gb_month, put_1000, get_1000, out_gb. Default: as "
            "configured, else assumed list prices of S3 Standard.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what a month costs at the present rate of requests, and with what is stored now.

    Through the daemon, which has counted every request since it opened the group; with --store it is an estimate.
    """
    from silo.config import load_prices

    table = load_prices(prices) if prices is not None else None
    if store is not None:
        from silo import keeping
        from silo.sync.cost import PriceTable

        found = asyncio.run(keeping.stored_cost(store, group, table or PriceTable()))
    else:
        import msgspec

        given = None if table is None else msgspec.to_builtins(table)
        found = asyncio.run(call_daemon(state, "cost", group=group, prices=given))
    if json:
        print_json(found)
    else:
        console.print(_cost_table(found))


def _cost_table(found: dict[str, Any]) -> Table:
    title = f"{found['group']}: a month costs {found['total']:.2f} {found['currency']}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("stored", format_size(found["stored_bytes"]), f"{found['storage_cost']:.4f}")
    table.add_row("PUT and LIST requests", f"{found['puts']:,.0f}", f"{found['put_cost']:.4f}")
    table.add_row("GET requests", f"{found['gets']:,.0f}", f"{found['get_cost']:.4f}")
    table.add_row("read", "", f"{found['out_cost']:.4f}")
    counted = f"counted for {found['elapsed_s']:.0f} s, times {30 * 86400 / found['elapsed_s']:,.0f}"
    table.caption = "estimated from the objects of the last day" if found["estimated"] else counted
    table.caption_justify = "left"
    return table
