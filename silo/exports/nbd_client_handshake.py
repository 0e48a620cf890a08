"""How an NBD client and a server agree on an export, as conversations without I/O.

A conversation is a generator: it yields ``bytes`` that must be sent, or the number of bytes that it wants to
receive, and is resumed with exactly that many (with nothing after sending); or `START_TLS`, and is resumed with nothing
when everything from there on is encrypted. So the protocol reads from top
to bottom here, and who moves the bytes (an event loop, TLS, a test that cuts them one by one) is somebody
else's business. It returns its result, or raises:

* `RemoteProtocolError`: the server sent nonsense, or speaks only the protocol's historic form;
* `InvalidRequestError`: it refuses what we asked for (no such export, TLS required);
* `UnavailableError`: it is shutting down.

The best style of headers that both sides know is agreed upon: extended, else structured, else simple. Every
reply is limited in size and number, so that a hostile server costs little.
"""

from __future__ import annotations

import enum
from collections.abc import Generator, Mapping, Sequence
from typing import Final, TypeVar

import attrs

from silo.errors import InvalidRequestError, RemoteProtocolError, SiloError, UnavailableError
from silo.exports.nbd_options import (
    BlockSizes,
    decode_context,
    decode_info_block_size,
    decode_info_export,
    decode_name,
    decode_server,
    encode_context_queries,
    encode_info_request,
    encode_option,
)
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    INIT_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    PAYLOAD_SIZE_DEFAULT,
    ZERO_PADDING,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)

__all__ = [
    "RICHEST_FIRST",
    "START_TLS",
    "Conversation",
    "ExportEntry",
    "RemoteExport",
    "StartTls",
    "describe_export",
    "list_contexts",
    "list_exports",
    "open_export",
]

T = TypeVar("T")


class StartTls(enum.Enum):
    """The type of `START_TLS`."""

    NOW = enum.auto()


START_TLS: Final = StartTls.NOW
Conversation = Generator[int | bytes | StartTls, bytes, T]
"""Yields what to send, or how much to receive, or that it is time to encrypt."""

_REPLY_SIZE_MAX: Final = 16 * 1024
"""The longest legal reply is an export's name and description, 4 KiB each."""
_REPLY_COUNT_MAX: Final = 10_000
"""Replies to one option: more exports than any server here or elsewhere is known to list."""
_ERROR_BIT: Final = 1 << 31
_BLOCK_SIZES_DEFAULT: Final = BlockSizes(minimum=1, preferred=4096, maximum=PAYLOAD_SIZE_DEFAULT)
RICHEST_FIRST: Final = (HeaderStyle.EXTENDED, HeaderStyle.STRUCTURED)
"""The styles of headers that need the server's consent, in the order in which we would like to have them."""
_STYLE_OPTIONS: Final = {
    HeaderStyle.EXTENDED: Option.EXTENDED_HEADERS,
    HeaderStyle.STRUCTURED: Option.STRUCTURED_REPLY,
}
_INFOS: Final = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


@attrs.frozen
class ExportEntry:
    """One line of a server's list."""

    name: str
    description: str


@attrs.frozen
class RemoteExport:
    """What a server told of an export, and how it will be spoken with."""

    name: str
    """As the server calls it, which may differ from what was asked for."""
    size: int
    flags: TransmissionFlag
    style: HeaderStyle = HeaderStyle.SIMPLE
    block_sizes: BlockSizes = _BLOCK_SIZES_DEFAULT
    contexts: Mapping[int, str] = attrs.field(factory=dict)
    """The metadata contexts that ``BLOCK_STATUS`` will report, by their number on this connection."""
    description: str = ""

    @property
    def read_only(self) -> bool:
        """Whether writes will be refused."""
        return TransmissionFlag.READ_ONLY in self.flags


@attrs.frozen
class _Answer:
    """All replies to one option: those with data, and the last one, an error or ACK."""

    data: Sequence[tuple[int, bytes]]
    end: int
    message: str

    @property
    def accepted(self) -> bool:
        return self.end == OptionReply.ACK


