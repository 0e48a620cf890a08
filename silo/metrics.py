"""Numbers for Prometheus: ``silo serve --metrics tcp:127.0.0.1:9090``. Needs the extra ``metrics``.

What is shown is what ``silo status`` shows, as of the moment of the scrape; counters begin with the process. A scrape
reads every map once, some milliseconds per million chunks, on the host's loop, which owns what it reads.

The server speaks as much HTTP as a scrape needs: ``GET /metrics``, one request per connection, nothing that changes
anything. There is no authentication, so the address should be one that only the collector reaches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Self

from silo.addresses import parse_address
from silo.errors import InvalidRequestError
from silo.sockets import address_of, listen_on
from silo.sync.status import ALARMS

__all__ = ["MetricsServer", "render"]

logger = logging.getLogger(__name__)

REQUEST_MAX: Final = 16 * 1024
PATIENCE_S: Final = 10.0
"""For one request, from its first byte to the last of the answer."""
CONNECTIONS_MAX: Final = 16

Status = Mapping[str, Any]

GAUGES: Final = {
    "rpo_s": ("silo_rpo_seconds", "Age of the state that would be recovered if the host vanished now"),
    "backlog_bytes": ("silo_backlog_bytes", "What waits to be uploaded"),
    "generation": ("silo_generation", "Newest committed generation"),
    "rate_bps": ("silo_upload_rate_bytes_per_second", "How fast the store took content last"),
    "window": ("silo_upload_window_bytes", "Bytes that may be on their way to the store at once"),
    "failing_s": ("silo_failing_seconds", "How long something has been tried again without success"),
}
COUNTERS: Final = {
    "cuts": ("silo_cuts", "Cuts that were committed, or had nothing to commit"),
    "abandoned_cuts": ("silo_abandoned_cuts", "Cuts that were given up"),
    "sent_bytes": ("silo_uploaded_bytes", "Bytes of uploaded objects"),
    "sent_objects": ("silo_uploaded_objects", "Uploaded objects, heads apart"),
    "elided_chunks": ("silo_elided_chunks", "Chunks that were written with what the store had already"),
}
RESIDENCIES: Final = ("present", "zero", "absent_store", "absent_peer")


def render(groups: Iterable[Status]) -> bytes:
    """The statuses of groups (`HostedGroup.status`) in Prometheus' text format.

    `InvalidRequestError` when ``prometheus_client`` is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as error:
        raise InvalidRequestError(
            "metrics need prometheus-client", hint="pip install 'silo-blocks[metrics]'"
        ) from error
    registry = CollectorRegistry()
    registry.register(_Collector(list(groups)))
    return generate_latest(registry)


class _Collector:
    """What the registry asks for its families. The prefix of a counter gets ``_total`` there."""

    def __init__(self, groups: list[Status]) -> None:
        self._groups = groups

    def collect(self) -> Iterable[Any]:
        yield from self._of_groups()
        yield from self._of_volumes()

    def _of_groups(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        exposed = GaugeMetricFamily(
            "silo_exposed_bytes", "What would be lost with the host", labels=["group"]
        )
        slowed = GaugeMetricFamily(
            "silo_guest_limit_bytes_per_second", "Limit of the guest's writes, if any", labels=["group"]
        )
        alarms = GaugeMetricFamily("silo_alarm", "1 while there is reason for it", labels=["group", "alarm"])
        requests = CounterMetricFamily(
            "silo_store_requests", "Requests to the store", labels=["group", "verb"]
        )
        fetched = CounterMetricFamily(
            "silo_fetched_bytes", "Bytes that came from the store", labels=["group"]
        )
        for group in self._groups:
            name = group["name"]
            exposed.add_metric([name], group["exposed_bytes"])
            fetched.add_metric([name], group["bytes_store"])
            if group["guest_limit_bps"] is not None:
                slowed.add_metric([name], group["guest_limit_bps"])
            for verb, count in group["store_requests"].items():
                requests.add_metric([name, verb], count)
            for alarm in ALARMS:
                raised = group["sync"] is not None and alarm in group["sync"]["alarms"]
                alarms.add_metric([name, alarm], float(raised))
        yield from (exposed, slowed, alarms, requests, fetched)
        synced = [(group["name"], group["sync"]) for group in self._groups if group["sync"] is not None]
        kinds = ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS))
        for kind, described in kinds:
            for key, (metric, text) in described.items():
                family = kind(metric, text, labels=["group"])
                for name, sync in synced:
                    if sync[key] is not None:
                        family.add_metric([name], sync[key])
                yield family

    def _of_volumes(self) -> Iterable[Any]:
        from prometheus_client.core import GaugeMetricFamily

        labels = ["group", "volume"]
        chunks = GaugeMetricFamily("silo_chunks", "Chunks by where they are", labels=[*labels, "residency"])
        dirty = GaugeMetricFamily(
            "silo_dirty_chunks", "Chunks that are not known to be committed", labels=labels
        )
        size = GaugeMetricFamily("silo_volume_size_bytes", "Size of a volume", labels=labels)
        for group in self._groups:
            for volume in group["volumes"]:
                names = [group["name"], volume["name"]]
                size.add_metric(names, volume["size"])
                dirty.add_metric(names, volume["dirty"] // volume["chunk_size"])
                for residency in RESIDENCIES:
                    chunks.add_metric([*names, residency], volume[residency] // volume["chunk_size"])
        return (size, dirty, chunks)


class MetricsServer:
    """See the module. ``async with MetricsServer(url, statuses) as server``; ``url`` then has the bound port."""

    def __init__(self, url: str, statuses: Callable[[], Iterable[Status]]) -> None:
        render(())  # a missing library is a mistake to be told of at the start, not at the first scrape
        self.url = url
        self._statuses = statuses
        self._listener: socket.socket
        self._tasks = asyncio.TaskGroup()
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = listen_on(parse_address(self.url))
        self.url = str(address_of(self._listener))
        await self._tasks.__aenter__()
        self._accepting = self._tasks.create_task(self._accept())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (self._accepting, *self._connections):
            if task is not None:
                task.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            self._listener.close()
            if self.url.startswith("unix:"):
                with contextlib.suppress(OSError):
                    os.unlink(self.url.removeprefix("unix:"))

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            if len(self._connections) >= CONNECTIONS_MAX:
                sock.close()
                continue
            task = self._tasks.create_task(self._serve(sock))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, sock: socket.socket) -> None:
        """One request. Whatever a client does ends its own connection and nothing else."""
        loop = asyncio.get_running_loop()
        try:
            sock.setblocking(False)
            async with asyncio.timeout(PATIENCE_S):
                request = b""
                while b"\r\n\r\n" not in request and b"\n\n" not in request:
                    data = await loop.sock_recv(sock, REQUEST_MAX)
                    request += data
                    if not data or len(request) > REQUEST_MAX:
                        return
                await loop.sock_sendall(sock, self._answer(request))
        except (OSError, TimeoutError) as error:
            logger.info("a scrape ended: %s", error or "it took too long")
        finally:
            sock.close()

    def _answer(self, request: bytes) -> bytes:
        words = request.split(b"\n", 1)[0].split()
        if len(words) != 3 or words[0] not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"only GET\n")
        if words[1].split(b"?")[0] not in (b"/metrics", b"/"):
            return _response("404 Not Found", b"see /metrics\n")
        body = render(self._statuses())
        return _response("200 OK", body, with_body=words[0] == b"GET")


def _response(status: str, body: bytes, *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
