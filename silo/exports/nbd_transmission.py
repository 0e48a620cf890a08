"""Serving one connection: the driver between a `Stream`, a `RequestParser` and an `NbdService`.

Whenever bytes have come, every complete request among them is taken in one go, the batch is carried out
synchronously as far as possible, and all of its replies leave in one call. What remains becomes tasks, one
per request, owned by the task group inside `run`. So the common request costs neither a task nor a turn of
the loop.

**Back-pressure** counts bytes: payloads and read lengths of requests in flight, replies that the client has
not taken, a payload that is half received. Beyond the connection's own limit or the server's (`PayloadBudget`)
nothing more is read from the socket, so a client that floods or does not listen stops itself. A connection
that holds nothing may always have one request, whatever its size, so that nobody starves.

**Settling** (`Transmission.settle`) is for the sake of connections that come later: they wait until the changes
that have arrived here are over. A client that does not listen must not hold *them* up. So those changes are carried
out whatever room there is, and the requests between them are put aside.

**Ending.** On ``DISC`` or when the client closes its side: what is in flight finishes, replies leave, the
connection closes. When the connection breaks or the client sends nonsense: what is in flight is cancelled,
and cancelled operations change nothing afterwards. `drain`: what is in flight finishes, whatever comes later is
answered with ESHUTDOWN, then the connection closes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import attrs

from silo.abc import Buffer
from silo.errors import ClosedError, RemoteProtocolError
from silo.eventloop import expects_soon
from silo.exports.nbd_service import NbdService
from silo.exports.nbd_session import REQUEST_COST, Request, RequestParser
from silo.exports.nbd_stream import Stream
from silo.exports.nbd_wire import Command

__all__ = ["PayloadBudget", "Transmission", "TransmissionLimits"]

_BATCH_MAX: Final = 1 << 20
"""Bytes of replies that are put together before they are sent."""
_ROUNDS_MAX: Final = 8
"""How often one connection may receive before others get their turn, when there is always more."""
_TURN_MAX: Final = 512
"""How many requests one connection may have served before others get their turn: a few milliseconds."""
_ASIDE_MAX: Final = 16 * 1024
"""Requests that may be put aside; a client that has sent more without listening is not waited for."""
_SINGLES_MIN: Final = 4
"""After so many turns with a single request we wait awake for the next. With more requests under way it would pay
to sleep: they come together then, and are answered together."""
_CHANGES: Final = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
_SHUTTING_DOWN: Final = ClosedError("the server is shutting down")


@attrs.frozen
class TransmissionLimits:
    """What one connection may hold."""

    held_bytes: int = 32 << 20
    requests_in_flight: int = 1024


class PayloadBudget:
    """Bytes that all connections of a server may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._waiting: dict[Callable[[], None], None] = {}

    @property
    def free(self) -> int:
        """What may still be taken; negative when a connection used its right to one request."""
        return self.limit - self.used

    def charge(self, change: int) -> None:
        """Take bytes, or give them back, which wakes the connections that wait."""
        self.used += change
        if change < 0 and self._waiting and self.used < self.limit:
            loop = asyncio.get_running_loop()
            for callback in self._waiting:
                loop.call_soon(callback)
            self._waiting.clear()

    def wait(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, soon after something was given back."""
        self._waiting[callback] = None

    def forget(self, callback: Callable[[], None]) -> None:
        """The caller has gone."""
        self._waiting.pop(callback, None)


class Transmission:
    """See the module. One per connection; `run` is awaited once, by the task that owns the connection."""

    def __init__(
        self,
        stream: Stream,
        parser: RequestParser,
        service: NbdService,
        budget: PayloadBudget,
        limits: TransmissionLimits,
    ) -> None:
        self._stream = stream
        self._parser = parser
        self._service = service
        self._budget = budget
        self._limits = limits
        self._tasks = asyncio.TaskGroup()
        self._flight: dict[asyncio.Task[None], Request] = {}
        self._waiting: deque[Request] = deque()
        """Misses that will be tasks when others have ended; no requests are taken meanwhile."""
        self._aside: deque[Request] = deque()
        """What was found between changes while settling; served before anything that comes later."""
        self._flight_bytes = 0
        """What requests in flight and waiting ones hold."""
        self._charged = 0
        self._starved = False
        """Requests may have come that wait for room."""
        self._plain_max = min(_TURN_MAX * REQUEST_COST, limits.held_bytes)
        """Bytes of the batch that is taken without further ado; so it has at most `_TURN_MAX` requests, too."""
        self._singles = 0
        """Turns in a row that found one request: the client sends the next when it has the answer."""
        self._expect_soon = expects_soon(asyncio.get_running_loop())
        self._input_ended = False
        self._draining = False
        self._finished = asyncio.Event()
        self.error: Exception | None = None
        """Why the connection ended, unless it ended well."""

    async def run(self) -> None:
        """Serve until the connection ends; afterwards nothing of it is left. Cancellation cancels its requests."""
        self._stream.start(self._on_readable, self._go_on)
        try:
            async with self._tasks:
                try:
                    self._advance()
                    await self._finished.wait()  # no deadline: a guest may be idle for years
                finally:
                    self._finished.set()
                    for task in self._flight:
                        task.cancel()
        finally:
            self._stream.close()
            self._budget.forget(self._go_on)
            self._budget.charge(-self._charged)
            self._charged = 0

    def abort(self, error: Exception | None = None) -> None:
        """End the connection now: requests in flight are cancelled, replies are lost."""
        if not self._finished.is_set():
            self.error = error
            self._stream.pause()
            self._finished.set()

    def drain(self) -> None:
        """Finish what is in flight, answer everything later with ESHUTDOWN, and close."""
        self._draining = True
        self._on_readable()

    async def settle(self) -> None:
        """Carry out the changes that have arrived by now, and return when they have ended.

        Afterwards nothing that the client sent before this call can change the volume. The caller sets a
        deadline; a cancelled call leaves nothing behind.
        """
        unread = 0 if self._finished.is_set() else self._stream.unread()
        while self._take_changes() and unread > 0 and not self._input_ended:
            count = self._receive()
            if count <= 0:
                break
            unread -= count
        self._advance()
        begun = [request for request in self._pending if request[0] in _CHANGES]
        awaited = {id(request) for request in begun}
        while awaited & {id(request) for request in self._pending}:
            running = [task for task, request in self._flight.items() if id(request) in awaited]
            await asyncio.wait(running or self._flight, return_when=asyncio.FIRST_COMPLETED)

    @property
    def _pending(self) -> list[Request]:
        """What has been begun, and what will be when there is a place in flight."""
        waiting = () if self._finished.is_set() else self._waiting
        return [*self._flight.values(), *waiting]

    def _take_changes(self) -> bool:
        """Carry out all changes that have been received, and put the rest aside. False when the connection ended."""
        try:
            while not (self._draining or self._finished.is_set()):
                requests = self._parser.next_batch(_BATCH_MAX)
                if not requests:
                    return True
                self._aside += [self._detached(request) for request in requests if request[0] not in _CHANGES]
                self._serve_batch([request for request in requests if request[0] in _CHANGES])
                if len(self._aside) > _ASIDE_MAX:
                    raise RemoteProtocolError(f"{_ASIDE_MAX} requests of a client that does not listen")
        except Exception as error:  # as in `_advance`
            self.abort(error)
        return False

    # ---- callbacks of the loop --------------------------------------------------------------------------

    def _on_readable(self) -> None:
        served = 0
        for _ in range(_ROUNDS_MAX):
            received = 0 if self._starved else self._receive()
            if received > 0 and self._parser.lacks > 0 and not self._draining:
                continue  # for a part of a payload there is nothing to do
            now = self._advance()
            served += now
            if received <= 0 or served > _TURN_MAX or not (now > 1 or self._parser.lacks > 0):
                break
        self._singles = self._singles + 1 if served <= 1 else 0
        if self._stream.is_reading:
            self._stream.resume()  # an encrypted one may hold bytes that the socket will not tell of again
        if self._singles > _SINGLES_MIN or self._parser.lacks > 0:
            self._expect_soon()

    def _receive(self) -> int:
        """Receive once; how many bytes came. Notices when there will be no more."""
        if self._input_ended or self._finished.is_set():
            return 0
        try:
            count = self._stream.receive_into(self._parser.get_buffer())
        except BlockingIOError:
            return 0
        except Exception as error:  # the link's or a bug of ours: this connection ends, and no other
            self.abort(error)
            return 0
        if count:
            self._parser.received(count)
        else:
            self._input_ended = True
        return count

    def _go_on(self) -> None:
        """Something that had to be waited for is there: room, or the end of a queue."""
        self._advance()

    def _advance(self) -> int:
        """Do whatever can be done now: take requests, want more bytes or not, notice the end.

        How many requests were taken.
        """
        if self._finished.is_set():
            return 0
        try:
            served, is_all = self._take_plain()
            if is_all:
                return served
            served += self._take_requests()
        except Exception as error:  # as above; a callback that raises would be called again for ever
            self.abort(error)
            return 0
        held = self._flight_bytes + self._stream.queued + self._parser.held
        if held != self._charged:
            self._budget.charge(held - self._charged)
            self._charged = held
        if self._parser.ended:
            self._input_ended = True
        idle = not (self._flight or self._stream.queued or self._starved)
        if idle and (self._input_ended or self._draining):
            self.abort()
            return served
        if self._input_ended or self._starved:
            self._stream.pause()
        else:
            self._stream.resume()
        return served

    def _take_plain(self) -> tuple[int, bool]:
        """The common turn: nothing is under way, room is no question, and afterwards everything is as it was.

        How many requests there were, and whether there is nothing else to do about them.
        """
        parser, stream = self._parser, self._stream
        if (
            self._flight
            or self._charged
            or self._aside
            or self._input_ended
            or self._draining
            or not stream.is_reading
            or self._budget.free < self._plain_max
        ):
            return 0, False
        requests = parser.next_batch(self._plain_max)
        if requests:
            self._serve_batch(requests)
        return len(requests), parser.is_empty and not (self._flight or stream.queued or parser.ended)

    def _take_requests(self) -> int:
        """Serve complete requests until there are none, or no room for what they ask. How many there were."""
        served = 0
        while True:
            room = self._room()
            self._starved = room <= 0
            if self._starved:
                return served
            requests = self._next_batch(min(room, _BATCH_MAX))
            served += len(requests)
            if not requests:
                return served
            self._serve_batch(requests)
            if self._parser.is_empty and not (self._aside or self._stream.queued):
                return served
            if served > _TURN_MAX:
                self._starved = True  # of time: the rest comes after whatever else the loop has to do
                asyncio.get_running_loop().call_soon(self._go_on)
                return served

    def _next_batch(self, budget: int) -> list[Request]:
        """The next requests, those that were put aside first."""
        if not self._aside:
            return self._parser.next_batch(budget)
        requests: list[Request] = []
        while self._aside and budget > 0:
            request = self._aside.popleft()
            budget -= REQUEST_COST + _cost(request)
            requests.append(request)
        return requests

    def _serve_batch(self, requests: list[Request]) -> None:
        """Carry out what can be carried out now, begin the rest, and send the replies."""
        out: list[Buffer] = []
        if self._draining:
            out += [self._service.refuse(request, _SHUTTING_DOWN) for request in requests]
        else:
            misses = self._service.serve_nowait(requests, out)
            if misses:
                self._start(misses)
        if out:
            self._stream.post(out)

    def _room(self) -> int:
        """Bytes that the next requests may ask for; 0 or less when they must wait."""
        if self._stream.queued or self._waiting or len(self._flight) >= self._limits.requests_in_flight:
            return 0
        held = self._flight_bytes + self._parser.held
        free = self._budget.free + self._charged - held
        if free <= 0 < self._flight_bytes:
            self._budget.wait(self._go_on)
        room = min(free, self._limits.held_bytes - held)
        return room if self._flight_bytes else max(room, 1)

    # ---- requests that wait -----------------------------------------------------------------------------

    def _start(self, misses: list[Request]) -> None:
        for request in map(self._detached, misses):
            self._flight_bytes += _cost(request)
            self._waiting.append(request)
        while self._waiting and len(self._flight) < self._limits.requests_in_flight:
            request = self._waiting.popleft()
            task = self._tasks.create_task(self._serve(request))
            task.add_done_callback(self._forget)
            self._flight[task] = request

    def _detached(self, request: Request) -> Request:
        """The same request, with a payload that stays."""
        return request if request[5] is None else (*request[:5], self._parser.detach(request[5]))

    async def _serve(self, request: Request) -> None:
        parts = await self._service.serve(request)
        # No await between: the parts may be live memory.
        if not self._finished.is_set():
            try:
                self._stream.post(parts)
            except OSError as error:
                self.abort(error)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._flight_bytes -= _cost(self._flight.pop(task))
        if not self._finished.is_set():
            self._start([])
            self._advance()


def _cost(request: Request) -> int:
    """Bytes of memory that a request in flight holds, or will when its reply is there."""
    return request[4] if request[5] is not None or request[0] == Command.READ else 0
