"""Our NBD server and nothing else, in a process of its own, for benchmarks and interop tests.

It serves one volume, ``bench/disk``, on the listening socket that it inherits (see `benchmarks.common.child`), and
ends on SIGTERM. A device that starts out as a hole counts as zeros; a file that has content already counts as present,
unless ``--state`` names a state directory that remembers better.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
from pathlib import Path

from silo.abc import BlockDevice, Buffer
from silo.chunkmap import ChunkMap, Residency
from silo.clock import SystemClock
from silo.devices.file import FileDevice
from silo.devices.memory import MemoryDevice
from silo.errors import UnavailableError
from silo.eventloop import AttentiveLoop
from silo.exports.nbd_exports import CONNECTIONS_MAX, NbdExport, NbdExports
from silo.exports.nbd_server import NbdServer
from silo.exports.nbd_tls import NbdTls, server_context
from silo.gate import Gate
from silo.geometry import CHUNK_SIZE_DEFAULT, Geometry
from silo.group import Group
from silo.settings import parse_size
from silo.statedir import GroupState, StateDir
from silo.volume import Volume

__all__ = ["main"]

GROUP, VOLUME = "bench", "disk"
_INHERITED_FD = 3


class UntrackedVolume(Volume):
    """The same volume without its maps on the common path: what tracking costs is the difference."""

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return self.device.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return self.device.write_nowait(offset, data)


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nbd.serve_silo", description=__doc__)
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--memory", metavar="SIZE", help="serve zeros in memory")
    device.add_argument("--file", metavar="PATH", help="serve a file")
    parser.add_argument("--state", metavar="DIR", help="keep the map of the volume in this state directory")
    parser.add_argument("--chunk-size", metavar="SIZE", default=str(CHUNK_SIZE_DEFAULT))
    parser.add_argument("--block-size", metavar="SIZE", default="1", help="smallest unit of requests (1)")
    parser.add_argument("--connections-max", metavar="COUNT", type=int, default=CONNECTIONS_MAX)
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument(
        "--tls", metavar="DIR", help="encrypt, with server-cert.pem and server-key.pem from there"
    )
    parser.add_argument("--no-maps", action="store_true", help="bypass the maps, to measure what they cost")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    with asyncio.Runner(loop_factory=AttentiveLoop) as runner:
        runner.run(_serve(options))


async def _serve(options: argparse.Namespace) -> None:
    device = _open_device(options)
    statedir, state = None, None
    try:
        if options.state:
            statedir = StateDir(options.state)
            state = await statedir.open_group(GROUP)
        volume = await _open_volume(options, device, state)
        exports = NbdExports()
        exports.add(
            NbdExport(
                f"{GROUP}/{VOLUME}",
                volume,
                read_only=options.read_only,
                description="a disk of Silo's",
                block_size=parse_size(options.block_size),
                connections_max=options.connections_max,
            )
        )
        async with asyncio.TaskGroup() as tasks:
            server = NbdServer(exports, tasks, tls=_tls_of(options))
            server.listen(_inherited_listener())
            await _wait_sigterm()
            await server.aclose()
        await volume.flush()
    finally:
        if statedir is not None:
            await statedir.aclose()
        await device.aclose()


def _tls_of(options: argparse.Namespace) -> NbdTls | None:
    if not options.tls:
        return None
    directory = Path(options.tls)
    return NbdTls(server_context(directory / "server-cert.pem", directory / "server-key.pem"))


def _open_device(options: argparse.Namespace) -> BlockDevice:
    if options.memory:
        return MemoryDevice(parse_size(options.memory))
    return FileDevice(options.file)


async def _open_volume(options: argparse.Namespace, device: BlockDevice, state: GroupState | None) -> Volume:
    geometry = Geometry(device.size, chunk_size=parse_size(options.chunk_size))
    is_hole = not await device.data_extents()
    fresh = bytes([Residency.ZERO if is_hole else Residency.PRESENT]) * geometry.chunk_count
    keeper = None if state is None else await state.open_volume(VOLUME, geometry, fresh)
    chunks = ChunkMap(bytearray(fresh) if keeper is None else keeper.buffer, geometry.chunk_count)
    if options.no_maps:
        return UntrackedVolume(VOLUME, device, geometry, Gate())
    return Group(GROUP, SystemClock()).add(VOLUME, device, geometry, chunks=chunks, keeper=keeper)


def _inherited_listener() -> socket.socket:
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise UnavailableError("no socket was inherited", hint="start this through benchmarks.common.child")
    return socket.socket(fileno=_INHERITED_FD)


async def _wait_sigterm() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


if __name__ == "__main__":
    main()
