"""The client's conversations, against scripted servers that are nothing but bytes."""

from __future__ import annotations

import pytest

from silo.errors import InvalidRequestError, RemoteProtocolError, SiloError, UnavailableError
from silo.exports.nbd_client_handshake import (
    Conversation,
    ExportEntry,
    describe_export,
    list_contexts,
    list_exports,
    open_export,
)
from silo.exports.nbd_options import (
    BlockSizes,
    encode_context,
    encode_context_queries,
    encode_info_block_size,
    encode_info_export,
    encode_info_request,
    encode_info_text,
    encode_option,
    encode_option_reply,
    encode_server,
)
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import (
    EXPORT_NAME_REPLY,
    GREETING,
    INIT_MAGIC,
    OPTION_MAGIC,
    ZERO_PADDING,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)

GREETED = GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 3)
FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
EXPORT = encode_info_export(1 << 30, FLAGS)
INFOS = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


def reply(option: Option, kind: OptionReply, data: bytes = b"") -> bytes:
    return encode_option_reply(option, kind, data)


def converse(conversation: Conversation[object], incoming: bytes) -> tuple[object, bytes, bytes]:
    """Hold a conversation with a server that says ``incoming``; the result, what was said, what was left unread."""
    outgoing = b""
    step = next(conversation)
    while True:
        try:
            if isinstance(step, bytes):
                outgoing += step
                step = conversation.send(b"")
            else:
                assert step <= len(incoming), "the conversation wants more than the server says"
                taken, incoming = incoming[:step], incoming[step:]
                step = conversation.send(taken)
        except StopIteration as end:
            return end.value, outgoing, incoming


def refusal(conversation: Conversation[object], incoming: bytes) -> SiloError:
    with pytest.raises(SiloError) as caught:
        converse(conversation, incoming)
    return caught.value


def test_agrees_on_extended_headers_and_contexts() -> None:
    """The richest style is asked for first, contexts before GO, and the stream is read exactly to its end."""
    incoming = (
        GREETED
        + reply(Option.EXTENDED_HEADERS, OptionReply.ACK)
        + reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, encode_context(7, "base:allocation"))
        + reply(Option.SET_META_CONTEXT, OptionReply.ACK)
        + reply(Option.GO, OptionReply.INFO, encode_info_block_size(BlockSizes(512, 4096, 1 << 20)))
        + reply(Option.GO, OptionReply.INFO, b"\x7f\xff of a kind that nobody knows")
        + reply(Option.GO, OptionReply.INFO, encode_info_text(Info.NAME, "vm1/disk"))
        + reply(Option.GO, OptionReply.INFO, encode_info_text(Info.DESCRIPTION, "a disk"))
        + reply(Option.GO, OptionReply.INFO, EXPORT)
        + reply(Option.GO, OptionReply.ACK)
    )
    export, outgoing, left = converse(
        open_export("disk", contexts=["base:allocation", "x:y"]), incoming + b"+"
    )
    assert left == b"+"
    assert (
        export.name,
        export.size,
        export.flags,
        export.style,
    ) == ("vm1/disk", 1 << 30, FLAGS, HeaderStyle.EXTENDED)
    assert export.contexts == {7: "base:allocation"}
    assert BlockSizes(512, 4096, 1 << 20) == export.block_sizes
    assert export.description == "a disk"
    assert not export.read_only
    assert outgoing == (
        b"\0\0\0\x03"
        + encode_option(Option.EXTENDED_HEADERS)
        + encode_option(Option.SET_META_CONTEXT, encode_context_queries("disk", ["base:allocation", "x:y"]))
        + encode_option(Option.GO, encode_info_request("disk", INFOS))
    )


def test_falls_back_to_structured_headers() -> None:
    incoming = (
        GREETED
        + reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP, b"what?")
        + reply(Option.STRUCTURED_REPLY, OptionReply.ACK)
        + reply(Option.SET_META_CONTEXT, OptionReply.ERR_UNSUP)
        + reply(Option.GO, OptionReply.INFO, EXPORT)
        + reply(Option.GO, OptionReply.ACK)
    )
    export, _, left = converse(open_export("", contexts=["base:allocation"]), incoming)
    assert (export.style, export.contexts, left) == (HeaderStyle.STRUCTURED, {}, b"")


@pytest.mark.parametrize("padded", [True, False])
def test_falls_back_to_export_name(padded: bool) -> None:
    """A server that knows no GO is asked the old way, and its zero padding is consumed where it is due."""
    handshake_flags = 1 if padded else 3
    incoming = (
        GREETING.pack(INIT_MAGIC, OPTION_MAGIC, handshake_flags)
        + reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP)
        + reply(Option.STRUCTURED_REPLY, OptionReply.ERR_UNSUP)
        + reply(Option.GO, OptionReply.ERR_UNSUP)
        + EXPORT_NAME_REPLY.pack(4096, FLAGS | TransmissionFlag.READ_ONLY)
        + (ZERO_PADDING if padded else b"")
    )
    export, outgoing, left = converse(open_export("old"), incoming)
    assert outgoing.endswith(encode_option(Option.EXPORT_NAME, b"old"))
    assert outgoing.startswith(bytes((0, 0, 0, handshake_flags)))
    assert (export.size, export.read_only, export.style, left) == (4096, True, HeaderStyle.SIMPLE, b"")


