"""``silo point``: the restore points of a group, through the daemon that serves it or straight in its store."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from silo.cli.group import STATE_DEFAULT, call_daemon
from silo.cli.output import console, print_json
from silo.errors import InvalidRequestError
from silo.settings import format_size

__all__ = ["add_to", "parse_instant", "show_instant"]

Group = Annotated[str, typer.Argument(help="The group.")]
Store = Annotated[
    str | None,
    typer.Option(help="Where its copy is, when no daemon here serves it: file:///dir or s3://bucket/prefix."),
]
State = Annotated[str, typer.Option(help="The state directory of the daemon that serves it.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]

points = typer.Typer(
    name="point",
    help="Restore points: generations that are kept until they are deleted.",
    no_args_is_help=True,
)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(points)


def parse_instant(text: str | None) -> float | None:
    """POSIX seconds of ``2026-05-01T12:00:00``, with or without a zone; without one it is UTC."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequestError(
            f"{text!r} is not an instant", hint="write 2026-05-01T12:00:00, or 2026-05-01T12:00:00+02:00"
        ) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def show_instant(seconds: float) -> str:
    """The opposite of `parse_instant`, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@points.command("list")
def list_points(group: Group, store: Store = None, state: State = STATE_DEFAULT, json: Json = False) -> None:
    """Show the kept restore points of a group, the oldest first."""
    if store is None:
        found = asyncio.run(call_daemon(state, "points", group=group))["points"]
    else:
        from silo import keeping

        found = asyncio.run(keeping.list_points(store, group))
    if json:
        print_json({"group": group, "points": found})
        return
    table = Table(title=f"{group}: {len(found)} restore points", title_justify="left")
    for column in ("generation", "shows", "size", "label"):
        table.add_column(column, justify="right" if column in ("generation", "size") else "left")
    for point in found:
        shown = show_instant(point["cut_time"])
        table.add_row(str(point["generation"]), shown, format_size(point["size"]), point["label"])
    console.print(table)


@points.command("create")
def create(
    group: Group,
    label: Annotated[str, typer.Option(help="What it is. A point with a label is kept until it is deleted.")],
    store: Store = None,
    state: State = STATE_DEFAULT,
    json: Json = False,
) -> None:
    """Keep the state of a group as it is now; with --store, as it was stored last."""
    if store is None:
        made = asyncio.run(call_daemon(state, "point_create", group=group, label=label))
    else:
        from silo import keeping

        made = asyncio.run(keeping.create_point(store, group, label))
    _say(group, made, "is kept", json)


@points.command("delete")
def delete(
    group: Group,
    generation: Annotated[int, typer.Argument(help="The point's generation, as `silo point list` shows it.")],
    store: Store = None,
    state: State = STATE_DEFAULT,
    json: Json = False,
) -> None:
    """Keep a restore point no longer. Its space is free after the collector's next pass."""
    if store is None:
        gone = asyncio.run(call_daemon(state, "point_delete", group=group, generation=generation))
    else:
        from silo import keeping

        gone = asyncio.run(keeping.delete_point(store, group, generation))
    _say(group, gone, "is not kept any more", json)


def _say(group: str, point: dict[str, Any], what: str, json: bool) -> None:
    if json:
        print_json({"group": group, **point})
        return
    label = f" ({point['label']})" if point["label"] else ""
    text = f"{group}: generation {point['generation']} of {show_instant(point['cut_time'])}{label} {what}"
    console.print(text, markup=False)
