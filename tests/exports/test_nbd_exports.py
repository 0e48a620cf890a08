"""Names of exports, and what an export asks of its connections before it admits another."""

from __future__ import annotations

import asyncio

import pytest

from silo.devices.memory import MemoryDevice
from silo.errors import InvalidRequestError
from silo.exports.nbd_exports import NbdExport, NbdExports
from silo.volume import Volume
from tests.support.nbd_peer import condition
from tests.support.volumes import CHUNK, make_volume


def volume(name: str = "disk") -> Volume:
    return make_volume(MemoryDevice(CHUNK), name=name)[1]


def names(exports: NbdExports, *asked: str) -> list[str | None]:
    found = [exports.get(name) for name in asked]
    return [export.name if export else None for export in found]


async def test_aliases_hold_while_they_are_unambiguous():
    """The bare volume and the empty name mean the only candidate there is, and nothing when there are two."""
    exports = NbdExports()
    assert names(exports, "", "disk") == [None, None]
    exports.add(NbdExport("vm1/disk", volume()))
    assert names(exports, "", "disk", "vm1/disk", "vm1", "vm2/disk") == ["vm1/disk"] * 3 + [None] * 2
    exports.add(NbdExport("vm1/memory", volume()))
    assert names(exports, "", "disk", "memory") == [None, "vm1/disk", "vm1/memory"]
    exports.add(NbdExport("vm2/disk", volume()))
    assert names(exports, "disk", "vm1/disk", "vm2/disk") == [None, "vm1/disk", "vm2/disk"]
    await exports.remove("vm1/disk")
    assert names(exports, "disk", "vm1/disk") == ["vm2/disk", None]


async def test_names_are_taken_once():
    """Two volumes cannot share a name."""
    exports = NbdExports()
    exports.add(NbdExport("vm/disk", volume()))
    with pytest.raises(InvalidRequestError):
        exports.add(NbdExport("vm/disk", volume()))


async def test_the_handshake_learns_what_it_tells():
    """Size of the moment, constraints, read-only of the export or of its volume."""
    exports = NbdExports()
    disk = volume()
    exports.add(NbdExport("vm/disk", disk, description="text", block_size=512, payload_max=1 << 20))
    info = exports.find("disk")
    assert info is not None
    assert (info.name, info.size, info.description, info.read_only) == ("vm/disk", CHUNK, "text", False)
    assert (info.sizes.minimum, info.sizes.preferred, info.sizes.maximum) == (512, 4096, 1 << 20)
    assert exports.find("nothing") is None
    disk.read_only = True
    assert NbdExport("x", disk).info.read_only
    assert NbdExport("x", volume(), read_only=True).info.read_only
    assert [listed.name for listed in exports.listed()] == ["vm/disk"]


class Scripted:
    """A connection that settles, drains and closes when a test lets it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.settled = asyncio.Event()
        self.closed = asyncio.Event()

    async def settle(self) -> None:
        self.log.append("settle")
        await self.settled.wait()

    def abort(self) -> None:
        self.log.append("abort")
        self.settled.set()

    def drain(self) -> None:
        self.log.append("drain")

    async def wait_closed(self) -> None:
        await self.closed.wait()


async def test_a_new_connection_waits_until_the_older_ones_have_settled():
    """Every older one, and no newer one."""
    export = NbdExport("vm/disk", volume())
    first, second, third = Scripted(), Scripted(), Scripted()
    await export.admit(first)
    async with asyncio.TaskGroup() as tasks:
        admitted = tasks.create_task(export.admit(second))
        await condition(lambda: first.log == ["settle"])
        later = tasks.create_task(export.admit(third))
        await condition(lambda: first.log == ["settle", "settle"] and second.log == ["settle"])
        first.settled.set()
        await admitted
        assert not later.done()
        second.settled.set()
        await later
    assert export.connections == (first, second, third)
    export.dismiss(first)
    export.dismiss(first)
    assert export.connections == (second, third)


async def test_a_connection_that_cannot_settle_is_closed():
    """Its requests are cancelled, and only then may the new connection begin."""
    export = NbdExport("vm/disk", volume(), settle_timeout_s=0.01)
    stuck, fine, new = Scripted(), Scripted(), Scripted()
    fine.settled.set()
    await export.admit(stuck)
    export.dismiss(stuck)
    await export.admit(fine)
    export.dismiss(fine)
    export._connections = {stuck: None, fine: None}
    async with asyncio.TaskGroup() as tasks:
        admitted = tasks.create_task(export.admit(new))
        await condition(lambda: "abort" in stuck.log, turns=10_000_000)
        assert not admitted.done()
        stuck.closed.set()
        await admitted
    assert "abort" not in fine.log


async def test_one_connection_too_many_closes_the_oldest():
    """A client that reconnects for ever cannot exhaust the server, and always gets in."""
    export = NbdExport("vm/disk", volume(), connections_max=2)
    some = [Scripted() for _ in range(4)]
    for connection in some:
        connection.settled.set()
        await export.admit(connection)
    assert [connection.log.count("abort") for connection in some] == [2, 1, 0, 0]


@pytest.mark.parametrize("in_time", [True, False])
async def test_removing_an_export_drains_its_connections(in_time: bool):
    """Drained in time, or closed; unknown to new clients at once."""
    exports = NbdExports()
    export = NbdExport("vm/disk", volume())
    exports.add(export)
    connection = Scripted()
    await export.admit(connection)
    async with asyncio.TaskGroup() as tasks:
        removed = tasks.create_task(exports.remove("vm/disk", drain_timeout_s=60 if in_time else 0.01))
        await condition(lambda: connection.log == ["drain"])
        assert names(exports, "disk") == [None]
        if not in_time:
            await condition(lambda: connection.log == ["drain", "abort"], turns=10_000_000)
        assert not removed.done()
        connection.closed.set()
    await exports.remove("vm/disk")