def test_a_server_without_fixed_newstyle_is_asked_nothing_else() -> None:
    incoming = GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 2) + EXPORT_NAME_REPLY.pack(4096, FLAGS)
    export, outgoing, _ = converse(open_export("x"), incoming)
    assert export.size == 4096
    assert b"\0\0\0\x02" + encode_option(Option.EXPORT_NAME, b"x") == outgoing


def test_lists_exports_and_parts() -> None:
    incoming = (
        GREETED
        + reply(Option.LIST, OptionReply.SERVER, encode_server("a", "the first"))
        + reply(Option.LIST, OptionReply.SERVER, encode_server("b"))
        + reply(Option.LIST, OptionReply.ACK)
    )
    entries, outgoing, _ = converse(list_exports(), incoming)
    assert [ExportEntry("a", "the first"), ExportEntry("b", "")] == entries
    assert outgoing.endswith(encode_option(Option.ABORT))


def test_describes_without_opening() -> None:
    incoming = (
        GREETED
        + reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP)
        + reply(Option.STRUCTURED_REPLY, OptionReply.ACK)
        + reply(Option.INFO, OptionReply.INFO, EXPORT)
        + reply(Option.INFO, OptionReply.ACK)
    )
    export, outgoing, _ = converse(describe_export("disk"), incoming)
    assert export.size == 1 << 30
    assert outgoing.endswith(encode_option(Option.ABORT))


def test_lists_contexts() -> None:
    incoming = (
        GREETED
        + reply(Option.EXTENDED_HEADERS, OptionReply.ACK)
        + reply(Option.LIST_META_CONTEXT, OptionReply.META_CONTEXT, encode_context(0, "base:allocation"))
        + reply(Option.LIST_META_CONTEXT, OptionReply.META_CONTEXT, encode_context(0, "silo:heat"))
        + reply(Option.LIST_META_CONTEXT, OptionReply.ACK)
    )
    contexts, outgoing, _ = converse(list_contexts("disk", ["base:", "silo:"]), incoming)
    assert contexts == ["base:allocation", "silo:heat"]
    assert encode_context_queries("disk", ["base:", "silo:"]) in outgoing


@pytest.mark.parametrize(
    ("kind", "error", "hint"),
    [
        (OptionReply.ERR_UNKNOWN, InvalidRequestError, "list"),
        (OptionReply.ERR_TLS_REQD, InvalidRequestError, "TLS"),
        (OptionReply.ERR_POLICY, InvalidRequestError, "settings"),
        (OptionReply.ERR_SHUTDOWN, UnavailableError, "shutting down"),
        (1 << 31 | 99, InvalidRequestError, "0x80000063"),
    ],
)
def test_a_refusal_says_what_to_do(kind: OptionReply, error: type[SiloError], hint: str) -> None:
    """The server's message and our hint are both in the error."""
    incoming = GREETED + reply(Option.GO, kind, b"no such thing \xff")
    caught = refusal(open_export("disk", styles=()), incoming)
    assert isinstance(caught, error)
    assert "no such thing" in str(caught)
    assert hint in str(caught)


def test_a_refused_list_is_an_error() -> None:
    assert isinstance(
        refusal(list_exports(), GREETED + reply(Option.LIST, OptionReply.ERR_POLICY)), SiloError
    )


@pytest.mark.parametrize(
    "incoming",
    [
        b"SSH-2.0-OpenSSH_9.2p1",
        GREETING.pack(INIT_MAGIC, 0x00420281861253, 0),
        GREETED + bytes(20),
        GREETED + reply(Option.LIST, OptionReply.ACK),
        GREETED + reply(Option.GO, OptionReply.INFO, EXPORT)[:-12] + EXPORT[:5],
        GREETED + encode_option_reply(Option.GO, OptionReply.INFO, bytes(20_000)),
        GREETED + reply(Option.GO, OptionReply.ACK),
        GREETED + reply(Option.GO, OptionReply.INFO, b"\0\0short") + reply(Option.GO, OptionReply.ACK),
        GREETED
        + reply(Option.GO, OptionReply.INFO, EXPORT)
        + reply(Option.GO, OptionReply.INFO, b"\0\3" + bytes(12))
        + reply(Option.GO, OptionReply.ACK),
        GREETED + 10_001 * reply(Option.GO, OptionReply.INFO, b"\x7f\xff"),
    ],
    ids=[
        "another protocol",
        "historic",
        "no reply magic",
        "another option",
        "cut",
        "too long",
        "no size",
        "short size",
        "block sizes of zero",
        "endless",
    ],
)
def test_nonsense_is_named(incoming: bytes) -> None:
    """Whatever a server says that is not the protocol ends in `RemoteProtocolError` and in nothing else."""
    assert isinstance(refusal(open_export("", styles=()), incoming + bytes(64)), RemoteProtocolError)


def test_two_contexts_with_one_number_are_refused() -> None:
    incoming = (
        GREETED
        + reply(Option.STRUCTURED_REPLY, OptionReply.ACK)
        + reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, encode_context(1, "a:b"))
        + reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, encode_context(1, "a:c"))
        + reply(Option.SET_META_CONTEXT, OptionReply.ACK)
    )
    conversation = open_export("", contexts=["a:b", "a:c"], styles=[HeaderStyle.STRUCTURED])
    assert isinstance(refusal(conversation, incoming), RemoteProtocolError)


@pytest.mark.parametrize("ask", [list_exports(), describe_export("x"), list_contexts("x")])
def test_questions_need_fixed_newstyle(ask: Conversation[object]) -> None:
    assert isinstance(refusal(ask, GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 0)), InvalidRequestError)
