"""Where migrations arrive: one address, any number of sources, offers for the host to accept.

Every connection is greeted, and goes to the migration that it belongs to. A migration that nobody here has heard of is
an *offer*: it waits, with its connection kept alive, until the host accepts it (a
`silo.p2p.target.TargetMigration` decides it) or refuses. A migration of which there is no trace although its source
believes to have begun it is refused as unknown, and that is a promise: this host holds neither a record nor a
claim for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Never, Protocol

from silo.abc import Connection, Listener
from silo.errors import ClosedError, InvalidRequestError, RemoteProtocolError, SiloError, UnavailableError
from silo.names import check_group_name, check_volume_name
from silo.p2p.channel import Channel, common_version, greet
from silo.p2p.conversation import Side
from silo.p2p.messages import (
    FEATURES,
    TEXT_MAX,
    Hello,
    Lane,
    Offer,
    Reason,
    Refused,
    Stage,
    VolumeOffer,
    Welcome,
    Withdraw,
)
from silo.p2p.ports import Site
from silo.tasks import task_group

__all__ = ["IncomingOffer", "Reception"]

_log = logging.getLogger(__name__)

CONNECTIONS_MAX = 256
"""Connections at once. A migration has two, unless its settings ask for more."""
OFFERS_MAX = 64
"""Offers that wait for the host."""


class Session(Protocol):
    """A migration, as its connections see it: `silo.p2p.target_session.TargetSession`."""

    async def serve_accepted(self, channel: Channel, hello: Hello) -> None: ...

    async def serve(self, channel: Channel, hello: Hello) -> None: ...


class IncomingOffer:
    """A group that another host would move here. Accept it with a `TargetMigration`, or `refuse` it."""

    def __init__(self, hello: Hello, offer: Offer, peer: str, reception: Reception) -> None:
        self.group = hello.group
        self.migration = hello.migration
        self.source_host = hello.host
        self.volumes: tuple[VolumeOffer, ...] = tuple(offer.volumes)
        self.generation = offer.generation
        """The oldest generation that the target may start from; ``None`` when the source has no store."""
        self.proof = offer.proof
        self.peer = peer
        """Where the connection came from, for logs."""
        self.is_withdrawn = False
        """The source has given up before anybody decided."""
        self.reception = reception
        self._decided: asyncio.Future[Session | str] = asyncio.get_running_loop().create_future()

    def decide(self, session: Session) -> None:
        """Everything is ready: from here on the session serves the migration's connections."""
        if not self._decided.done():
            self._decided.set_result(session)
            self.reception.attach(self.migration, session)

    def refuse(self, message: str) -> None:
        """Tell the source why not. After `decide`, and the second time, this does nothing."""
        if not self._decided.done():
            self._decided.set_result(message)
            self.reception.forget(self.migration)

    async def wait(self, channel: Channel, hello: Hello, host: str) -> None:
        """Keep the connection until it is decided, and go on accordingly."""
        async with task_group() as tasks:
            alive = tasks.create_task(channel.keep_alive())
            reader = tasks.create_task(self._hear(channel))
            await asyncio.wait((self._decided,))  # no deadline: the source has one
            reader.cancel()
            alive.cancel()
        decision = self._decided.result()
        if isinstance(decision, str):
            await channel.send(Refused(reason=Reason.DENIED, host=host, message=decision))
        else:
            await decision.serve_accepted(channel, hello)

    async def _hear(self, channel: Channel) -> Never:
        """Only that the source is there, and perhaps that it has changed its mind."""
        message = await channel.receive_message()
        if isinstance(message, Withdraw):
            self.is_withdrawn = True
            raise UnavailableError(f"the source withdrew its offer: {message.message}")
        raise RemoteProtocolError("the source went on before its offer was accepted")


