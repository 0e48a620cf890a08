"""The ports: what Silo asks of the world, and what others may implement.

Every port has a prose contract here and an executable one in `silo.testing` (``check_device``,
``check_store``, ``check_transport``), which any implementation can be held to. Nothing in this module does
any work.

Three conventions hold for all of them.

* ``X`` and ``X_nowait`` are pairs: the second does the same thing if that cannot block, else it does
  *nothing* and says so by returning ``None`` or ``False``. It is an optimisation that an implementation may
  always decline.
* A mutation that has ended (returned, raised or been cancelled) changes nothing afterwards. Implementations
  therefore run blocking calls through `silo.threads.run_to_completion`, never through
  ``asyncio.to_thread``, whose thread goes on after a cancellation.
* ``aclose`` may be called twice; it always closes, even when it raises. Other calls after it raise
  `silo.ClosedError`.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

import attrs

__all__ = [
    "STATE_SIZE_MAX",
    "BlockDevice",
    "Buffer",
    "Capabilities",
    "ChunkSource",
    "Clock",
    "Connection",
    "Health",
    "Listener",
    "ObjectInfo",
    "ObjectStore",
    "Role",
    "Step",
    "StoredObject",
    "Transport",
    "Workload",
]

Buffer = bytes | bytearray | memoryview


@runtime_checkable
class Clock(Protocol):
    """Time and chance. The only door to either; the simulator puts its own behind it."""

    def monotonic(self) -> float:
        """Seconds since some fixed instant; never goes back. Same scale as the event loop's ``time()``."""

    def boottime(self) -> float:
        """Like `monotonic`, but it goes on while the machine is suspended. Leases are measured with it."""

    def wall(self) -> float:
        """Seconds since the epoch (POSIX). For people and for ``cut_time``; never for a decision about safety."""

    def token(self, size: int) -> bytes:
        """``size`` unpredictable bytes, for nonces, incarnations and jitter."""


class BlockDevice(abc.ABC):
    """Bytes that can be read and written at any offset, under a `silo.Volume`.

    Extents are already checked by the volume; an implementation may assume that they lie inside ``size``.
    Overlapping concurrent writes are not ordered, non-overlapping ones never disturb each other's bytes,
    whatever their alignment. Errors are `silo.SiloError` (an ``OSError`` with ENOSPC or EDQUOT becomes
    `CapacityError`, any other `UnavailableError`).
    """

    size: int

    @abc.abstractmethod
    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The bytes if they can be had without blocking, else ``None``.

        The buffer may be a view of live memory: it is valid until the extent is next written or the caller
        awaits, whichever is first.
        """

    def copy_nowait(self, offset: int, into: memoryview) -> bool:
        """Fill ``into`` with the bytes at ``offset`` if they can be had without blocking, and return True.

        When it returns False, ``into`` may have been written in part.
        """
        found = self.read_nowait(offset, len(into))
        if found is None:
            return False
        into[:] = found
        return True

    @abc.abstractmethod
    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Write all of ``data`` without blocking for long and return True; or write nothing and return False.

        When it raises, any part may have been written.
        """

    @abc.abstractmethod
    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes. Cancellation leaves nothing behind. The result is stable: nobody writes to it later."""

    @abc.abstractmethod
    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``. When it raises or is cancelled, any part may be written, and no more will be."""

    @abc.abstractmethod
    async def zero(self, offset: int, length: int) -> None:
        """Make the extent read as zeros, giving the space back where that is possible. As `write` when it fails."""

    @abc.abstractmethod
    def zero_nowait(self, offset: int, length: int) -> bool:
        """As `zero` if that cannot block for long (callers ask for one chunk or less), else False."""

    @abc.abstractmethod
    async def flush(self) -> None:
        """Make every write that ended before this call durable on this device's medium."""

    def flush_nowait(self) -> bool:
        """As `flush` if nothing has to be waited for, else False: what every medium says that is not memory."""
        return False

    @abc.abstractmethod
    async def data_extents(self) -> Sequence[tuple[int, int]]:
        """Ascending, disjoint extents outside of which the device is known to read as zeros. May be one big one."""

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Release the device. Does not flush."""


class ChunkSource(abc.ABC):
    """Where the content of a locally absent chunk comes from: the store, or a peer."""

    @abc.abstractmethod
    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        """The verified content of a chunk, exactly as long as the chunk; ``None`` when it is all zeros.

        ``demand`` is true when a guest waits: such calls overtake all others. Concurrent calls are allowed.
        `CorruptionError` when the digest does not match, `UnavailableError` when it may be tried again.
        Cancellation leaves nothing behind.
        """


@attrs.frozen
class ObjectInfo:
    """What a listing tells of an object."""

    key: str
    size: int
    etag: str
    modified: float
    """POSIX seconds by the store's clock."""


