"""Commands that move groups: ``migrate``, ``hibernate``, ``resume``. They show what happens while it happens."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from silo.cli.group import STATE_DEFAULT, Json, State, client
from silo.cli.output import console, print_json
from silo.control import Result
from silo.settings import format_duration, format_size, parse_duration

__all__ = ["add_to"]

Deadline = Annotated[
    str | None,
    typer.Option(
        help="When this host goes away: 30s, 2m. Everything is planned so that nothing is needed from it by then.",
        show_default=False,
    ),
]
NoThrottle = Annotated[
    bool,
    typer.Option(
        "--no-throttle", help="Never slow the guest's writes, even if it comes to be late for that."
    ),
]

ENDINGS = {
    "released": "released: this host may be switched off",
    "stored": "stored: it runs nowhere, and any host may resume it; this host may be switched off",
}


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (migrate, switch, hibernate, resume):
        app.command()(command)


def migrate(
    group: Annotated[str, typer.Argument(help="The group to move.")],
    to: Annotated[str, typer.Option(help="The other host's peer address: tcp:HOST:PORT or unix:/path.")],
    deadline: Deadline = None,
    durable: Annotated[
        bool, typer.Option("--durable", help="Store everything before the other host may take the group.")
    ] = False,
    stay: Annotated[
        bool,
        typer.Option("--stay", help="Without a target in time, run on here rather than go to the store."),
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Keep the other host close behind until `silo switch`.")
    ] = False,
    no_throttle: NoThrottle = False,
    state: State = STATE_DEFAULT,
    json: Json = False,
) -> None:
    """Move a group to another host while its guest runs, and wait until this host may be switched off.

    With a deadline, and without a target in time, the group goes to the store and stops, to be resumed elsewhere.
    """
    args = {"durable": durable, "evacuate": not stay, "throttle": not no_throttle, "follow": follow}
    asyncio.run(_watch(state, json, "migrate", deadline, group=group, to=to, **args))


def switch(
    group: Annotated[str, typer.Argument(help="The group that another host follows.")],
    deadline: Deadline = None,
    state: State = STATE_DEFAULT,
    json: Json = False,
) -> None:
    """Let the host that follows a group (`silo migrate --follow`) take over: only the last round is left to send."""
    asyncio.run(_watch(state, json, "switch", deadline, group=group))


def hibernate(
    group: Annotated[str, typer.Argument(help="The group to stop.")],
    deadline: Deadline = None,
    no_throttle: NoThrottle = False,
    state: State = STATE_DEFAULT,
    json: Json = False,
) -> None:
    """Stop a group and leave it in the store, with the state of its machine; `silo resume` wakes it on any host."""
    asyncio.run(_watch(state, json, "hibernate", deadline, group=group, throttle=not no_throttle))


def resume(
    group: Annotated[str, typer.Argument(help="The group to wake.")],
    host_is_dead: Annotated[
        bool,
        typer.Option(
            "--host-is-dead", help="Take it from a host that died, for certain, while it resumed it."
        ),
    ] = False,
    state: State = STATE_DEFAULT,
    json: Json = False,
) -> None:
    """Wake a hibernated group here: it runs at once, and its content comes from the store as it is read."""

    async def call() -> Any:
        async with client(state) as daemon:
            return await daemon.call("resume", group=group, host_is_dead=host_is_dead)

    answer = asyncio.run(call())
    if json:
        print_json(answer)
        return
    console.print(f"{group} runs here", markup=False)
    for uri in answer["uris"]:
        console.print(uri, markup=False, soft_wrap=True)


async def _watch(state: str, json: bool, verb: str, deadline: str | None, **args: Any) -> None:
    """Show the events of a migration, and then its report."""
    deadline_s = None if deadline is None else parse_duration(deadline)
    async with client(state) as daemon:
        lines = daemon.stream(verb, deadline_s=deadline_s, **args)
        if json:
            async for line in lines:
                print_json({"report": line.value} if isinstance(line, Result) else line)
            return
        display = _Display()
        with Live(display.text(), console=console, transient=True) as live:
            async for line in lines:
                if isinstance(line, Result):
                    live.stop()
                    console.print(_report(line.value))
                else:
                    display.take(line)
                    live.update(display.text())


class _Display:
    """The newest of each kind of event, as one line."""

    def __init__(self) -> None:
        self._phase = "connecting"
        self._round = 0
        self._decided = ""
        self._progress: dict[str, Any] = {}

    def take(self, event: dict[str, Any]) -> None:
        """Another event."""
        match event["event"]:
            case "phase-entered":
                self._phase = event["phase"]
            case "round-started":
                self._round = event["round"]
            case "progress":
                self._progress = event
            case "decided":
                self._decided = f"{event['action']}: {event['reason']}"

    def text(self) -> Text:
        """The line."""
        progress = self._progress
        parts = [self._phase]
        if self._phase == "pre-copy" and self._round:
            parts.append(f"round {self._round}")
        for key, what in (("bytes_peer", "sent"), ("bytes_stored", "stored")):
            if progress.get(key):
                parts.append(f"{format_size(progress[key])} {what}")
        if progress.get("rate_bps"):
            parts.append(f"{format_size(progress['rate_bps'])}/s")
        if progress.get("exposed_bytes"):
            parts.append(f"{format_size(progress['exposed_bytes'])} only here")
        if progress.get("eta_s") is not None:
            parts.append(f"{format_duration(progress['eta_s'])} to go")
        if self._decided:
            parts.append(self._decided)
        return Text("  ".join(parts))


def _report(report: dict[str, Any]) -> Table:
    title = ENDINGS.get(report["outcome"], report["outcome"])
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in report.items():
        if key == "phases":
            for timing in value:
                table.add_row(timing["phase"], format_duration(timing["duration_s"]))
        elif value not in (None, "", 0):
            table.add_row(key, _shown(key, value))
    return table


def _shown(key: str, value: Any) -> str:
    if key.startswith("bytes_"):
        return format_size(value)
    if key.endswith("_s") and isinstance(value, int | float):
        return format_duration(value)
    if key.endswith("_ms") and isinstance(value, int | float):
        return f"{value:.1f} ms"
    return str(value)
