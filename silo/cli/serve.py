"""``silo serve``: the daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from silo.cli.output import console, print_json
from silo.config import ServeConfig, load_config, merge_flags

__all__ = ["add_to", "run_loop"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(serve)


def serve(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file; every flag can be said there.", show_default=False)
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Open this group. Without any group, wait for one to arrive.", show_default=False),
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH[,size=8G][,chunk_size=64K][,read_only=true]: a disk of the group. Repeatable.",
            show_default=False,
        ),
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            help="Serve NBD here: unix:/path or tcp:HOST:PORT. {group} stands for the group's name. Repeatable.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Where the crash-consistent copy is kept: file:///dir or s3://bucket/prefix. "
            "Credentials come from the environment.",
            show_default=False,
        ),
    ] = None,
    sync_interval: Annotated[
        str | None, typer.Option(help="Time between two cuts: 500ms, 5s, 1m. Default 5s.", show_default=False)
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(help="Maps, records and the control socket. Default /var/lib/silo.", show_default=False),
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(
            help="Let other hosts bring groups here: tcp:HOST:PORT or unix:/path.", show_default=False
        ),
    ] = None,
    insecure_peer: Annotated[
        bool | None,
        typer.Option("--insecure-peer", help="Plain TCP between hosts, in a network that you trust."),
    ] = None,
    incoming: Annotated[
        str | None,
        typer.Option(
            help="Directory for the disks of arriving groups. Default: <state>/incoming.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Events as JSON lines.")] = False,
) -> None:
    """Serve disks over NBD, keep their copy in a store, and move them to other hosts.

    The exports are named GROUP/VOLUME; the bare volume name and the empty name are aliases while they are
    unambiguous. SIGTERM stores what is not stored yet and ends; a second one ends at once.

    Examples:

        silo serve --group vm1 --volume disk=disk.img,size=8G --listen unix:/run/silo/vm1.sock --store file:///srv/store

        silo serve --peer tcp:0.0.0.0:5170 --insecure-peer --listen unix:/run/silo/{group}.sock --store s3://bucket/silo
    """
    base = load_config(config) if config is not None else ServeConfig()
    merged = merge_flags(
        base,
        group=group,
        volumes=volume or (),
        listen=listen or (),
        sync_interval=sync_interval,
        store=store,
        state=state,
        peer=peer,
        insecure_peer=insecure_peer,
        incoming=incoming,
    )
    from silo.daemon import serve_until_told

    def say(event: dict[str, object], text: str) -> None:
        if json:
            print_json(event)
        else:
            console.print(text, markup=False)

    run_loop(serve_until_told(merged, say))


def run_loop(work: object) -> None:
    """Run a coroutine on uvloop when that is installed, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work)  # type: ignore[arg-type]
