"""The command's entry: puts the commands together and turns errors into sentences.

A `SiloError` ends the command with its message, its hint and exit code 1; with ``--json`` the same as one
object. Any other exception is a defect of Silo and is shown with its traceback.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from silo.cli import certs, demo, group, imports, move, output, point, serve, store
from silo.errors import SiloError

__all__ = ["app", "main"]

app = typer.Typer(
    name="silo",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Disks that survive the sudden death of their host, and machines that move before it.\n\n"
    "Start with `silo demo`. Then `silo serve --help`: the daemon that all other commands talk to.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from silo import __version__

        typer.echo(f"silo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Shown by ``silo --help``."""


serve.add_to(app)
group.add_to(app)
move.add_to(app)
store.add_to(app)
certs.add_to(app)
imports.add_to(app)
point.add_to(app)
demo.add_to(app)


def main() -> None:
    """The console script."""
    try:
        app()
    except SiloError as error:
        output.print_error(error)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(141)  # whoever read our output has left, as `| head` does
