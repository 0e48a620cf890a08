"""Programs that people use with NBD, against our server."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.common.child import resident_bytes
from tests.interop.conftest import EXPORT_SIZE, StartServer
from tests.support.nbd import NbdServerProcess

pytestmark = pytest.mark.interop

RequireTool = Callable[[str], str]
MIB = 1 << 20


def run(*argv: str | Path, status: int = 0) -> str:
    """Run a program to its end; what it printed. Any other exit status is the test's failure.

    Only the system's directories are searched: ``nbdsh`` needs the Python that its module was built for.
    """
    system = {**os.environ, "PATH": os.defpath}
    done = subprocess.run(
        [str(part) for part in argv], capture_output=True, text=True, timeout=50, check=False, env=system
    )
    assert done.returncode == status, f"{argv} gave {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def sparse_file(path: Path, size: int, seed: int) -> Path:
    """A file of data and holes, with lengths that are no multiple of a chunk, and a hole at its end."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        position = 0
        while position < size - MIB:
            length = 512 * chance.randrange(1, 1024)
            file.seek(position)
            file.write(chance.randbytes(min(length, size - MIB - position)))
            position += length + 512 * chance.randrange(0, 4096)
    return path


def test_nbdinfo_tells_what_we_told_it(require_tool: RequireTool, served: NbdServerProcess) -> None:
    """Size, abilities and contexts, of the named export and of the default one."""
    nbdinfo = require_tool("nbdinfo")
    for name in ("disk", ""):
        (export,) = json.loads(run(nbdinfo, "--json", served.uri(name)))["exports"]
        assert export["export-size"] == EXPORT_SIZE
        assert export["contexts"][0] == "base:allocation"
        wanted = ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_cache", "can_df")
        assert [export[ability] for ability in wanted] == [True] * len(wanted)
        assert not export["is_read_only"]
    assert run(nbdinfo, "--size", served.uri("disk")) == f"{EXPORT_SIZE}\n"


def test_nbdinfo_lists_the_exports(require_tool: RequireTool, served: NbdServerProcess) -> None:
    listed = json.loads(run(require_tool("nbdinfo"), "--list", "--json", served.uri()))
    assert [export["export-name"] for export in listed["exports"]] == ["bench/disk"]
    assert listed["structured"]


def test_nbdinfo_refuses_an_unknown_export(require_tool: RequireTool, served: NbdServerProcess) -> None:
    run(require_tool("nbdinfo"), served.uri("no-such-export"), status=1)


def test_nbdinfo_sees_a_read_only_export(require_tool: RequireTool, start_server: StartServer) -> None:
    server = start_server("--memory", "1M", "--read-only")
    (export,) = json.loads(run(require_tool("nbdinfo"), "--json", server.uri("disk")))["exports"]
    assert export["is_read_only"]
    run(require_tool("nbdinfo"), "--is", "read-only", server.uri("disk"))


