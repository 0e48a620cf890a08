"""Commands that make certificates for the hosts of a fleet: ``certs init`` and ``certs issue``. No daemon is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silo.cli.output import console, print_json
from silo.clock import SystemClock

if TYPE_CHECKING:
    from silo.p2p.tls_authority import Issued

__all__ = ["add_to"]

Json = Annotated[bool, typer.Option("--json", help="One object.")]
certs = typer.Typer(
    no_args_is_help=True,
    help="Certificates with which the hosts of a fleet know one another.\n\n"
    "Make an authority once, on a machine that serves nothing; give every host the directory that `issue` makes for "
    "it, and start its daemon with --tls-dir.",
)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(certs, name="certs")


@certs.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where the authority is kept.")],
    name: Annotated[str, typer.Option(help="A name for people.")] = "silo fleet",
    days: Annotated[int, typer.Option(help="How long it is valid.", min=1, max=36500)] = 3650,
    json: Json = False,
) -> None:
    """Make a private authority for a fleet. One that is there is kept.

    Whoever has its key can make a host of the fleet; keep DIR/ca.key to yourself.
    """
    from silo.p2p.tls_authority import Authority

    made = Authority(directory, SystemClock()).make(name, days=days)
    _tell(made, json, "authority", f"next: silo certs issue HOST --ca {directory}")


@certs.command()
def issue(
    name: Annotated[str, typer.Argument(help="The host, as others will dial it.")],
    ca: Annotated[Path, typer.Option(help="The directory of the authority.")] = Path("certs"),
    address: Annotated[
        list[str] | None, typer.Option(help="Another name or address of the host. Repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to put the files. Default: CA/hosts/NAME.", show_default=False)
    ] = None,
    days: Annotated[int, typer.Option(help="How long the certificate is valid.", min=1, max=3650)] = 365,
    renew: Annotated[bool, typer.Option("--renew", help="Make a new one although one is there.")] = False,
    json: Json = False,
) -> None:
    """Make the key and certificate of a host. What is there is kept while it is good for a third of its time.

    Copy the directory to the host and start its daemon with --tls-dir. A daemon that runs takes a renewed
    certificate up by itself.
    """
    from silo.p2p.tls_authority import Authority

    authority = Authority(ca, SystemClock())
    made = authority.issue(name, address or (), directory=out, days=days, renew=renew)
    _tell(made, json, "certificate", f"on the host: silo serve --tls-dir {made.directory} ...")


def _tell(made: Issued, json: bool, what: str, following: str) -> None:
    from datetime import UTC, datetime

    day = datetime.fromtimestamp(made.expires_at, UTC).date().isoformat()
    if json:
        found: dict[str, Any] = {
            "name": made.name,
            "names": list(made.names),
            "directory": str(made.directory),
            "expires": day,
            "fingerprint": made.fingerprint,
            "created": made.is_new,
        }
        print_json(found)
        return
    verb = "made" if made.is_new else "kept"
    names = f" for {', '.join(made.names)}" if made.names else ""
    console.print(f"{what} {made.name} {verb}{names}: {made.directory}, valid until {day}", markup=False)
    console.print(following, markup=False)