class Reception:
    """See the module. `run` is its life; `listen` before it, so that the address is known."""

    def __init__(self, site: Site, holds_record: Callable[[str], Awaitable[bool]] | None = None) -> None:
        """``holds_record`` says whether the record of a handover of this group is on our disk, opened or not."""
        self._site = site
        self._holds_record = holds_record
        self._listener: Listener | None = None
        self._sessions: dict[bytes, Session] = {}
        self._offers: dict[bytes, IncomingOffer] = {}
        self._queue: asyncio.Queue[IncomingOffer] = asyncio.Queue()
        self._connections = 0

    async def listen(self, url: str) -> str:
        """Bind the address, and return it as it really is."""
        self._listener = await self._site.transport.listen(url)
        return self._listener.url

    async def aclose(self) -> None:
        """Stop listening; `run` ends. Connections end with `run`."""
        if self._listener is not None:
            await self._listener.aclose()

    def attach(self, migration: bytes, session: Session) -> None:
        """Connections of this migration belong to the session. Also for migrations restored after a restart."""
        self._sessions[migration] = session
        self._offers.pop(migration, None)

    def forget(self, migration: bytes) -> None:
        """There is nothing of this migration here any more."""
        self._sessions.pop(migration, None)
        self._offers.pop(migration, None)

    async def offers(self) -> AsyncIterator[IncomingOffer]:
        """The offers as they come. No deadline: waiting for them is what it is for."""
        while True:
            offer = await self._queue.get()
            if not offer.is_withdrawn:
                yield offer

    async def run(self) -> None:
        """Accept connections until `aclose`. Never raises for what a connection does; cancelled, it ends them all."""
        if self._listener is None:
            raise ClosedError("the reception does not listen yet")
        async with task_group() as tasks:
            try:
                while True:
                    connection = await self._listener.accept()
                    if self._connections >= CONNECTIONS_MAX:
                        _log.warning("too many connections: %s was turned away", connection.peer)
                        await connection.aclose()
                        continue
                    tasks.create_task(self._serve(connection))
            except ClosedError:
                return

    async def _serve(self, connection: Connection) -> None:
        self._connections += 1
        channel = Channel(connection, Side.TARGET, self._site.clock, self._site.settings)
        try:
            hello = await greet(channel, self._site.host, self._site.settings)
            await self._introduce(channel, hello)
        except RemoteProtocolError as error:
            _log.warning("%s was disconnected: %s", connection.peer, error)
        except (UnavailableError, ClosedError) as error:
            _log.info("%s is gone: %s", connection.peer, error)
        except SiloError as error:
            _log.warning("%s was disconnected over a failure here: %s", connection.peer, error)
        finally:
            self._connections -= 1
            await connection.aclose()

    async def _introduce(self, channel: Channel, hello: Hello) -> None:
        session = self._sessions.get(hello.migration)
        if hello.stage is Stage.NEW and hello.lane is Lane.BULK:
            await self._receive_offer(channel, hello, session)
        elif session is not None:
            await session.serve(channel, hello)
        else:
            await self._deny(channel, hello)

    async def _deny(self, channel: Channel, hello: Hello) -> None:
        """Nobody serves this migration. While its group is not open, only our disk knows whether there is one."""
        reason, message = Reason.UNKNOWN, f"nothing is known here of this migration of {hello.group}"
        if self._holds_record is not None and await self._holds_record(hello.group):
            reason, message = Reason.BUSY, f"group {hello.group} is not open here just now"
        await channel.send(Refused(reason=reason, host=self._site.host, message=message))

    async def _receive_offer(self, channel: Channel, hello: Hello, session: Session | None) -> None:
        """A migration begins, or its source never heard that it was accepted and begins again."""
        host, settings = self._site.host, self._site.settings
        version = common_version(hello)
        await channel.send(
            Welcome(version=version, features=FEATURES, host=host, stage=Stage.NEW, window=settings.window)
        )
        channel.conversation.welcomed(Lane.BULK, Stage.NEW)
        message = await channel.receive_message()
        if not isinstance(message, Offer):
            raise RemoteProtocolError("the source did not offer anything")
        if fault := _fault(hello, message):
            await channel.send(Refused(reason=Reason.DENIED, host=host, message=fault[:TEXT_MAX]))
            return
        if session is not None:
            await session.serve_accepted(channel, hello)
            return
        offer = self._offers.get(hello.migration)
        if offer is None:
            if len(self._offers) >= OFFERS_MAX:
                busy = f"{OFFERS_MAX} offers are waiting already"
                await channel.send(Refused(reason=Reason.BUSY, host=host, message=busy))
                return
            offer = self._offers[hello.migration] = IncomingOffer(hello, message, channel.peer, self)
            self._queue.put_nowait(offer)
        await offer.wait(channel, hello, host)


def _fault(hello: Hello, offer: Offer) -> str:
    """Names become file names and keys here: why they cannot, if so. Likewise geometries."""
    try:
        check_group_name(hello.group)
        for volume in offer.volumes:
            check_volume_name(volume.name)
            volume.geometry()
        if len({volume.name for volume in offer.volumes}) != len(offer.volumes):
            raise InvalidRequestError("two volumes have one name")
    except (InvalidRequestError, RemoteProtocolError) as error:
        return f"the offer cannot be taken: {error.message}"
    return ""