def open_export(
    name: str,
    *,
    contexts: Sequence[str] = (),
    styles: Sequence[HeaderStyle] = RICHEST_FIRST,
    tls: bool = False,
) -> Conversation[RemoteExport]:
    """Enter transmission with an export; with ``tls`` (here and below), only encrypted.

    ``styles`` are the styles of headers to ask for, the best first; simple ones need no asking.
    ``contexts`` are asked for, too; which of them exist is in the result, and none do with simple headers.
    A server too old for ``GO`` is asked with ``EXPORT_NAME``, to which it can only agree or hang up.
    """
    flags = yield from _greet(tls)
    if HandshakeFlag.FIXED_NEWSTYLE not in flags:
        return (yield from _open_by_name(name, flags, HeaderStyle.SIMPLE))
    style = yield from _agree_on_style(styles)
    selected = yield from _select_contexts(name, contexts, style)
    answer = yield from _ask(Option.GO, encode_info_request(name, _INFOS))
    if answer.end == OptionReply.ERR_UNSUP and style is not HeaderStyle.EXTENDED:
        export = yield from _open_by_name(name, flags, style)
        return attrs.evolve(export, contexts=selected)
    return _export_from(answer, name, style, selected)


def describe_export(name: str, *, tls: bool = False) -> Conversation[RemoteExport]:
    """Ask what an export is without opening it, then part. The result names no contexts."""
    yield from _greet_fixed(tls)
    style = yield from _agree_on_style(RICHEST_FIRST)
    answer = yield from _ask(Option.INFO, encode_info_request(name, _INFOS))
    export = _export_from(answer, name, style, {})
    yield encode_option(Option.ABORT)
    return export


def list_exports(*, tls: bool = False) -> Conversation[list[ExportEntry]]:
    """Ask which exports there are, then part."""
    yield from _greet_fixed(tls)
    answer = yield from _ask(Option.LIST)
    if not answer.accepted:
        raise _refusal(answer, "to list its exports")
    entries = [decode_server(data) for kind, data in answer.data if kind == OptionReply.SERVER]
    yield encode_option(Option.ABORT)
    return [ExportEntry(name, description) for name, description in entries]


def list_contexts(name: str, queries: Sequence[str] = (), *, tls: bool = False) -> Conversation[list[str]]:
    """Ask which metadata contexts an export has that match any of the queries (all without one), then part."""
    yield from _greet_fixed(tls)
    yield from _agree_on_style(RICHEST_FIRST)
    answer = yield from _ask(Option.LIST_META_CONTEXT, encode_context_queries(name, queries))
    if not answer.accepted:
        raise _refusal(answer, f"to list the contexts of {name!r}")
    yield encode_option(Option.ABORT)
    return [decode_context(data)[1] for kind, data in answer.data if kind == OptionReply.META_CONTEXT]


