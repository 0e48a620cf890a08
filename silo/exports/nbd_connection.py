"""One client of an NBD server, from the greeting to the end.

The life of a connection is the one coroutine `NbdConnection.run`: handshake under a deadline, admission to the
export (see `silo.exports.nbd_exports`), transmission. A client that breaks the protocol, vanishes or dawdles
ends its own connection and nobody else's.
"""

from __future__ import annotations

import asyncio
import logging

from silo.errors import RemoteProtocolError
from silo.exports.nbd_catalog import TlsPolicy
from silo.exports.nbd_exports import NbdExports
from silo.exports.nbd_handshake import Agreed, Finished, Handshake, StartTls
from silo.exports.nbd_replies import replies_for
from silo.exports.nbd_service import NbdService
from silo.exports.nbd_session import RequestParser
from silo.exports.nbd_stream import Stream
from silo.exports.nbd_tls import NbdTls
from silo.exports.nbd_transmission import PayloadBudget, Transmission, TransmissionLimits

__all__ = ["NbdConnection"]

logger = logging.getLogger(__name__)


class NbdConnection:
    """See the module. ``peer`` says who it is, in logs. The connection owns the stream."""

    def __init__(
        self,
        stream: Stream,
        peer: str,
        exports: NbdExports,
        budget: PayloadBudget,
        limits: TransmissionLimits,
        *,
        handshake_timeout_s: float,
        tls: NbdTls | None = None,
    ) -> None:
        self.peer = peer
        self._stream = stream
        self._exports = exports
        self._budget = budget
        self._limits = limits
        self._handshake_timeout_s = handshake_timeout_s
        self._tls = tls
        self._handshake = Handshake(exports, tls=tls.policy if tls else TlsPolicy.NONE)
        self._transmission: Transmission | None = None
        self._admitted = asyncio.Event()
        self._closed = asyncio.Event()

    @property
    def is_serving(self) -> bool:
        """Whether the client has chosen an export."""
        return self._transmission is not None

    async def run(self) -> None:
        """Serve the client until it or we end the connection; then nothing of it is left."""
        try:
            agreed = await self._negotiate()
            if agreed is not None:
                await self._serve(agreed)
        except (OSError, RemoteProtocolError) as error:
            logger.info("%s: the connection ended: %s", self.peer, error)
        except Exception:
            logger.exception("%s: the connection was ended by an error of ours", self.peer)
        finally:
            self.close()

    def close(self) -> None:
        """Release the socket and whoever waits for us. `run` does so at its end; twice is harmless."""
        self._stream.close()
        self._admitted.set()
        self._closed.set()

    async def _negotiate(self) -> Agreed | None:
        """Shake hands; what the client has chosen, or ``None`` when it has left or took too long."""
        try:
            async with asyncio.timeout(self._handshake_timeout_s):
                return await self._shake_hands()
        except TimeoutError:
            logger.info("%s did not finish the handshake in time", self.peer)
            return None

    async def _shake_hands(self) -> Agreed | None:
        handshake = self._handshake
        await self._stream.send(handshake.data_to_send())
        while data := await self._stream.receive():
            handshake.receive_data(data)
            while (event := handshake.next_event()) is not None:
                await self._stream.send(handshake.data_to_send())
                if isinstance(event, Agreed):
                    return event
                if isinstance(event, Finished):
                    return None
                if isinstance(event, StartTls) and self._tls is not None:
                    handshake.tls_started()
                    self._stream = await self._tls.upgrade(self._stream)
        return None

    async def _serve(self, agreed: Agreed) -> None:
        export = self._exports.get(agreed.export.name)
        if export is None or self._handshake.shutting_down:
            return  # removed, or draining, since the client was told that it may go on
        sizes, style = export.sizes, agreed.style
        parser = RequestParser(style, payload_max=sizes.maximum)
        parser.prepend(self._handshake.trailing)
        service = NbdService(
            export.volume,
            replies_for(style),
            payload_max=sizes.maximum,
            block_size=sizes.minimum,
            read_only=export.read_only,
            contexts=agreed.contexts,
            flush=export.flush,
        )
        self._transmission = Transmission(self._stream, parser, service, self._budget, self._limits)
        try:
            await export.admit(self)
            self._admitted.set()
            await self._transmission.run()
        finally:
            export.dismiss(self)
        if self._transmission.error is not None:
            raise self._transmission.error

    # ---- what the export and the server ask -------------------------------------------------------------

    async def settle(self) -> None:
        """Return when nothing that has arrived by now can still change the volume."""
        await self._admitted.wait()  # no deadline of its own: its admission and the caller's have one
        if self._transmission is not None:
            await self._transmission.settle()

    def abort(self) -> None:
        """End now, without finishing anything."""
        if self._transmission is not None:
            self._transmission.abort()

    def drain(self) -> None:
        """Finish what is in flight, refuse the rest, end. A handshake is told so and gets no further."""
        self._handshake.shutting_down = True
        if self._transmission is not None:
            self._transmission.drain()

    async def wait_closed(self) -> None:
        """Return when nothing of the connection is left. The caller has asked it to end, and sets the deadline."""
        await self._closed.wait()
