"""``silo serve``: the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from silo.cli.keys import KeyCommand, KeyFile
from silo.cli.output import console, print_json
from silo.config import ServeConfig, load_config, merge_flags
from silo.eventloop import AttentiveLoop

__all__ = ["add_to", "run_loop"]


def _flag(help_text: str) -> Any:
    """An option without default: what is not given is taken from the file."""
    return typer.Option(help=help_text, show_default=False)


Config = Annotated[
    Path | None, typer.Argument(help="A TOML file; it can say more than the flags.", show_default=False)
]
GroupName = Annotated[str | None, _flag("Open this group. Without any group, wait for one to arrive.")]
Volumes = Annotated[
    list[str] | None,
    _flag(
        "NAME=PATH[,size=8G][,chunk_size=64K][,read_only=true][,base=IMAGE][,import=URI]: a disk of the group; with "
        "base, copy-on-write over that image; with import, a new disk begins with what that NBD server has. "
        "Repeatable."
    ),
]
Listen = Annotated[
    list[str] | None,
    _flag("Serve NBD here: unix:/path or tcp:HOST:PORT. {group} is the group's name. Repeatable."),
]
Store = Annotated[
    str | None,
    _flag(
        "Where the crash-consistent copy is kept: file:///dir or s3://bucket/prefix. Credentials come from the "
        "environment."
    ),
]
SyncInterval = Annotated[str | None, _flag("Time between two cuts: 500ms, 5s, 1m. Default 5s.")]
State = Annotated[str | None, _flag("Maps, records and the control socket. Default /var/lib/silo.")]
Peer = Annotated[str | None, _flag("Let other hosts bring groups here: tcp:HOST:PORT or unix:/path.")]
TlsDir = Annotated[
    str | None,
    _flag(
        "Talk to other hosts over mutual TLS, with the certificate in this directory (`silo certs issue`)."
    ),
]
TlsAnyName = Annotated[
    bool | None,
    typer.Option(
        "--tls-any-name",
        help="Accept any host of the fleet where one was dialled, whatever name its certificate has.",
    ),
]
InsecurePeer = Annotated[
    bool | None,
    typer.Option("--insecure-peer", help="Plain TCP between hosts, in a network that you trust."),
]
Incoming = Annotated[
    str | None, _flag("Directory for the disks of arriving groups. Default: <state>/incoming.")
]
NbdCertificate = Annotated[
    str | None, _flag("Serve NBD over TLS at TCP addresses: the server's certificate, a PEM file.")
]
NbdKey = Annotated[str | None, _flag("The key of --nbd-certificate, a PEM file.")]
NbdTlsPolicy = Annotated[
    str | None, _flag("required, or optional: clients may stay in the clear. Default required.")
]
NbdClientCa = Annotated[
    str | None, _flag("Clients must show a certificate that this authority has signed: a PEM file.")
]
NbdClients = Annotated[str | None, _flag("required, or optional: clients may show none. Default required.")]
HostIsDead = Annotated[
    bool,
    typer.Option(
        "--host-is-dead",
        help="Take the group over although its last owner did not release it. You assert that no other host "
        "serves it any more; what that host had not stored is lost.",
    ),
]
Lease = Annotated[
    str | None,
    _flag(
        "Serve no longer than this after the store last said that the group is ours: 30s. Then another host may take "
        "over by itself (--after-lease); but I/O stalls while the store is away. Default: no lease."
    ),
]
Metrics = Annotated[str | None, _flag("Serve numbers for Prometheus here: tcp:127.0.0.1:9090.")]
Flush = Annotated[
    str | None,
    _flag(
        "local, or store: an fsync of the guest returns when the store has what it covers, and survives the loss of "
        "this host. Default local."
    ),
]
AfterLease = Annotated[
    bool,
    typer.Option(
        "--after-lease",
        help="Take the group over although its last owner did not release it, after waiting until its lease has ended. "
        "An owner that lives keeps it. What that host had not stored is lost.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Events as JSON lines.")]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(serve)


def serve(
    config: Config = None,
    group: GroupName = None,
    volume: Volumes = None,
    listen: Listen = None,
    store: Store = None,
    sync_interval: SyncInterval = None,
    state: State = None,
    peer: Peer = None,
    tls_dir: TlsDir = None,
    tls_any_name: TlsAnyName = None,
    insecure_peer: InsecurePeer = None,
    incoming: Incoming = None,
    nbd_certificate: NbdCertificate = None,
    nbd_key: NbdKey = None,
    nbd_tls: NbdTlsPolicy = None,
    nbd_client_ca: NbdClientCa = None,
    nbd_client_certificates: NbdClients = None,
    flush: Flush = None,
    metrics: Metrics = None,
    lease: Lease = None,
    encryption_key_file: KeyFile = "",
    encryption_key_command: KeyCommand = "",
    host_is_dead: HostIsDead = False,
    after_lease: AfterLease = False,
    json: Json = False,
) -> None:
    """Serve disks over NBD, keep their copy in a store, and move them to other hosts.

    The exports are named GROUP/VOLUME; the bare volume name and the empty name are aliases while they are
    unambiguous. SIGTERM stores what is not stored yet and ends; a second one ends at once.

    Examples:

        silo serve --group vm1 --volume disk=disk.img,size=8G --listen unix:/run/silo/vm1.sock --store file:///srv/s

        silo serve --peer tcp:0.0.0.0:5170 --tls-dir /etc/silo/tls --listen unix:/run/silo/{group}.sock --store s3://b/silo
    """
    merged = merge_flags(
        load_config(config) if config is not None else ServeConfig(),
        group=group,
        volumes=volume or (),
        listen=listen or (),
        sync_interval=sync_interval,
        flush=flush,
        metrics=metrics,
        lease=lease,
        key_file=encryption_key_file,
        key_command=encryption_key_command,
        store=store,
        state=state,
        peer=peer,
        tls_dir=tls_dir,
        tls_any_name=tls_any_name,
        insecure_peer=insecure_peer,
        incoming=incoming,
        nbd=_nbd(nbd_certificate, nbd_key, nbd_tls, nbd_client_ca, nbd_client_certificates),
    )
    from silo.daemon import serve_until_told

    def say(event: dict[str, Any], text: str) -> None:
        if json:
            print_json(event)
        else:
            console.print(text, markup=False)

    run_loop(serve_until_told(merged, say, host_is_dead=host_is_dead, after_lease=after_lease))


def _nbd(*values: str | None) -> dict[str, str | None]:
    """The settings of NBD under the names that they have in the file."""
    return dict(zip(("certificate", "key", "tls", "client_ca", "client_certificates"), values, strict=True))


def run_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on a loop that is quick to answer guests (`silo.eventloop`)."""
    with asyncio.Runner(loop_factory=AttentiveLoop) as runner:
        runner.run(work)