def _greet(tls: bool) -> Conversation[HandshakeFlag]:
    """Exchange greetings, and encrypt what follows; the server's flags, reduced to those that we know."""
    magic, option_magic, raw_flags = GREETING.unpack((yield GREETING.size))
    if magic != INIT_MAGIC:
        raise RemoteProtocolError("this is not an NBD server", hint="is the address right?")
    if option_magic != OPTION_MAGIC:
        raise RemoteProtocolError(
            "the server speaks only the historic handshake, which cannot name an export"
        )
    flags = HandshakeFlag(raw_flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
    yield CLIENT_FLAGS.pack(ClientFlag(flags))
    if tls:
        if HandshakeFlag.FIXED_NEWSTYLE not in flags:
            raise InvalidRequestError("the server is too old to encrypt")
        answer = yield from _ask(Option.STARTTLS)
        if not answer.accepted:
            raise _refusal(answer, "to encrypt")
        yield START_TLS
    return flags


def _greet_fixed(tls: bool) -> Conversation[None]:
    """Exchange greetings with a server that answers options."""
    flags = yield from _greet(tls)
    if HandshakeFlag.FIXED_NEWSTYLE not in flags:
        raise InvalidRequestError("the server is too old to answer questions; it can only open an export")


def _ask(option: Option, data: bytes = b"") -> Conversation[_Answer]:
    """Send an option and collect everything that the server says to it."""
    yield encode_option(option, data)
    replies: list[tuple[int, bytes]] = []
    while len(replies) < _REPLY_COUNT_MAX:
        magic, to_option, kind, length = OPTION_REPLY.unpack((yield OPTION_REPLY.size))
        if magic != OPTION_REPLY_MAGIC or to_option != option:
            raise RemoteProtocolError(f"the answer to option {option.name} is something else")
        if length > _REPLY_SIZE_MAX:
            raise RemoteProtocolError(f"a reply to option {option.name} has {length} bytes")
        content = (yield length) if length else b""
        if kind == OptionReply.ACK:
            return _Answer(replies, kind, "")
        if kind & _ERROR_BIT:
            return _Answer(replies, kind, content.decode(errors="replace"))
        replies.append((kind, content))
    raise RemoteProtocolError(f"the replies to option {option.name} do not end")


def _agree_on_style(styles: Sequence[HeaderStyle]) -> Conversation[HeaderStyle]:
    """The first of these styles that the server will use; the simple one when there is none."""
    for style in styles:
        answer = yield from _ask(_STYLE_OPTIONS[style])
        if answer.accepted:
            return style
    return HeaderStyle.SIMPLE


def _select_contexts(name: str, contexts: Sequence[str], style: HeaderStyle) -> Conversation[dict[int, str]]:
    """Ask for metadata contexts; those that the server has, by number. A refusal means none."""
    if not contexts or style is HeaderStyle.SIMPLE:
        return {}
    answer = yield from _ask(Option.SET_META_CONTEXT, encode_context_queries(name, contexts))
    if not answer.accepted:
        return {}
    selected = [decode_context(data) for kind, data in answer.data if kind == OptionReply.META_CONTEXT]
    if len(dict(selected)) != len(selected):
        raise RemoteProtocolError("two metadata contexts have the same number")
    return dict(selected)


def _open_by_name(name: str, server: HandshakeFlag, style: HeaderStyle) -> Conversation[RemoteExport]:
    """Enter transmission the old way."""
    yield encode_option(Option.EXPORT_NAME, name.encode())
    size, flags = EXPORT_NAME_REPLY.unpack((yield EXPORT_NAME_REPLY.size))
    if HandshakeFlag.NO_ZEROES not in server:
        yield len(ZERO_PADDING)
    return RemoteExport(name, size, TransmissionFlag(flags), style)


def _export_from(answer: _Answer, name: str, style: HeaderStyle, contexts: Mapping[int, str]) -> RemoteExport:
    """Put together what ``GO`` or ``INFO`` told."""
    if not answer.accepted:
        raise _refusal(answer, f"the export {name!r}")
    told = {int.from_bytes(data[:2], "big"): data for kind, data in answer.data if kind == OptionReply.INFO}
    if Info.EXPORT not in told:
        raise RemoteProtocolError("the server agreed without telling the size of the export")
    size, flags = decode_info_export(told[Info.EXPORT])
    sizes = told.get(Info.BLOCK_SIZE)
    return RemoteExport(
        name=decode_name(told[Info.NAME][2:]) if Info.NAME in told else name,
        size=size,
        flags=TransmissionFlag(flags),
        style=style,
        block_sizes=_BLOCK_SIZES_DEFAULT if sizes is None else decode_info_block_size(sizes),
        contexts=contexts,
        description=decode_name(told[Info.DESCRIPTION][2:]) if Info.DESCRIPTION in told else "",
    )


_HINTS: Final = {
    OptionReply.ERR_UNKNOWN: "ask it for a list of its exports",
    OptionReply.ERR_TLS_REQD: "it wants TLS: write nbds://",
    OptionReply.ERR_UNSUP: "it does not know this option",
    OptionReply.ERR_POLICY: "its settings forbid it",
}


def _refusal(answer: _Answer, what: str) -> SiloError:
    """The error that a server's refusal amounts to."""
    reason = f": {answer.message}" if answer.message else ""
    message = f"the server refuses {what}{reason}"
    if answer.end == OptionReply.ERR_SHUTDOWN:
        return UnavailableError(message, hint="it is shutting down")
    try:
        return InvalidRequestError(message, hint=_HINTS.get(OptionReply(answer.end), ""))
    except ValueError:
        return InvalidRequestError(message, hint=f"its code is {answer.end:#x}")
