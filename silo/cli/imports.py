"""``silo import``: a disk from any NBD server, into a file or into a running daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from silo.cli.group import STATE_DEFAULT, Json, State
from silo.cli.output import console, print_json
from silo.control import ControlClient, Result
from silo.errors import InvalidRequestError
from silo.settings import format_size

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("import")(import_disk)


def import_disk(
    uri: Annotated[
        str,
        typer.Argument(help="nbd://host:port/export, nbds://... for TLS, nbd+unix:///export?socket=/path."),
    ],
    group: Annotated[
        str | None,
        typer.Option(help="Serve it at once, as this new group of the running daemon.", show_default=False),
    ] = None,
    volume: Annotated[str, typer.Option(help="What the disk is called in the group.")] = "disk",
    to: Annotated[
        Path | None,
        typer.Option(help="Copy it into this new file, without a daemon.", show_default=False),
    ] = None,
    state: State = STATE_DEFAULT,
    json: Json = False,
) -> None:
    """Bring a disk in from any NBD server.

    With --group the daemon serves it at once: what is read first comes first, the rest in the background, and writes
    stay here. The disk's file is put where arriving groups are. The import goes on when this command is stopped, and
    when the daemon or the server is restarted; nothing is stored before all of it is here. Nobody may write to the
    server's disk meanwhile.

    With --to it is copied as a whole; holes stay holes.

    Examples:

        silo import nbd://nas:10809/vm1 --group vm1

        silo import "nbds://nas/vm1?tls-certificates=/etc/pki/silo" --to vm1.img
    """
    if (group is None) == (to is None):
        raise InvalidRequestError("say either --group or --to", hint="see `silo import --help`")
    if to is not None and to.exists() and not to.is_block_device():
        raise InvalidRequestError(f"{to} exists already", hint="name a new file; nothing is overwritten")
    with Progress(
        TextColumn("importing"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(),
        TextColumn("{task.fields[trouble]}"), console=console, transient=True, disable=json,
    ) as progress:  # fmt: skip
        task = progress.add_task("importing", total=None, trouble="")
        if to is not None:
            _copy(uri, to, progress, task, json)
        else:
            asyncio.run(_follow(state, {"group": group, "volume": volume, "uri": uri}, progress, task, json))


def _copy(uri: str, to: Path, progress: Progress, task: TaskID, json: bool) -> None:
    from silo.importing import import_to_file

    def tell(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    found = asyncio.run(import_to_file(uri, to, tell))
    if json:
        print_json(found)
    else:
        console.print(
            f"{format_size(found['size'])} at {to}, of which {format_size(found['fetched_bytes'])} travelled",
            markup=False,
        )


async def _follow(state: str, args: dict[str, Any], progress: Progress, task: TaskID, json: bool) -> None:
    async with ControlClient(Path(state) / "control.sock") as daemon:
        async for line in daemon.stream("import", **args):
            if json:
                print_json({"result": line.value} if isinstance(line, Result) else line)
            elif isinstance(line, Result):
                console.print(f"{args['group']}/{args['volume']} is here", markup=False)
            elif line["event"] == "serving":
                progress.update(task, total=line["size"])
                for where in line["uris"] or ["not exported (no --listen)"]:
                    console.print(where, markup=False, soft_wrap=True)
            else:
                done = (progress.tasks[0].total or 0) - line["left_bytes"]
                progress.update(task, completed=max(0, done), trouble=line["error"])
