"""The handshake from the server's side, without any I/O: fixed newstyle negotiation up to the transmission.

::

    GREETED ──client flags──► OPTIONS ──GO, EXPORT_NAME──► Agreed           the driver serves requests from here on
                               │  ▲ └──ABORT, too many options──► Finished  send what is left, then close
                               │  └─any other option, known or not─┐
                               └───────────────────────────────────┘
                               └──STARTTLS──► StartTls ──tls_started──► OPTIONS   with everything before forgotten

The driver feeds bytes in with `receive_data`, calls `next_event` until it returns ``None`` (more bytes are
needed), and after every event sends what `data_to_send` returns. One event answers at most one option, so a
client that sends many at once makes us hold the answer to one. What a client sends wrongly inside an option
is answered with an error, and the next option is parsed; only a breach that leaves no way to answer raises
`RemoteProtocolError`.

Limits: an option's data may have `OPTION_SIZE_MAX` bytes (longer data is skipped, not stored), a connection
may send `OPTIONS_MAX` options. The deadline for all of it is the driver's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from silo.errors import RemoteProtocolError
from silo.exports.nbd_catalog import Catalog, ExportInfo, TlsPolicy, transmission_flags
from silo.exports.nbd_options import (
    decode_context_queries,
    decode_info_request,
    decode_name,
    encode_context,
    encode_info_block_size,
    encode_info_export,
    encode_info_text,
    encode_option_reply,
    encode_server,
)
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    INIT_MAGIC,
    OPTION,
    OPTION_MAGIC,
    ZERO_PADDING,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
)

__all__ = [
    "OPTIONS_MAX",
    "OPTION_SIZE_MAX",
    "Agreed",
    "Event",
    "Finished",
    "Handshake",
    "Replied",
    "StartTls",
]

OPTION_SIZE_MAX: Final = 64 * 1024
"""A name of 4096 bytes and a dozen queries of the same size; nbdkit allows as much."""
OPTIONS_MAX: Final = 256
"""A client that lists, asks and goes sends about ten."""
_KNOWN_CLIENT_FLAGS: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)


class Event:
    """Something happened; send `Handshake.data_to_send`, then ask again."""


@attrs.frozen
class Replied(Event):
    """An option was answered (or the client's flags were accepted)."""


@attrs.frozen
class StartTls(Event):
    """After sending, wrap the connection and call `Handshake.tls_started`."""


@attrs.frozen
class Finished(Event):
    """After sending, close the connection."""


@attrs.frozen
class Agreed(Event):
    """After sending, serve requests. The bytes in `Handshake.trailing` already belong to them."""

    export: ExportInfo
    style: HeaderStyle
    contexts: dict[int, str]
    """Selected metadata contexts by identifier."""


class Handshake:
    """One connection's handshake. ``shutting_down`` may be set at any time; later options are refused."""

    def __init__(self, catalog: Catalog, *, tls: TlsPolicy = TlsPolicy.NONE) -> None:
        self.shutting_down = False
        self._catalog = catalog
        self._tls = tls
        self._encrypted = False
        self._fixed = False
        self._pad = True
        self._in = bytearray()
        self._out = [
            GREETING.pack(INIT_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        ]
        self._step: Callable[[], Event | None] = self._read_client_flags
        self._option = 0
        self._missing = 0
        self._options_seen = 0
        self._style = HeaderStyle.SIMPLE
        self._selected_for = ""
        self._selected: dict[int, str] = {}
        self._handlers: dict[int, Callable[[bytes], Event]] = {
            Option.EXPORT_NAME: self._on_export_name,
            Option.ABORT: self._on_abort,
            Option.LIST: self._on_list,
            Option.STARTTLS: self._on_starttls,
            Option.INFO: self._on_info,
            Option.GO: self._on_info,
            Option.STRUCTURED_REPLY: self._on_structured_reply,
            Option.LIST_META_CONTEXT: self._on_list_contexts,
            Option.SET_META_CONTEXT: self._on_set_contexts,
            Option.EXTENDED_HEADERS: self._on_extended_headers,
        }

    # ---- the driver's side ------------------------------------------------------------------------------

    def receive_data(self, data: bytes) -> None:
        """Bytes from the client. Ask for events until there are none, before giving more."""
        self._in += data

    def next_event(self) -> Event | None:
        """What the received bytes amount to, one thing at a time; ``None`` when more are needed.

        Raises `RemoteProtocolError` when the client did what cannot be answered: close the connection.
        """
        return self._step()

    def data_to_send(self) -> bytes:
        """What to send now; the greeting at first. Empty when there is nothing."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    @property
    def trailing(self) -> bytes:
        """Bytes behind the handshake: after `Agreed` they are the first requests."""
        return bytes(self._in)

    def tls_started(self) -> None:
        """The connection is encrypted from here on. What was negotiated before may have been forged: forget it."""
        if self._in:
            raise RemoteProtocolError("bytes followed STARTTLS before the encryption began")
        self._encrypted = True
        self._style = HeaderStyle.SIMPLE
        self._selected_for, self._selected = "", {}
        self._step = self._read_option

    # ---- reading ----------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes | None:
        if len(self._in) < count:
            return None
        taken = bytes(self._in[:count])
        del self._in[:count]
        return taken

    def _read_client_flags(self) -> Event | None:
        data = self._take(CLIENT_FLAGS.size)
        if data is None:
            return None
        (flags,) = CLIENT_FLAGS.unpack(data)
        if flags & ~_KNOWN_CLIENT_FLAGS:
            raise RemoteProtocolError(f"the client has unknown flags {flags:#x}")
        self._fixed = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self._pad = not flags & ClientFlag.NO_ZEROES
        self._step = self._read_option
        return Replied()

    def _read_option(self) -> Event | None:
        header = self._take(OPTION.size)
        if header is None:
            return None
        magic, self._option, self._missing = OPTION.unpack(header)
        if magic != OPTION_MAGIC:
            raise RemoteProtocolError(f"an option starts with {magic:#x}")
        self._options_seen += 1
        if self._options_seen > OPTIONS_MAX:
            raise RemoteProtocolError(f"more than {OPTIONS_MAX} options")
        self._step = self._read_data if self._missing <= OPTION_SIZE_MAX else self._skip_data
        return self._step()

    def _read_data(self) -> Event | None:
        data = self._take(self._missing)
        if data is None:
            return None
        self._step = self._read_option
        return self._answer(data)

    def _skip_data(self) -> Event | None:
        skipped = min(self._missing, len(self._in))
        del self._in[:skipped]
        self._missing -= skipped
        if self._missing:
            return None
        self._step = self._read_option
        if self._option == Option.EXPORT_NAME:
            raise RemoteProtocolError("the name of an export is too long")
        return self._refuse(
            OptionReply.ERR_TOO_BIG if self._option in self._handlers else OptionReply.ERR_UNSUP
        )

    def _nothing(self) -> Event | None:
        return None

    # ---- answering --------------------------------------------------------------------------------------

    def _answer(self, data: bytes) -> Event:
        refusal = None
        if self._option == Option.ABORT:
            pass
        elif self._tls is TlsPolicy.REQUIRED and not self._encrypted and self._option != Option.STARTTLS:
            refusal = OptionReply.ERR_TLS_REQD
        elif self.shutting_down:
            refusal = OptionReply.ERR_SHUTDOWN
        if refusal is not None:
            if self._option == Option.EXPORT_NAME:
                raise RemoteProtocolError(f"an export was chosen while the answer is {refusal.name}")
            return self._refuse(refusal)
        handler = self._handlers.get(self._option)
        if handler is None:
            return self._refuse(OptionReply.ERR_UNSUP, "this option is not known here")
        try:
            return handler(data)
        except RemoteProtocolError as error:
            if self._option == Option.EXPORT_NAME:
                raise  # this option has no way to be answered with an error
            return self._refuse(OptionReply.ERR_INVALID, str(error))

    def _reply(self, reply: OptionReply, data: bytes = b"") -> Replied:
        self._out.append(encode_option_reply(self._option, reply, data))
        return Replied()

    def _refuse(self, reply: OptionReply, message: str = "") -> Replied:
        return self._reply(reply, message.encode())

    def _end(self, event: Event) -> Event:
        self._step = self._nothing
        return event

    def _without_data(self, data: bytes) -> None:
        if data:
            raise RemoteProtocolError("this option carries no data")

    def _on_abort(self, data: bytes) -> Event:
        self._reply(OptionReply.ACK)
        return self._end(Finished())

    def _on_list(self, data: bytes) -> Event:
        self._without_data(data)
        for export in self._catalog.listed():
            self._reply(OptionReply.SERVER, encode_server(export.name, export.description))
        return self._reply(OptionReply.ACK)

    def _on_starttls(self, data: bytes) -> Event:
        self._without_data(data)
        if self._tls is TlsPolicy.NONE or not self._fixed:
            return self._refuse(OptionReply.ERR_POLICY, "this server does not encrypt")
        if self._encrypted:
            return self._refuse(OptionReply.ERR_INVALID, "the connection is encrypted already")
        self._reply(OptionReply.ACK)
        return self._end(StartTls())

    def _on_export_name(self, data: bytes) -> Event:
        if self._style is HeaderStyle.EXTENDED:
            raise RemoteProtocolError("EXPORT_NAME does not go with extended headers")
        name = decode_name(data)
        export = self._catalog.find(name)
        if export is None:
            raise RemoteProtocolError(f"there is no export {name!r}")
        self._out.append(EXPORT_NAME_REPLY.pack(export.size, self._flags(export)))
        if self._pad:
            self._out.append(ZERO_PADDING)
        return self._agree(export)

    def _on_info(self, data: bytes) -> Event:
        name, wanted = decode_info_request(data)
        export = self._catalog.find(name)
        if export is None:
            return self._refuse(OptionReply.ERR_UNKNOWN, f"there is no export {name!r}")
        self._reply(OptionReply.INFO, encode_info_export(export.size, self._flags(export)))
        if Info.NAME in wanted:
            self._reply(OptionReply.INFO, encode_info_text(Info.NAME, export.name))
        if Info.DESCRIPTION in wanted and export.description:
            self._reply(OptionReply.INFO, encode_info_text(Info.DESCRIPTION, export.description))
        if Info.BLOCK_SIZE in wanted or export.sizes.is_unusual:
            self._reply(OptionReply.INFO, encode_info_block_size(export.sizes))
        replied = self._reply(OptionReply.ACK)
        return self._agree(export) if self._option == Option.GO else replied

    def _on_structured_reply(self, data: bytes) -> Event:
        self._without_data(data)
        if self._style is HeaderStyle.EXTENDED:
            return self._refuse(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are in use already")
        self._style = HeaderStyle.STRUCTURED
        return self._reply(OptionReply.ACK)

    def _on_extended_headers(self, data: bytes) -> Event:
        self._without_data(data)
        self._style = HeaderStyle.EXTENDED
        return self._reply(OptionReply.ACK)

    def _on_list_contexts(self, data: bytes) -> Event:
        export, queries = self._context_request(data)
        if export is None:
            return self._refuse(OptionReply.ERR_UNKNOWN, "there is no such export")
        for name in export.contexts:
            if not queries or any(name == query or _is_wildcard_of(query, name) for query in queries):
                self._reply(OptionReply.META_CONTEXT, encode_context(0, name))
        return self._reply(OptionReply.ACK)

    def _on_set_contexts(self, data: bytes) -> Event:
        self._selected_for, self._selected = "", {}  # also when the rest fails
        export, queries = self._context_request(data)
        if export is None:
            return self._refuse(OptionReply.ERR_UNKNOWN, "there is no such export")
        names = [name for name in export.contexts if name in queries]
        self._selected_for, self._selected = export.name, dict(enumerate(names, start=1))
        for context_id, name in self._selected.items():
            self._reply(OptionReply.META_CONTEXT, encode_context(context_id, name))
        return self._reply(OptionReply.ACK)

    def _context_request(self, data: bytes) -> tuple[ExportInfo | None, frozenset[str]]:
        if self._style is HeaderStyle.SIMPLE:
            raise RemoteProtocolError("metadata contexts need structured replies or extended headers")
        name, queries = decode_context_queries(data)
        return self._catalog.find(name), frozenset(queries)

    # ---- the result -------------------------------------------------------------------------------------

    def _contexts_of(self, export: ExportInfo) -> dict[int, str]:
        return self._selected if self._selected_for == export.name else {}

    def _flags(self, export: ExportInfo) -> int:
        return transmission_flags(export, self._style, has_contexts=bool(self._contexts_of(export)))

    def _agree(self, export: ExportInfo) -> Event:
        return self._end(Agreed(export, self._style, self._contexts_of(export)))


def _is_wildcard_of(query: str, name: str) -> bool:
    """A query that ends in a colon means everything below it."""
    return query.endswith(":") and name.startswith(query)
