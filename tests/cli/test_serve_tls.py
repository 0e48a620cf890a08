"""``silo serve`` with certificates, as programs of other projects see it: who gets in, and what travels."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from silo.errors import SiloError
from silo.exports.nbd_client import NbdClient
from tests.support.certificates import Authority
from tests.support.daemons import Daemon

pytestmark = pytest.mark.interop

RequireTool = Callable[[str], str]
MIB = 1 << 20
SIZE = 8 * MIB
TIMEOUT_S = 40.0


async def run(*argv: str | Path, status: int | None = 0) -> str:
    """Run a program; what it printed. Another exit status (``None``: success) is the test's failure."""
    process = await asyncio.create_subprocess_exec(
        *map(str, argv), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(TIMEOUT_S):
        out, _ = await process.communicate()
    wrong = process.returncode == 0 if status is None else process.returncode != status
    assert not wrong, f"{argv} gave {process.returncode}: {out.decode()}"
    return out.decode()


def client_directory(authority: Authority, path: Path, name: str = "") -> Path:
    """What libnbd and QEMU call a directory of credentials, with a certificate of our own if we have a name."""
    path.mkdir()
    shutil.copy(authority.path, path / "ca-cert.pem")
    if name:
        certificate, key = authority.issue(name)
        shutil.copy(certificate, path / "client-cert.pem")
        shutil.copy(key, path / "client-key.pem")
    return path


def serving(tmp_path: Path, authority: Authority, *options: str) -> Daemon:
    """A daemon with one disk, on a TCP port and on a Unix socket."""
    certificate, key = authority.issue("server")
    return Daemon(
        tmp_path / "a", "--group", "vm1", "--volume", f"disk={tmp_path}/disk.img,size={SIZE}",
        "--listen", "tcp:127.0.0.1:0", "--listen", f"unix:{tmp_path}/nbd.sock",
        "--nbd-certificate", str(certificate), "--nbd-key", str(key), *options,
    )  # fmt: skip


async def uris(daemon: Daemon) -> tuple[str, str]:
    """The disk's addresses: on TCP, by the name in the certificate, and on the Unix socket."""
    group = await daemon.group("vm1")
    tcp, unix = group["volumes"][0]["uris"]
    return tcp.replace("127.0.0.1", "localhost"), unix


async def test_encrypted_copies_there_and_back(tmp_path: Path, require_tool: RequireTool) -> None:
    """nbdinfo, nbdcopy and QEMU over TLS; in the clear nobody gets in; the Unix socket stays as it was."""
    authority = Authority(tmp_path)
    nbdinfo, nbdcopy = require_tool("nbdinfo"), require_tool("nbdcopy")
    original = tmp_path / "original"
    original.write_bytes(os.urandom(MIB) + bytes(5 * MIB) + os.urandom(2 * MIB))
    certificates = client_directory(authority, tmp_path / "pki")
    async with serving(tmp_path, authority) as daemon:
        tcp, unix = await uris(daemon)
        assert tcp.startswith("nbds://localhost:")
        assert unix.startswith("nbd+unix://")
        secure = f"{tcp}?tls-certificates={certificates}"
        await run(nbdcopy, "--flush", original, secure)
        (export,) = json.loads(await run(nbdinfo, "--json", secure))["exports"]
        assert export["export-size"] == SIZE
        assert json.loads(await run(nbdinfo, "--json", secure))["TLS"] is True
        await run(nbdcopy, secure, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == original.read_bytes()
        await run(nbdcopy, unix, tmp_path / "local")
        assert (tmp_path / "local").read_bytes() == original.read_bytes()
        await run(nbdinfo, tcp.replace("nbds:", "nbd:"), status=1)
        port = tcp.split(":")[2].split("/")[0]
        options = f"driver=nbd,host=localhost,port={port},export=vm1/disk,tls-creds=tls"
        credentials = f"tls-creds-x509,id=tls,dir={certificates},endpoint=client"
        told = await run(
            require_tool("qemu-img"),
            "info",
            "--output=json",
            "--object",
            credentials,
            "--image-opts",
            options,
        )
        assert json.loads(told)["virtual-size"] == SIZE


@pytest.mark.parametrize("clients", ["required", "optional"])
async def test_clients_are_asked_who_they_are(
    tmp_path: Path, require_tool: RequireTool, clients: str
) -> None:
    """Those that our authority has signed get in, strangers do not, and who shows nothing only if that is optional."""
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    known = client_directory(authority, tmp_path / "known", "client")
    nobody = client_directory(authority, tmp_path / "nobody")
    false = client_directory(stranger, tmp_path / "false", "impostor")
    shutil.copy(authority.path, false / "ca-cert.pem")
    nbdinfo = require_tool("nbdinfo")
    options = ("--nbd-client-ca", str(authority.path), "--nbd-client-certificates", clients)
    async with serving(tmp_path, authority, *options) as daemon:
        tcp, _ = await uris(daemon)
        assert f"{SIZE}" in await run(nbdinfo, "--size", f"{tcp}?tls-certificates={known}")
        await run(nbdinfo, "--size", f"{tcp}?tls-certificates={false}", status=None)
        status = None if clients == "required" else 0
        await run(nbdinfo, "--size", f"{tcp}?tls-certificates={nobody}", status=status)
        assert not daemon.log, "what a client does wrong is no warning of ours"


async def test_optional_encryption_lets_clear_clients_in(tmp_path: Path, require_tool: RequireTool) -> None:
    """Both kinds at one address."""
    authority = Authority(tmp_path)
    certificates = client_directory(authority, tmp_path / "pki")
    async with serving(tmp_path, authority, "--nbd-tls", "optional") as daemon:
        tcp, _ = await uris(daemon)
        for uri in (tcp.replace("nbds:", "nbd:"), f"{tcp}?tls-certificates={certificates}"):
            assert await run(require_tool("nbdinfo"), "--size", uri) == f"{SIZE}\n"


async def test_certificates_that_cannot_be_used_are_named_at_start(tmp_path: Path) -> None:
    """Before any group is opened: there is nothing on the disk afterwards."""
    authority = Authority(tmp_path)
    daemon = serving(tmp_path, authority, "--nbd-key", str(tmp_path / "nowhere.key"))
    with pytest.raises(SiloError, match=r"server\.pem"):
        await daemon.start()
    await daemon.stop()
    assert not (tmp_path / "disk.img").exists()
    daemon = serving(tmp_path, authority, "--nbd-client-certificates", "sometimes")
    with pytest.raises(SiloError, match="sometimes"):
        await daemon.start()
    await daemon.stop()


async def test_limits_of_the_file_are_kept(tmp_path: Path) -> None:
    """The oldest of too many connections is closed; a silent client does not stay."""
    config = tmp_path / "silo.toml"
    config.write_text('[nbd]\nconnections = 2\nhandshake_timeout = "300ms"\nmemory = "1M"\n')
    path = f"{tmp_path}/nbd.sock"
    daemon = Daemon(
        tmp_path / "a", str(config), "--group", "vm1", "--volume", f"disk={tmp_path}/disk.img,size={SIZE}",
        "--listen", f"unix:{path}",
    )  # fmt: skip
    async with daemon:
        silent, writer = await asyncio.open_unix_connection(path)
        clients = [await NbdClient.connect(f"unix:{path}") for _ in range(3)]
        with pytest.raises(SiloError):
            await clients[0].read(0, 512)
        for client in clients[1:]:
            assert await client.read(0, 512) == bytes(512)
        async with asyncio.timeout(TIMEOUT_S):
            assert len(await silent.read()) == 18, "the greeting, and then the end"
        for client in clients:
            client.abort()
        writer.close()