@attrs.frozen
class StoredObject:
    """What a GET answered: ``data`` is the requested range, ``size`` the length of the whole object."""

    data: Buffer
    etag: str
    size: int


class ObjectStore(abc.ABC):
    """A flat map from keys to immutable-looking objects, with compare-and-swap on a key.

    Keys are letters, digits, ``-``, ``_`` and ``.``, ``/``-separated, without empty, ``.`` or ``..`` components;
    anything else raises `InvalidRequestError`. Implementations add their own prefix. Reads see every write that
    has ended. Nothing is retried inside: `UnavailableError` says that the caller may, and after a mutation that
    the outcome is unknown. Concurrent calls are allowed. Credentials never appear in ``url``, logs or errors.

    A network may hold on to what was sent, so here a mutation that failed or was cancelled may still land later,
    as a whole. Buffers must not change until the call has ended. A key may not lie below another one (``a`` and
    ``a/b``): a store may refuse the second with `InvalidRequestError`.
    """

    url: str

    @abc.abstractmethod
    async def put(self, key: str, data: Sequence[Buffer]) -> str:
        """Write an object, joined from ``data`` without copying where possible, replacing any. Returns the ETag.

        Only for keys whose content is a function of the key, or where the last writer may win.
        """

    @abc.abstractmethod
    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        """Write an object only if the key holds the ETag ``match``; ``None`` means only if there is no object.

        Returns the new ETag, or ``None`` when the condition was false (and nothing was written). Atomic
        against every other `put_if` and against `delete`; a key that is changed so is never changed by `put`,
        whose place among them some servers get wrong. `UnavailableError`: the outcome is unknown, which the
        loser of a race may also be told.
        """

    @abc.abstractmethod
    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        """An object, or ``length`` bytes of it from ``start``; ``None`` when there is no such object.

        ``start`` at or past the end raises `InvalidRequestError`; a range past the end is cut short.
        """

    @abc.abstractmethod
    async def head(self, key: str) -> ObjectInfo | None:
        """What is known of an object without its content; ``None`` when there is none."""

    @abc.abstractmethod
    async def delete(self, keys: Sequence[str]) -> None:
        """Delete the objects; a key without object is no error."""

    @abc.abstractmethod
    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, ascending. Never used on a hot path."""

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Release connections."""


class Connection(abc.ABC):
    """An ordered, reliable stream of bytes between two Silo hosts."""

    peer: str
    """Who is at the other end, for logs."""

    @abc.abstractmethod
    async def receive_into(self, buffer: memoryview) -> int:
        """Fill part of ``buffer``; 0 means the peer closed. `UnavailableError` when the link broke."""

    @abc.abstractmethod
    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all of the buffers, in order. Returning says nothing about arrival. One sender at a time.

        A cancelled or failed send may have sent any part; the connection must then be closed.
        """

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Close; pending calls of others raise `ClosedError`."""