def test_nbdinfo_maps_data_and_holes(require_tool: RequireTool, start_server: StartServer) -> None:
    """A fresh export is one hole; a write makes data of the chunk that it touches and of no other."""
    server = start_server("--memory", "1M")
    nbdinfo = require_tool("nbdinfo")

    def mapped() -> list[tuple[int, int, int]]:
        extents = json.loads(run(nbdinfo, "--map", "--json", server.uri("disk")))
        return [(extent["offset"], extent["length"], extent["type"]) for extent in extents]

    assert mapped() == [(0, MIB, 3)]
    run(require_tool("qemu-io"), "-f", "raw", "-c", "write -P 1 128k 4k", server.uri("disk"))
    assert mapped() == [(0, 128 << 10, 3), (128 << 10, 64 << 10, 0), (192 << 10, MIB - (192 << 10), 3)]


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_nbdcopy_there_and_back(
    require_tool: RequireTool, start_server: StartServer, tmp_path: Path, tcp: bool
) -> None:
    """A sparse file is the same after both ways, over several connections, and zeros travel as zeros."""
    server = start_server("--memory", str(EXPORT_SIZE), tcp=tcp)
    nbdcopy = require_tool("nbdcopy")
    original = sparse_file(tmp_path / "original", EXPORT_SIZE, seed=1)
    run(nbdcopy, "--flush", "--connections=4", "--requests=32", original, server.uri("disk"))
    run(nbdcopy, "--connections=4", server.uri("disk"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == original.read_bytes()
    run(nbdcopy, "--destination-is-zero", server.uri("disk"), tmp_path / "sparse")
    assert (tmp_path / "sparse").read_bytes() == original.read_bytes()


def test_nbdcopy_between_two_of_our_servers(
    require_tool: RequireTool, start_server: StartServer, tmp_path: Path
) -> None:
    original = sparse_file(tmp_path / "original", EXPORT_SIZE, seed=2)
    first, second = (start_server("--memory", str(EXPORT_SIZE)) for _ in range(2))
    nbdcopy = require_tool("nbdcopy")
    run(nbdcopy, original, first.uri("disk"))
    run(nbdcopy, "--flush", first.uri("disk"), second.uri("disk"))
    run(nbdcopy, second.uri("disk"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == original.read_bytes()


def test_qemu_img_converts_and_compares(
    require_tool: RequireTool, start_server: StartServer, tmp_path: Path
) -> None:
    """In as raw and out as qcow2; and a difference is found when there is one."""
    server = start_server("--memory", str(EXPORT_SIZE))
    qemu_img = require_tool("qemu-img")
    original = sparse_file(tmp_path / "original", EXPORT_SIZE, seed=3)
    run(qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", original, server.uri("disk"))
    run(qemu_img, "compare", "-f", "raw", "-F", "raw", original, server.uri("disk"))
    run(qemu_img, "convert", "-f", "raw", "-O", "qcow2", server.uri("disk"), tmp_path / "copy.qcow2")
    run(qemu_img, "compare", "-f", "qcow2", "-F", "raw", tmp_path / "copy.qcow2", original)
    run(require_tool("qemu-io"), "-f", "raw", "-c", "write -P 77 1M 512", server.uri("disk"))
    run(qemu_img, "compare", "-f", "raw", "-F", "raw", original, server.uri("disk"), status=1)


def test_qemu_img_measures_what_is_allocated(require_tool: RequireTool, start_server: StartServer) -> None:
    server = start_server("--memory", "16M")
    run(require_tool("qemu-io"), "-f", "raw", "-c", "write -P 1 4M 1M", server.uri("disk"))
    told = json.loads(run(require_tool("qemu-img"), "map", "-f", "raw", "--output=json", server.uri("disk")))
    data = [(extent["start"], extent["length"]) for extent in told if extent["data"]]
    assert data == [(4 << 20, 1 << 20)]


def test_qemu_io_patterns(require_tool: RequireTool, served: NbdServerProcess) -> None:
    """Every kind of write, and what is read after each, at alignments that cut blocks and chunks."""
    commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 65024 1024",
        "read -P 0x11 0 65024",
        "read -P 0x22 65024 1024",
        "read -P 0x11 66048 982528",
        "write -z 128k 64k",
        "read -P 0 128k 64k",
        "write -z -u 200k 1k",
        "read -P 0 200k 1k",
        "read -P 0x11 201k 55k",
        "write -z -f 700k 100k",
        "read -P 0 700k 100k",
        "discard 256k 128k",
        "write -P 0x33 300k 4k",
        "read -P 0x33 300k 4k",
        "aio_write -P 0x44 2M 256k",
        "aio_write -P 0x55 3M 256k",
        "aio_flush",
        "read -P 0x44 2M 256k",
        "read -P 0x55 3M 256k",
        "writev -P 0x66 4M 512 1024 65536 512",
        "readv -P 0x66 4M 65536 2048",
        "flush",
    ]
    printed = run(
        require_tool("qemu-io"), "-f", "raw", *(f"-c{command}" for command in commands), served.uri("disk")
    )
    assert "Pattern verification failed" not in printed
    assert printed.count("ops; ") == len(commands) - 2


def test_qemu_io_notices_a_wrong_pattern(require_tool: RequireTool, served: NbdServerProcess) -> None:
    """The check of the test above can fail."""
    run(
        require_tool("qemu-io"),
        "-f",
        "raw",
        "-c",
        "write -P 1 0 4k",
        "-c",
        "read -P 2 0 4k",
        served.uri("disk"),
        status=1,
    )


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("block_size", ["4k", "512-256k"])
def test_fio_verifies(
    require_tool: RequireTool, start_server: StartServer, tmp_path: Path, tcp: bool, block_size: str
) -> None:
    """Random reads and writes at depth by several jobs, each block checked by its own checksum."""
    server = start_server("--memory", str(EXPORT_SIZE), tcp=tcp)
    sizes = f"--bsrange={block_size}" if "-" in block_size else f"--bs={block_size}"
    run(
        require_tool("fio"),
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={server.uri('disk')}",
        "--rw=randrw",
        sizes,
        "--bs_unaligned=0",
        "--iodepth=32",
        "--numjobs=2",
        f"--size={EXPORT_SIZE // 2}",
        f"--offset_increment={EXPORT_SIZE // 2}",
        "--io_size=24m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_backlog=256",
        f"--randseed={int.from_bytes(os.urandom(4))}",
        f"--aux-path={tmp_path}",
    )
    server.check()


def test_memory_is_bounded_by_the_server_and_not_by_its_clients(
    require_tool: RequireTool, start_server: StartServer, tmp_path: Path
) -> None:
    """16 connections with 128 requests of 256 KiB each have 512 MiB in flight; the server holds 64 MiB at most."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(256 * MIB)
    server = start_server("--file", str(image))
    run(require_tool("nbdinfo"), "--size", server.uri("disk"))
    before = peak = resident_bytes(server.pid)
    load = [
        "--rw=randrw",
        "--bs=256k",
        "--iodepth=128",
        "--numjobs=16",
        "--size=256m",
        "--time_based",
        "--runtime=3",
    ]
    argv = [require_tool("fio"), "--name=flood", "--ioengine=nbd", f"--uri={server.uri('disk')}", *load]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as fio:
        while fio.poll() is None:
            peak = max(peak, resident_bytes(server.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                fio.wait(0.02)
        assert fio.stdout is not None
        assert fio.returncode == 0, fio.stdout.read()
    assert peak - before <= 64 * MIB


def test_nbdsh_runs_a_script(require_tool: RequireTool, served: NbdServerProcess) -> None:
    script = "h.pwrite(b'silo' * 128, 512); assert h.pread(512, 512) == b'silo' * 128; print(h.get_size())"
    assert run(require_tool("nbdsh"), "-u", served.uri("disk"), "-c", script) == f"{EXPORT_SIZE}\n"
