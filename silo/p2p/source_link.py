"""The source's link to its target: connections that are dialled together and kept for as long as they are needed.

The source always dials, also after a restart of either side, so that the target needs no address of it. A link
lives until its bulk or its demand lane breaks; then all are closed and, after a delay that doubles, dialled anew.
What a link means in the present state of the migration is decided by its `LinkUser`, in this order: `connected` is
called as soon as the bulk lane is welcomed and may talk on it alone; then the demand lane is dialled, and
messages, pushes and demands flow until the end.

Push lanes help the bulk lane. They come and go by themselves: one that breaks is dialled again soon, and if that
fails the others carry what it had. So a link with fewer of them is slower, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Never, Protocol

from silo.errors import ClosedError, LocalProtocolError, ProtocolError, UnavailableError
from silo.p2p.channel import Channel, LinkRefused, dial
from silo.p2p.messages import Hello, Lane, Message, Refused, Welcome, decode
from silo.p2p.ports import Site
from silo.p2p.pusher import BULK, Pusher
from silo.p2p.signal import Signal
from silo.tasks import task_group

__all__ = ["LinkUser", "SourceLink"]

_log = logging.getLogger(__name__)


class LinkUser(Protocol):
    """The migration, as its link sees it."""

    def hello(self, lane: Lane, link: int) -> Hello:
        """How we greet now."""

    async def connected(self, channel: Channel, hello: Hello, welcome: Welcome) -> None:
        """A bulk lane is there. Returns when the link is ready for everything else."""

    def helped(self, lane: int, hello: Hello, welcome: Welcome) -> None:
        """A push lane is there, perhaps in the place of one that broke."""

    def unhelped(self, lane: int) -> None:
        """A push lane broke, and could not be dialled again."""

    def disconnected(self) -> None:
        """The bulk lane is gone, whether the link was ready or not."""

    def received(self, message: Message, lane: int = BULK) -> None:
        """A control message came over the bulk lane, or an acknowledgement over another. Raises `ProtocolError` to end
        it."""

    def refused(self, refusal: Refused) -> None:
        """The target does not want us."""

    def link_changed(self, *, up: bool, reason: str = "") -> None:
        """The link is ready, or broke."""


class SourceLink:
    """See the module. `run` is its life; everything else may be looked at from outside."""

    def __init__(self, url: str, site: Site, user: LinkUser, pusher: Pusher, changed: Signal) -> None:
        self.bulk: Channel | None = None
        """The bulk lane of the present link, once that is ready."""
        self.error: Exception | None = None
        """Why there is no link just now."""
        self.down_since: float | None = site.clock.monotonic()
        self._url = url
        self._site = site
        self._user = user
        self._pusher = pusher
        self._changed = changed
        self._count = 0
        self._closing = False

    def close(self) -> None:
        """`run` is about to be cancelled: it must not dial again, even if the link breaks at that very moment."""
        self._closing = True

    async def run(self) -> None:
        """Dial and serve until `close` and a cancellation. Never raises for what the link or the peer does."""
        settings = self._site.settings
        delay_s = settings.redial_min_s
        while not self._closing:
            try:
                await self._live()
            except LinkRefused as error:
                self._lost(error)
                self._user.refused(error.refusal)
            except (UnavailableError, ClosedError, ProtocolError) as error:
                if isinstance(error, LocalProtocolError):
                    _log.exception("the link to %s was closed over a bug", self._url)
                was_up = self.down_since is None
                self._lost(error)
                if was_up:
                    delay_s = settings.redial_min_s
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, settings.redial_max_s)

    def _lost(self, error: Exception) -> None:
        self.error = error
        if self.down_since is None:
            self.down_since = self._site.clock.monotonic()
            self._user.link_changed(up=False, reason=str(error))
        self._changed.notify()

    async def _live(self) -> Never:
        """One link, from the first dial to the first error, which it raises."""
        self._count += 1
        bulk, hello, welcome = await self._dial(Lane.BULK)
        try:
            async with task_group() as tasks:
                tasks.create_task(bulk.keep_alive())
                await self._user.connected(bulk, hello, welcome)
                demand, _, _ = await self._dial(Lane.DEMAND)
                await self._serve(bulk, demand)
        finally:
            self.bulk = None
            self._user.disconnected()
            await bulk.aclose()
        raise UnavailableError("the link ended")

    async def _dial(self, lane: Lane) -> tuple[Channel, Hello, Welcome]:
        site, hello = self._site, self._user.hello(lane, self._count)
        channel, welcome = await dial(site.transport, self._url, hello, site.clock, site.settings)
        return channel, hello, welcome

    async def _serve(self, bulk: Channel, demand: Channel) -> None:
        try:
            self.bulk, self.error, self.down_since = bulk, None, None
            self._user.link_changed(up=True)
            self._changed.notify()
            async with task_group() as tasks:
                tasks.create_task(demand.keep_alive())
                tasks.create_task(self._pusher.serve_demands(demand))
                tasks.create_task(self._pusher.push(bulk))
                tasks.create_task(self._read(bulk))
                for lane in range(1, self._site.settings.connections):
                    tasks.create_task(self._help(lane))
        finally:
            await demand.aclose()

    async def _help(self, lane: int) -> Never:
        """Keep a push lane, for as long as the link lives."""
        settings = self._site.settings
        delay_s = settings.redial_min_s
        while True:
            was_up = False
            try:
                channel, hello, welcome = await self._dial(Lane.PUSH)
                was_up = True
                await self._push_over(channel, lane, hello, welcome)
            except (UnavailableError, ClosedError, ProtocolError) as error:
                if isinstance(error, LocalProtocolError):
                    _log.exception("a push lane to %s was closed over a bug", self._url)
                _log.info("push lane %d to %s: %s", lane, self._url, error)
            if was_up:
                delay_s = settings.redial_min_s
            else:
                self._user.unhelped(lane)
                self._changed.notify()
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, settings.redial_max_s)

    async def _push_over(self, channel: Channel, lane: int, hello: Hello, welcome: Welcome) -> None:
        try:
            self._user.helped(lane, hello, welcome)
            self._changed.notify()
            async with task_group() as tasks:
                tasks.create_task(channel.keep_alive())
                tasks.create_task(self._pusher.help_push(channel, lane))
                tasks.create_task(self._read(channel, lane))
        finally:
            await channel.aclose()

    async def _read(self, channel: Channel, lane: int = BULK) -> Never:
        while True:
            for frame in await channel.receive():
                self._user.received(decode(frame), lane)
            self._changed.notify()
