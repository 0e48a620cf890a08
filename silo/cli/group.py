"""Commands about a running daemon's groups: ``status``, ``heat``, ``sync``. Those that move them: `silo.cli.move`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from silo.cli.output import console, print_json
from silo.cli.picture import Cell, draw, write_png
from silo.control import ControlClient
from silo.settings import format_duration, format_size

__all__ = ["STATE_DEFAULT", "Json", "State", "add_to", "call_daemon", "client"]

State = Annotated[str, typer.Option(help="The daemon's state directory.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
STATE_DEFAULT = "/var/lib/silo"


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (status, heat, sync):
        app.command()(command)


def client(state: str) -> ControlClient:
    return ControlClient(Path(state) / "control.sock")


async def call_daemon(state: str, verb: str, **args: Any) -> Any:
    """What the daemon with this state directory answers."""
    async with client(state) as daemon:
        return await daemon.call(verb, **args)


def status(state: State = STATE_DEFAULT, json: Json = False) -> None:
    """Show every group: who owns it, how much is dirty, and how far the store is behind."""
    answer = asyncio.run(call_daemon(state, "status"))
    if json:
        print_json(answer)
        return
    if not answer["groups"]:
        console.print("no groups; waiting for one to arrive" if answer["peer"] else "no groups")
    for group in answer["groups"]:
        console.print(_group_table(group))
        for volume in group["volumes"]:
            for uri in volume["uris"]:
                console.print(uri, markup=False, soft_wrap=True)


def _group_table(group: dict[str, Any]) -> Table:
    table = Table(title=f"{group['name']}: {group['state']}", title_justify="left")
    for column in ("volume", "size", "present", "zero", "in store", "at peer", "dirty"):
        table.add_column(
            column, justify="left" if column == "volume" else "right", no_wrap=column != "volume"
        )
    for volume in group["volumes"]:
        table.add_row(
            volume["name"],
            *(
                format_size(volume[key])
                for key in ("size", "present", "zero", "absent_store", "absent_peer", "dirty")
            ),
        )
    table.caption_justify = "left"
    sync = group["sync"]
    if sync is None:
        table.caption = "no store: nothing survives the loss of this host"
    else:
        behind = "nothing stored yet" if sync["rpo_s"] is None else f"{format_duration(sync['rpo_s'])} behind"
        table.caption = (
            f"epoch {group['epoch']}, generation {sync['generation']}, {behind}, "
            f"{format_size(group['exposed_bytes'])} only here"
        )
        if sync["rate_bps"]:
            table.caption += (
                f"\n{format_size(sync['backlog_bytes'])} to upload, at {format_size(sync['rate_bps'])}/s"
            )
        if group["guest_limit_bps"] is not None:
            table.caption += f"\nthe guest is slowed down to {format_size(group['guest_limit_bps'])}/s"
        if sync["alarms"]:
            table.caption += f"\nALARM: {', '.join(sync['alarms'])}"
        if sync["last_error"]:
            table.caption += f"\nlast error: {sync['last_error']}"
    return table


def heat(
    group: Annotated[str, typer.Argument(help="The group.")],
    png: Annotated[
        Path | None, typer.Option(help="Write a picture instead of drawing one.", show_default=False)
    ] = None,
    width: Annotated[int, typer.Option(help="Cells per row.", min=8, max=512)] = 64,
    state: State = STATE_DEFAULT,
    json: Json = False,
) -> None:
    """Draw the chunks of a group: green is read, red is written, blue is still in the store."""
    answer = asyncio.run(call_daemon(state, "heat", group=group, cells=width * 48))
    if json:
        print_json(answer)
        return
    for volume in answer["volumes"]:
        cells = [
            Cell(reads, writes, residency)
            for reads, writes, residency in zip(
                volume["reads"], volume["writes"], volume["residency"], strict=True
            )
        ]
        if png is not None:
            name = png if len(answer["volumes"]) == 1 else png.with_stem(f"{png.stem}-{volume['name']}")
            name.write_bytes(write_png(cells, width))
            console.print(f"{group}/{volume['name']}: {name}", markup=False)
        else:
            console.print(
                f"{group}/{volume['name']}: {volume['chunks_per_cell']} chunks per cell", markup=False
            )
            console.print(draw(cells, width))


def sync(
    group: Annotated[str, typer.Argument(help="The group.")],
    state: State = STATE_DEFAULT,
    json: Json = False,
) -> None:
    """Store everything that is dirty now, and wait until it is committed."""
    answer = asyncio.run(call_daemon(state, "sync", group=group))
    if json:
        print_json(answer)
    else:
        console.print(f"{group}: generation {answer['generation']} is stored", markup=False)
