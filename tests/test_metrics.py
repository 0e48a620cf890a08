"""Numbers for Prometheus, of a real host, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from silo import Host, MemoryDevice, SyncSettings
from silo.clock import SystemClock
from silo.metrics import MetricsServer
from silo.sync.memory_store import MemoryStore

MIB = 1 << 20


async def ask(url: str, request: bytes) -> bytes:
    """What the server answers, to the end of the connection."""
    _, host, port = url.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def scrape(url: str) -> dict[str, float]:
    """All samples, by name and labels."""
    answer = await ask(url, b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert f"Content-Length: {len(body)}".encode() in head
    return {
        f"{sample.name}{[value for _, value in sorted(sample.labels.items())]}": sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


async def test_what_a_scrape_shows(tmp_path: Path) -> None:
    """Bytes, chunks, requests and ages of every group, synced or not."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "state") as host:
        group = await host.open_group(
            "vm1", {"disk": MemoryDevice(8 * MIB)}, store=store.client(), sync=SyncSettings(rpo_s=3600)
        )
        await host.open_group("alone", {"data": MemoryDevice(MIB)})
        statuses = lambda: [hosted.status() for hosted in host.groups.values()]  # noqa: E731
        async with MetricsServer("tcp:127.0.0.1:0", statuses) as server:
            await group.sync_now()
            before = await scrape(server.url)
            await group.volumes["disk"].write(0, b"x" * MIB)
            dirty = await scrape(server.url)
            assert dirty["silo_dirty_chunks['vm1', 'disk']"] == 16
            assert dirty["silo_exposed_bytes['vm1']"] == dirty["silo_backlog_bytes['vm1']"] == MIB
            await group.sync_now()
            after = await scrape(server.url)
            assert after["silo_exposed_bytes['vm1']"] == 0
            assert after["silo_generation['vm1']"] == before["silo_generation['vm1']"] + 1
            assert after["silo_rpo_seconds['vm1']"] < 60
            assert after["silo_uploaded_bytes_total['vm1']"] > before["silo_uploaded_bytes_total['vm1']"]
            puts = "silo_store_requests_total['vm1', 'put']"
            assert after[puts] - before[puts] == 2
            assert after["silo_alarm['behind', 'vm1']"] == after["silo_alarm['failing', 'vm1']"] == 0
            assert after["silo_volume_size_bytes['alone', 'data']"] == MIB
            residencies = ("present", "zero", "absent_store", "absent_peer")
            assert sum(after[f"silo_chunks['alone', '{name}', 'data']"] for name in residencies) == 16
            assert "silo_generation['alone']" not in after
            idle = await scrape(server.url)
            assert {name: value for name, value in idle.items() if "requests" in name} == {
                name: value for name, value in after.items() if "requests" in name
            }


async def test_nonsense_is_answered_or_cut_off(tmp_path: Path) -> None:
    """Other paths, other verbs, no HTTP at all, too much of it; and the next scrape is served."""
    async with MetricsServer("tcp:127.0.0.1:0", list) as server:
        assert b" 404 " in await ask(server.url, b"GET /secrets HTTP/1.1\r\n\r\n")
        assert b" 405 " in await ask(server.url, b"POST /metrics HTTP/1.1\r\n\r\n")
        assert b" 405 " in await ask(server.url, b"\x00\xff\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert await ask(server.url, b"x" * 40_000) == b""
        assert (await ask(server.url, b"HEAD /metrics HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\n")
        assert await scrape(server.url) == {}
        _, host, port = server.url.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
    writer.close()
