"""`silo certs`, and daemons that know one another by what it makes: real processes, over loopback TCP."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from silo.clock import SystemClock
from silo.errors import SiloError
from silo.exports.nbd_client import NbdClient
from tests.cli.test_cli import silo
from tests.support.daemons import Daemon
from tests.support.fleet import Fleet

MIB = 1 << 20


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


async def certs(*arguments: str | Path) -> dict[str, object]:
    code, out, err = await silo("certs", *arguments, "--json")
    assert code == 0, err
    return msgspec.json.decode(out)


async def test_the_commands(tmp_path):
    """Make an authority and a host, twice each; the second time says that nothing was made."""
    ca = tmp_path / "ca"
    first, again = await certs("init", ca), await certs("init", ca)
    assert (first["created"], again["created"]) == (True, False)
    host = await certs("issue", "hosta", "--ca", ca, "--address", "10.0.0.5")
    assert host["names"] == ["hosta", "10.0.0.5"]
    assert sorted(path.name for path in Path(str(host["directory"])).iterdir()) == [
        "ca.crt", "host.crt", "host.key",
    ]  # fmt: skip
    code, out, _ = await silo("certs", "issue", "hosta", "--ca", ca, "--address", "10.0.0.5")
    assert code == 0
    assert "kept for hosta, 10.0.0.5" in " ".join(out.split())
    assert "silo serve --tls-dir" in out


async def test_mistakes_are_sentences(tmp_path):
    """No authority, a name that is none: what is wrong and what to do."""
    code, _, err = await silo("certs", "issue", "hosta", "--ca", tmp_path)
    assert code == 1
    assert "silo certs init" in err
    await certs("init", tmp_path)
    code, _, err = await silo("certs", "issue", "../hosta", "--ca", tmp_path)
    assert code == 1
    assert "neither a host name nor an address" in err


def source(directory: Path, *security: str | Path) -> Daemon:
    return Daemon(
        directory / "a", "--group", "vm1", "--volume", f"disk={directory}/a.img,size=4M",
        "--listen", f"unix:{directory}/a.sock", *map(str, security),
    )  # fmt: skip


def target(directory: Path, port: int, *security: str | Path) -> Daemon:
    return Daemon(
        directory / "b", "--peer", f"tcp:127.0.0.1:{port}", "--listen", f"unix:{directory}/b.sock",
        *map(str, security),
    )  # fmt: skip


async def test_a_group_moves_between_two_processes_over_tls(tmp_path):
    """Every byte arrives; a daemon of another fleet is turned away before and after."""
    fleet, other = Fleet(tmp_path / "fleet"), Fleet(tmp_path / "other")
    content = SystemClock().token(2 * MIB)
    port = free_port()
    url = f"tcp:127.0.0.1:{port}"
    async with target(tmp_path, port, "--tls-dir", fleet.host("b").key.parent) as b:
        (tmp_path / "stranger").mkdir()
        async with source(tmp_path / "stranger", "--tls-dir", other.host("a").key.parent) as stranger:
            with pytest.raises(SiloError, match="is not accepted"):
                await stranger.migrate("vm1", url)
        async with source(tmp_path, "--tls-dir", fleet.host("a").key.parent) as a:
            async with await NbdClient.connect(f"nbd+unix:///vm1/disk?socket={tmp_path}/a.sock") as guest:
                await guest.write(MIB, content)
            report = (await a.migrate("vm1", url))["report"]
            assert report["outcome"] == "released"
        async with await NbdClient.connect(f"nbd+unix:///vm1/disk?socket={tmp_path}/b.sock") as guest:
            assert bytes(await guest.read(MIB, len(content))) == content
        assert "does not accept the certificate of this host" in b.log
        for secret in (fleet.host("b").key, fleet.host("a").key):
            line = secret.read_text().splitlines()[1]
            assert line not in a.log + b.log


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        ("nothing", "tls", "without encryption"),
        ("plain", "tls", "the other host speaks TLS, and this one does not"),
        ("tls", "plain", "closed the connection during the TLS handshake"),
    ],
)
async def test_tls_on_one_side_only(tmp_path, here, there, said):
    """`silo migrate` says which side lacks what, and the guest stays where it is."""
    fleet, port = Fleet(tmp_path / "fleet"), free_port()

    def security(name: str, how: str) -> Sequence[str | Path]:
        if how == "tls":
            return "--tls-dir", fleet.host(name).key.parent
        return ("--insecure-peer",) if how == "plain" else ()

    async with (
        target(tmp_path, port, *security("b", there)) as b,
        source(tmp_path, *security("a", here)) as a,
    ):
        code, _, err = await silo("migrate", "vm1", "--to", f"tcp:127.0.0.1:{port}", "--state", a.state)
        assert code == 1
        assert said in " ".join(err.split())
        assert "--tls-dir" in err or "speak TLS" in err
        assert (await a.group("vm1"))["state"] == "running"
        if here == "plain":
            assert "does not speak TLS" in b.log
        if there == "plain":
            assert "the other host speaks TLS" in b.log
