"""The servers that take turns: ours with and without maps, nbdkit, qemu-nbd; in memory and on a file.

Like is compared with like. In memory: ours on a `MemoryDevice`, nbdkit's memory plugin, and qemu-nbd (which has no
such thing) on a file in tmpfs. On a file: all three on a raw file in the same directory, through the page cache
(``--cache=writeback`` for qemu-nbd), where a flush is an fsync. Every server has written all of its bytes before
anything is measured, answers as many connections as fio opens, and gets its socket ready-made. Over TLS all show the
same certificate and ask the client for none.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs

from benchmarks.common.child import ListeningChild, listen_tcp, listen_unix
from benchmarks.nbd.fio import Client

__all__ = ["CONTENDERS", "TRANSPORTS", "Contender", "Site", "make_certificates"]

TRANSPORTS = ("unix", "tcp", "tls")


@attrs.frozen
class Site:
    """Where a contender may put its things, and how it is reached."""

    directory: Path
    """For sockets, logs, state."""
    disk: Path
    """A directory on a real file system, for the file contenders."""
    memory: Path
    """A directory in tmpfs."""
    transport: str
    """``unix``, ``tcp``, or ``tls``, which is TLS over TCP."""
    size: int

    def listener(self, name: str) -> socket.socket:
        """A fresh listening socket for a contender."""
        return listen_unix(self.directory / f"{name}.sock") if self.transport == "unix" else listen_tcp()

    @property
    def home(self) -> Path | None:
        """The clients' home directory, when they need certificates."""
        return self.directory / "home" if self.transport == "tls" else None

    @property
    def certificates(self) -> Path | None:
        """Where the certificates are, when the transport needs any."""
        return self.home and self.home / ".pki" / "libnbd"

    def client(self, server: ListeningChild) -> Client:
        """How fio reaches a contender."""
        uri = server.uri() if self.home is None else f"nbds://localhost:{server.address[1]}/"
        return Client(uri, self.home)

    def image(self, name: str, *, on_disk: bool) -> Path:
        """A sparse file of the right size for a contender."""
        path = (self.disk if on_disk else self.memory) / f"{name}.img"
        with path.open("wb") as file:
            file.truncate(self.size)
        return path


@attrs.frozen
class Contender:
    """A server that can be started; ``medium`` says with which others it may be compared."""

    name: str
    medium: str
    """``memory`` or ``file``."""
    ours: bool
    command: Callable[[Site], list[str]]
    maps: bool = True
    """False for ours without maps."""

    def start(self, site: Site) -> ListeningChild:
        """Start the server; the caller leaves the context to stop it."""
        return ListeningChild(
            self.command(site), site.listener(self.name), site.directory / f"{self.name}.log"
        )


def make_certificates(site: Site) -> None:
    """An authority and a server's certificate for localhost, under the names that nbdkit, QEMU and libnbd expect."""
    if site.certificates is None:
        return
    site.certificates.mkdir(parents=True)
    site.directory.chmod(0o711)  # the client may be somebody else
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    authority = [*request, "-subj", "/CN=benchmark", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"]
    server = [*request, "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-subj", "/CN=localhost"]
    server += ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    server += ["-keyout", "server-key.pem", "-out", "server-cert.pem"]
    for command in (authority, server):
        subprocess.run(command, cwd=site.certificates, check=True, capture_output=True)


def _silo(site: Site, *options: str) -> list[str]:
    tls = ["--tls", str(site.certificates)] if site.certificates else []
    return [sys.executable, "-m", "benchmarks.nbd.serve_silo", *options, *tls]


def _nbdkit(site: Site, *plugin: str) -> list[str]:
    tls = ["--tls=require", f"--tls-certificates={site.certificates}"] if site.certificates else []
    return ["nbdkit", "-f", *tls, *plugin]


def _qemu_nbd(site: Site, name: str, *, on_disk: bool) -> list[str]:
    options = ["--persistent", "--shared=64", "--cache=writeback", "--discard=unmap"]
    if site.certificates:
        credentials = f"tls-creds-x509,id=tls,endpoint=server,dir={site.certificates},verify-peer=off"
        options += ["--object", credentials, "--tls-creds=tls"]
    return ["qemu-nbd", "--format=raw", *options, str(site.image(name, on_disk=on_disk))]


CONTENDERS = (
    Contender("silo-memory", "memory", True, lambda site: _silo(site, "--memory", str(site.size))),
    Contender(
        "silo-memory-nomaps",
        "memory",
        True,
        lambda site: _silo(site, "--memory", str(site.size), "--no-maps"),
        maps=False,
    ),
    Contender("nbdkit-memory", "memory", False, lambda site: _nbdkit(site, "memory", str(site.size))),
    Contender(
        "qemu-nbd-tmpfs", "memory", False, lambda site: _qemu_nbd(site, "qemu-nbd-tmpfs", on_disk=False)
    ),
    Contender(
        "silo-file",
        "file",
        True,
        lambda site: _silo(site, "--file", str(site.image("silo-file", on_disk=True))),
    ),
    Contender(
        "nbdkit-file",
        "file",
        False,
        lambda site: _nbdkit(site, "file", str(site.image("nbdkit-file", on_disk=True))),
    ),
    Contender("qemu-nbd-file", "file", False, lambda site: _qemu_nbd(site, "qemu-nbd-file", on_disk=True)),
)
