"""Hosts with network namespaces of their own, joined by a bridge, with links that are slow or cut.

Only for root on Linux; `require_namespaces` skips a test elsewhere. Each `Lab` has names and a bridge of its own and
takes everything down again. Nothing in it reaches the machine's own network, or is reached from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import attrs

from silo.clock import SystemClock
from tests.support.tools import missing, require_tool

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
RATE = "160mbit"


def require_namespaces() -> None:
    """Skip the running test where namespaces cannot be made, or fail it where tools are required."""
    require_tool("ip")
    require_tool("tc")
    if os.geteuid() != 0:
        missing("network namespaces need root")


@attrs.frozen
class Lab:
    """Some hosts by name."""

    namespaces: Mapping[str, str]
    addresses: Mapping[str, str]

    def prefix(self, host: str) -> tuple[str, ...]:
        """What comes before a command that shall run on a host."""
        return ("ip", "netns", "exec", self.namespaces[host])

    async def link(self, host: str, *, up: bool) -> None:
        """Cut the cable of a host, or plug it in again."""
        await _ip("-n", self.namespaces[host], "link", "set", "eth0", "up" if up else "down")

    @contextlib.contextmanager
    def inside(self, host: str):
        """An executor whose one thread lives on a host, and whose children do."""

        def enter() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            fd = os.open(Path("/run/netns") / self.namespaces[host], os.O_RDONLY | os.O_CLOEXEC)
            try:
                if libc.setns(fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(fd)

        with ThreadPoolExecutor(1, initializer=enter) as executor:
            yield executor


@contextlib.asynccontextmanager
async def lab(*hosts: str) -> AsyncIterator[Lab]:
    """Hosts, each with one link of 160 Mbit/s to a common switch."""
    name = f"silo-{SystemClock().token(3).hex()}"
    switch = f"{name}-switch"
    namespaces = {host: f"{name}-{host}" for host in hosts}
    addresses = {host: f"10.199.0.{number}" for number, host in enumerate(hosts, 1)}
    try:
        await _ip("netns", "add", switch)
        await _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        await _ip("-n", switch, "link", "set", "br0", "up")
        for host, namespace in namespaces.items():
            await _ip("netns", "add", namespace)
            await _ip(
                "-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", f"to-{host}", "netns", switch
            )  # fmt: skip
            await _ip("-n", switch, "link", "set", f"to-{host}", "master", "br0", "up")
            await _ip("-n", namespace, "address", "add", f"{addresses[host]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                await _ip("-n", namespace, "link", "set", device, "up")
            await _run(
                "tc", "-n", namespace, "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", RATE, "burst", "128k",
                "latency", "50ms",
            )  # fmt: skip
        yield Lab(namespaces, addresses)
    finally:
        for namespace in (*namespaces.values(), switch):
            with contextlib.suppress(OSError):
                await _ip("netns", "delete", namespace)


async def called(executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    """The result of a call in an executor's thread."""
    return await asyncio.wrap_future(executor.submit(call))


async def _ip(*arguments: str) -> None:
    await _run("ip", *arguments)


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    if process.returncode:
        raise OSError(f"{' '.join(command)}: {said.decode().strip()}")