class Listener(abc.ABC):
    """A bound address that hands out connections."""

    url: str
    """The address with the port that was really bound."""

    @abc.abstractmethod
    async def accept(self) -> Connection:
        """The next connection."""

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Stop accepting; connections already handed out live on."""


class Transport(abc.ABC):
    """How hosts reach one another."""

    @abc.abstractmethod
    async def connect(self, url: str) -> Connection:
        """Connect to ``tcp:host:port`` or ``unix:/path``. `UnavailableError` when nobody answers."""

    @abc.abstractmethod
    async def listen(self, url: str) -> Listener:
        """Bind an address. A stale Unix socket is replaced, one in use is refused."""


STATE_SIZE_MAX: Final = 16 << 20
"""Bytes that `Workload.capture` may return: they travel inside the handover, while the guest runs nowhere."""


class Role(enum.Enum):
    """Which side of a migration a workload hook runs on."""

    SOURCE = "source"
    TARGET = "target"


@attrs.frozen
class Step:
    """What a workload hook gets: when it must be done, on which side it runs, and where its devices are."""

    role: Role
    deadline: float
    """`Clock.monotonic` time after which the answer no longer counts."""
    devices: Mapping[str, str] = attrs.field(factory=dict)
    """Volume name to the URI at which the guest reaches it."""
    group: str = ""


@attrs.frozen
class Capabilities:
    """What a workload can do, so that the migration does not ask for more."""

    quiesce: bool = False
    captures_state: bool = False
    can_unsuspend: bool = True


class Health(enum.Enum):
    """What `Workload.probe` saw."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    GONE = "gone"
    UNKNOWN = "unknown"


class Workload(abc.ABC):
    """Whatever uses the disks: a virtual machine, a database, a test.

    A hook may be ``async def`` or a plain function (which then runs in a thread and is abandoned when
    overdue, never assumed to have stopped). Every hook must be idempotent: it may be called again after an
    error or a restart. Whatever fails before the claim ends in `unsuspend`.
    """

    def caps(self) -> Capabilities:
        """What this workload can do; if not said otherwise, what it has hooks for. Must return at once."""
        kind = type(self)
        return Capabilities(
            quiesce=(kind.quiesce, kind.unquiesce) != (Workload.quiesce, Workload.unquiesce),
            captures_state=kind.capture is not Workload.capture,
        )

    def prepare(self, step: Step) -> Awaitable[None] | None:
        """Target: get ready to resume (start the VM manager paused). Source: a chance to warm up."""
        return None

    def quiesce(self, step: Step) -> Awaitable[None] | None:
        """Bring the guest's file systems or databases to rest, if it can do that."""
        return None

    @abc.abstractmethod
    def suspend(self, step: Step) -> Awaitable[None] | None:
        """Stop the guest: no new I/O after this returns."""

    def flush(self, step: Step) -> Awaitable[None] | None:
        """Push caches outside of Silo (such as guest RAM mapped from a volume) into the devices."""
        return None

    def capture(self, step: Step) -> Awaitable[bytes] | bytes:
        """The opaque device state; it travels inside the handover. At most `STATE_SIZE_MAX`."""
        return b""

    @abc.abstractmethod
    def resume(self, step: Step, state: bytes) -> Awaitable[None] | None:
        """Target, after the claim: run from ``state`` and the devices."""

    def unquiesce(self, step: Step) -> Awaitable[None] | None:
        """Undo `quiesce`: on abort at the source, after `resume` at the target."""
        return None

    @abc.abstractmethod
    def unsuspend(self, step: Step) -> Awaitable[None] | None:
        """Source, when the migration was aborted: run on as if nothing had happened."""

    def fence(self, step: Step) -> Awaitable[None] | None:
        """Make sure that the guest can never run here again.

        Source: after the target has taken over. Target: after an attempt that was aborted, if `prepare` was called;
        whatever that has started must end.
        """
        return None

    def probe(self, step: Step) -> Awaitable[Health] | Health:
        """Is it really running?"""
        return Health.UNKNOWN
