"""A network between hosts in one process, for the deterministic loop: latency, cut links, partitions.

Each host gets a transport of its own from the `MemoryNetwork`; addresses are the same strings as on a real
network, and nothing listens beyond it. Bytes keep their order within a connection and take as long as
``latency_s`` says; how many are under way is bounded, as by a socket's buffers.

Links fail in three ways. A *cut* breaks every connection at once, as a reset does: both ends get
`UnavailableError`, and what was under way is lost. A *partition* says nothing: bytes and connection attempts
vanish until it heals, and then the connections of before are cut. And a host *crashes*: it listens no more, and
its connections end, as the kernel of the machine ends them, after what it had sent or instead of it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Sequence

from silo.abc import Buffer, Connection, Listener, Transport
from silo.errors import ClosedError, InvalidRequestError, SiloError, UnavailableError

__all__ = ["MemoryNetwork"]

PIPE_SIZE = 256 << 10
"""Bytes under way in one direction of a connection; about what a socket pair buffers."""


class MemoryNetwork:
    """See the module. ``latency_s`` is asked once per send; the default is none."""

    def __init__(self, *, latency_s: Callable[[], float] = lambda: 0.0) -> None:
        self.latency_s = latency_s
        self.listeners: dict[str, _MemoryListener] = {}
        self.silent: set[frozenset[str]] = set()
        self._links: list[tuple[frozenset[str], _Pipe, _Pipe]] = []

    def host(self, name: str) -> Transport:
        """The transport of one host."""
        return _MemoryTransport(self, name)

    def cut(self, one: str, other: str) -> int:
        """Break every connection between two hosts, and return how many there were. New ones may be made at once."""
        pair = frozenset((one, other))
        cut = [link for link in self._links if link[0] == pair]
        self._links = [link for link in self._links if link[0] != pair]
        for _, forth, back in cut:
            for pipe in (forth, back):
                pipe.fail(UnavailableError("the link was cut"), UnavailableError("the link was cut"))
        return len(cut)

    def partition(self, one: str, other: str) -> None:
        """From now on whatever goes between the two hosts vanishes."""
        self.silent.add(frozenset((one, other)))

    def heal(self, one: str, other: str) -> None:
        """End a partition. The connections that lived through it are cut."""
        self.silent.discard(frozenset((one, other)))
        self.cut(one, other)

    def crash(self, host: str, *, loses: bool) -> None:
        """The process of a host has died. What it had sent still arrives, unless the network ``loses`` it."""
        self.listeners = {url: one for url, one in self.listeners.items() if one.host != host}
        for pair, *pipes in self._links:
            if host in pair:
                for pipe in pipes:
                    if loses:
                        pipe.fail(UnavailableError("the peer died"), UnavailableError("the peer died"))
                    else:
                        pipe.end(UnavailableError("the peer died"))
        self._links = [link for link in self._links if host not in link[0]]

    def join(self, one: str, other: str) -> tuple[Connection, Connection]:
        """Two ends of a new connection between two hosts."""
        pair = frozenset((one, other))
        forth, back = _Pipe(self, pair), _Pipe(self, pair)
        self._links = [link for link in self._links if not link[1].is_over]
        self._links.append((pair, forth, back))
        return _MemoryConnection(other, forth, back), _MemoryConnection(one, back, forth)


class _Pipe:
    """One direction of a connection."""

    def __init__(self, network: MemoryNetwork, pair: frozenset[str]) -> None:
        self._network = network
        self._pair = pair
        self._sent: deque[bytes] = deque()
        self._arrived: deque[bytes] = deque()
        self._under_way = 0
        self._latest = 0.0
        self._ended = False
        self._put_error: SiloError | None = None
        self._get_error: SiloError | None = None
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self._get_error is not None

    async def put(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            for start in range(0, len(view), PIPE_SIZE):
                while self._under_way >= PIPE_SIZE and self._put_error is None:
                    await self._change()
                if self._put_error is not None:
                    raise self._put_error
                part = bytes(view[start : start + PIPE_SIZE])
                self._under_way += len(part)
                self._deliver_later(part)

    def end(self, error: SiloError) -> None:
        """The sender closes: it gets the error, the receiver gets what is under way and then the end."""
        self._put_error = self._put_error or error
        self._deliver_later(b"")
        self._wake()

    def _deliver_later(self, part: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._latest = max(self._latest, loop.time() + self._network.latency_s())
        self._sent.append(part)
        # In a context of its own: bytes under way arrive even if their sender dies.
        loop.call_at(self._latest, self._arrive, context=contextvars.Context())

    def _arrive(self) -> None:
        part = self._sent.popleft()  # timers of the same instant come in any order, parts in theirs
        if self._pair in self._network.silent or self._get_error is not None:
            return
        self._ended |= not part
        self._arrived.append(part)
        self._wake()

    async def get_into(self, buffer: memoryview) -> int:
        while not self._arrived or not self._arrived[0]:
            if self._get_error is not None:
                raise self._get_error
            if self._ended:
                return 0
            await self._change()
        total = 0
        while self._arrived and self._arrived[0] and total < len(buffer):
            # As on a real stream, what was sent apart may be received together.
            part = self._arrived.popleft()
            count = min(len(part), len(buffer) - total)
            buffer[total : total + count] = part[:count]
            if count < len(part):
                self._arrived.appendleft(part[count:])
            total += count
        self._under_way -= total
        self._wake()
        return total

    def fail(self, sender: SiloError, receiver: SiloError) -> None:
        """Whoever waits or comes later gets the error for its side; what was under way is lost."""
        self._put_error = self._put_error or sender
        self._get_error = self._get_error or receiver
        self._arrived.clear()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        await self._changed.wait()


class _MemoryConnection(Connection):
    def __init__(self, peer: str, out: _Pipe, into: _Pipe) -> None:
        self.peer = peer
        self._out = out
        self._into = into
        self._closed = False

    async def receive_into(self, buffer: memoryview) -> int:
        self._check_open()
        return await self._into.get_into(buffer)

    async def send(self, buffers: Sequence[Buffer]) -> None:
        self._check_open()
        await self._out.put(buffers)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            closed = ClosedError(f"the connection to {self.peer} is closed")
            self._out.end(closed)
            self._into.fail(UnavailableError("the peer closed the connection"), closed)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the connection to {self.peer} is closed")


class _MemoryListener(Listener):
    def __init__(self, network: MemoryNetwork, host: str, url: str) -> None:
        self.url = url
        self.host = host
        self._network = network
        self._backlog: asyncio.Queue[Connection | None] = asyncio.Queue()
        self.is_closed = False

    def offer(self, connection: Connection) -> None:
        self._backlog.put_nowait(connection)

    async def accept(self) -> Connection:
        connection = None if self.is_closed else await self._backlog.get()
        if connection is None:
            raise ClosedError(f"{self.url} is closed")
        return connection

    async def aclose(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if self._network.listeners.get(self.url) is self:
            del self._network.listeners[self.url]
        while not self._backlog.empty():
            waiting = self._backlog.get_nowait()
            if waiting is not None:
                await waiting.aclose()
        self._backlog.put_nowait(None)


class _MemoryTransport(Transport):
    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self._network = network
        self._name = name

    async def connect(self, url: str) -> Connection:
        await asyncio.sleep(self._network.latency_s())
        listener = self._network.listeners.get(url)
        if listener is not None and frozenset((self._name, listener.host)) in self._network.silent:
            await asyncio.Event().wait()  # nobody answers, ever: the caller has a deadline
        if listener is None:
            raise UnavailableError(f"nobody answers at {url}")
        ours, theirs = self._network.join(self._name, listener.host)
        listener.offer(theirs)
        return ours

    async def listen(self, url: str) -> Listener:
        if url in self._network.listeners:
            raise InvalidRequestError(f"cannot listen on {url}: somebody does already")
        listener = self._network.listeners[url] = _MemoryListener(self._network, self._name, url)
        return listener
