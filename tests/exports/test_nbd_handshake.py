"""The handshake, option by option: what is answered, what ends the connection, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import RemoteProtocolError
from silo.exports.nbd_catalog import ExportInfo, TlsPolicy
from silo.exports.nbd_handshake import (
    OPTION_SIZE_MAX,
    OPTIONS_MAX,
    Agreed,
    Event,
    Finished,
    Handshake,
    StartTls,
)
from silo.exports.nbd_options import (
    BlockSizes,
    decode_context,
    decode_info_block_size,
    decode_info_export,
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
    OPTION_REPLY,
    ClientFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)

CONTEXTS = ("base:allocation", "qemu:dirty-bitmap:sync", "silo:residency")
DISK = ExportInfo(
    "vm/disk", 1 << 30, BlockSizes(1, 4096, 32 << 20), description="the disk", contexts=CONTEXTS
)
CDROM = ExportInfo("vm/cdrom", 1 << 20, BlockSizes(512, 4096, 1 << 20), read_only=True)
FLAGS = CLIENT_FLAGS.pack(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)


class Exports:
    """Two exports; ``disk`` and the empty name are aliases of the first."""

    def find(self, name: str) -> ExportInfo | None:
        return {"": DISK, "disk": DISK, DISK.name: DISK, CDROM.name: CDROM}.get(name)

    def listed(self) -> Sequence[ExportInfo]:
        return [DISK, CDROM]


class Client:
    """Talks to a handshake, a message at a time or a byte at a time."""

    def __init__(self, *, tls: TlsPolicy = TlsPolicy.NONE, flags: bytes = FLAGS, step: int = 1 << 30) -> None:
        self.server = Handshake(Exports(), tls=tls)
        self.step = step
        self.sent = b""
        self.last: Event | None = None
        self.greeting = self.server.data_to_send()
        self.say(flags)

    def say(self, data: bytes) -> bytes:
        """Send bytes; what comes back."""
        answer = b""
        for start in range(0, len(data), self.step):
            self.server.receive_data(data[start : start + self.step])
            while (event := self.server.next_event()) is not None:
                self.last = event
                answer += self.server.data_to_send()
        self.sent += answer
        return answer

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; the replies to it as (type, data)."""
        return replies(self.say(encode_option(option, data)), option)

    def final(self, option: int, data: bytes = b"") -> int:
        """Send an option; the type of the last reply."""
        return self.option(option, data)[-1][0]


def replies(answer: bytes, option: int) -> list[tuple[int, bytes]]:
    """The option replies in an answer, all of which must be to ``option``."""
    found = []
    while answer:
        magic, to, kind, length = OPTION_REPLY.unpack_from(answer)
        assert (magic, to) == (0x3E889045565A9, option)
        found.append((kind, answer[20 : 20 + length]))
        answer = answer[20 + length :]
    return found


def test_the_greeting_offers_fixed_newstyle_without_zeroes():
    """The server speaks first."""
    assert Client().greeting == GREETING.pack(0x4E42444D41474943, 0x49484156454F5054, 3)


@pytest.mark.parametrize("bit", [2, 7, 31])
def test_unknown_client_flags_end_the_connection(bit: int):
    """A client that wants what we do not know is dropped, as the protocol demands."""
    with pytest.raises(RemoteProtocolError):
        Client(flags=CLIENT_FLAGS.pack(3 | 1 << bit))


@pytest.mark.parametrize("step", [1 << 30, 1, 7])
def test_go_tells_about_the_export_and_begins(step: int):
    """``GO`` answers with what was asked for and enters the transmission; behind it come requests."""
    client = Client(step=step)
    wanted = [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 77]
    found = client.option(Option.GO, encode_info_request("disk", wanted))
    assert [kind for kind, _ in found] == [OptionReply.INFO] * 4 + [OptionReply.ACK]
    size, flags = decode_info_export(found[0][1])
    assert size == DISK.size
    assert TransmissionFlag(flags) == (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.CAN_MULTI_CONN
        | TransmissionFlag.SEND_CACHE
        | TransmissionFlag.SEND_FAST_ZERO
    )
    assert found[1][1] == b"\0\1vm/disk"
    assert found[2][1] == b"\0\2the disk"
    assert decode_info_block_size(found[3][1]) == DISK.sizes
    assert client.last == Agreed(DISK, HeaderStyle.SIMPLE, {})
    client.server.receive_data(b"first request")
    assert client.server.next_event() is None
    assert client.server.trailing == b"first request"


def test_info_answers_the_same_and_does_not_begin():
    """``INFO`` is ``GO`` without the consequence."""
    client = Client()
    asked = encode_info_request("vm/disk", [Info.BLOCK_SIZE])
    info = client.option(Option.INFO, asked)
    assert not isinstance(client.last, Agreed)
    assert client.option(Option.GO, asked) == info
    assert isinstance(client.last, Agreed)


def test_unusual_block_sizes_are_told_without_being_asked_for():
    """A client that would assume something else learns the constraints, and need not have asked."""
    client = Client()
    found = client.option(Option.GO, encode_info_request("vm/cdrom"))
    assert decode_info_block_size(found[1][1]) == CDROM.sizes
    assert decode_info_export(found[0][1])[1] & (
        TransmissionFlag.READ_ONLY | TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
    ) == (TransmissionFlag.READ_ONLY)


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_an_unknown_export_is_said_to_be_unknown(option: Option):
    """The client may go on and ask for another."""
    client = Client()
    assert client.final(option, encode_info_request("nothing")) == OptionReply.ERR_UNKNOWN
    assert client.final(option, encode_info_request("")) == OptionReply.ACK


@pytest.mark.parametrize("option", [4, 12, 0, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 5, OPTION_SIZE_MAX, OPTION_SIZE_MAX + 1, 1 << 20])
def test_unknown_options_are_answered_and_parsing_goes_on(option: int, size: int):
    """Whatever an option is and however long its data, the next one is understood."""
    client = Client()
    assert client.final(option, bytes(size)) == OptionReply.ERR_UNSUP
    assert client.final(Option.LIST) == OptionReply.ACK


def test_a_known_option_that_is_too_long_is_answered_and_parsing_goes_on():
    """Its data is skipped, not stored."""
    client = Client(step=8192)
    answer = client.say(encode_option(Option.GO, bytes(OPTION_SIZE_MAX + 1)))
    assert [kind for kind, _ in replies(answer, Option.GO)] == [OptionReply.ERR_TOO_BIG]
    assert client.server.trailing == b""
    assert client.final(Option.LIST) == OptionReply.ACK


def test_list_names_every_export():
    """Canonical names with their descriptions, then an ACK."""
    found = Client().option(Option.LIST)
    assert [decode_server(data) for _, data in found[:-1]] == [("vm/disk", "the disk"), ("vm/cdrom", "")]
    assert found[-1] == (OptionReply.ACK, b"")


def test_abort_is_acknowledged_and_ends():
    """Data that comes with it is ignored; so is what comes behind it."""
    client = Client()
    assert client.option(Option.ABORT, b"bye") == [(OptionReply.ACK, b"")]
    assert client.last == Finished()
    assert client.say(encode_option(Option.LIST)) == b""


@pytest.mark.parametrize(
    "option", [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS]
)
def test_options_without_data_refuse_data(option: Option):
    """ERR_INVALID, and the next option is understood."""
    client = Client(tls=TlsPolicy.OPTIONAL)
    assert client.final(option, b"x") == OptionReply.ERR_INVALID
    assert client.final(Option.LIST) == OptionReply.ACK


@pytest.mark.parametrize("data", [b"", b"\0\0\0\4disk", b"\0\0\0\1\xff\0\0", b"\0\0\0\x09disk\0\0"])
def test_malformed_options_are_refused_and_parsing_goes_on(data: bytes):
    """Data that contradicts itself is ERR_INVALID, never a guess."""
    client = Client()
    assert client.final(Option.GO, data) == OptionReply.ERR_INVALID
    assert client.final(Option.LIST) == OptionReply.ACK


@pytest.mark.parametrize(("flags", "padding"), [(FLAGS, b""), (CLIENT_FLAGS.pack(1), bytes(124))])
def test_export_name_is_answered_without_an_option_reply(flags: bytes, padding: bytes):
    """Size, flags, and 124 zeros unless the client did not want them."""
    client = Client(flags=flags)
    answer = client.say(encode_option(Option.EXPORT_NAME, b"disk"))
    assert answer[EXPORT_NAME_REPLY.size :] == padding
    assert EXPORT_NAME_REPLY.unpack_from(answer)[0] == DISK.size
    assert client.last == Agreed(DISK, HeaderStyle.SIMPLE, {})


@pytest.mark.parametrize("name", [b"nothing", b"\xff", b"x" * 5000, b"x" * (OPTION_SIZE_MAX + 1)])
def test_an_export_name_that_cannot_be_had_ends_the_connection(name: bytes):
    """This option has no way to be answered with an error."""
    client = Client()
    with pytest.raises(RemoteProtocolError):
        client.say(encode_option(Option.EXPORT_NAME, name))


def test_structured_replies_may_be_asked_for_twice():
    """The second time is acknowledged like the first; the export then offers DF."""
    client = Client()
    assert [client.final(Option.STRUCTURED_REPLY) for _ in range(2)] == [OptionReply.ACK] * 2
    found = client.option(Option.GO, encode_info_request(""))
    assert decode_info_export(found[0][1])[1] & TransmissionFlag.SEND_DF
    assert client.last == Agreed(DISK, HeaderStyle.STRUCTURED, {})


def test_extended_headers_take_precedence():
    """After them structured replies are refused, and EXPORT_NAME ends the connection."""
    client = Client()
    assert client.final(Option.STRUCTURED_REPLY) == OptionReply.ACK
    assert [client.final(Option.EXTENDED_HEADERS) for _ in range(2)] == [OptionReply.ACK] * 2
    assert client.final(Option.STRUCTURED_REPLY) == OptionReply.ERR_EXT_HEADER_REQD
    assert client.final(Option.GO, encode_info_request("")) == OptionReply.ACK
    assert client.last == Agreed(DISK, HeaderStyle.EXTENDED, {})
    other = Client()
    other.option(Option.EXTENDED_HEADERS)
    with pytest.raises(RemoteProtocolError):
        other.say(encode_option(Option.EXPORT_NAME, b"disk"))


def with_contexts(client: Client, option: Option, name: str, queries: Iterable[str]) -> list[tuple[int, str]]:
    """Ask for contexts; what was found as (identifier, name)."""
    found = client.option(option, encode_context_queries(name, queries))
    assert found[-1] == (OptionReply.ACK, b"")
    return [decode_context(data) for _, data in found[:-1]]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], list(CONTEXTS)),
        (["base:"], ["base:allocation"]),
        (["qemu:", "silo:nothing", "other:"], ["qemu:dirty-bitmap:sync"]),
        (["qemu:dirty-bitmap:"], ["qemu:dirty-bitmap:sync"]),
        (["silo:residency", "silo:"], ["silo:residency"]),
        (["base", "allocation", ""], []),
    ],
)
def test_contexts_can_be_listed_by_name_and_by_wildcard(queries: list[str], expected: list[str]):
    """No query means all, a query that ends in a colon means all below it, what is unknown is ignored."""
    client = Client()
    client.option(Option.STRUCTURED_REPLY)
    assert [name for _, name in with_contexts(client, Option.LIST_META_CONTEXT, "disk", queries)] == expected


def test_contexts_are_selected_by_exact_name_only():
    """Wildcards select nothing; every selected context has an identifier of its own."""
    client = Client()
    client.option(Option.STRUCTURED_REPLY)
    queries = ["silo:residency", "base:", "base:allocation", "x:unknown", "base:allocation"]
    found = with_contexts(client, Option.SET_META_CONTEXT, "disk", queries)
    assert sorted(name for _, name in found) == ["base:allocation", "silo:residency"]
    assert len({context_id for context_id, _ in found}) == 2
    client.option(Option.GO, encode_info_request("vm/disk"))
    assert client.last == Agreed(DISK, HeaderStyle.STRUCTURED, dict(found))


def test_a_selection_replaces_the_one_before_even_when_it_fails():
    """The last SET_META_CONTEXT counts, and nothing else."""
    for data in (
        encode_context_queries("disk", []),
        encode_context_queries("nothing", ["base:allocation"]),
        b"nonsense",
    ):
        client = Client()
        client.option(Option.STRUCTURED_REPLY)
        assert with_contexts(client, Option.SET_META_CONTEXT, "disk", ["base:allocation"])
        client.option(Option.SET_META_CONTEXT, data)
        client.option(Option.GO, encode_info_request("disk"))
        assert client.last == Agreed(DISK, HeaderStyle.STRUCTURED, {})


def test_a_selection_belongs_to_its_export():
    """Contexts that were selected for one export mean nothing for another."""
    client = Client()
    client.option(Option.STRUCTURED_REPLY)
    with_contexts(client, Option.SET_META_CONTEXT, "disk", ["base:allocation"])
    client.option(Option.GO, encode_info_request("vm/cdrom"))
    assert client.last == Agreed(CDROM, HeaderStyle.STRUCTURED, {})


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_need_replies_that_can_carry_them(option: Option):
    """Without structured replies or extended headers they are refused; for an unknown export too."""
    client = Client()
    data = encode_context_queries("disk", ["base:"])
    assert client.final(option, data) == OptionReply.ERR_INVALID
    client.option(Option.EXTENDED_HEADERS)
    assert client.final(option, data) == OptionReply.ACK
    assert client.final(option, encode_context_queries("nothing", [])) == OptionReply.ERR_UNKNOWN


def test_filtered_status_is_offered_with_extended_headers_and_contexts():
    """BLOCK_STATUS_PAYLOAD is promised only where it can be used."""
    client = Client()
    client.option(Option.EXTENDED_HEADERS)
    asked = encode_info_request("disk")
    assert not decode_info_export(client.option(Option.INFO, asked)[0][1])[1] & 1 << 12
    with_contexts(client, Option.SET_META_CONTEXT, "disk", ["base:allocation"])
    assert decode_info_export(client.option(Option.GO, asked)[0][1])[1] & 1 << 12


def test_without_encryption_starttls_is_against_the_policy():
    """The client may go on without."""
    client = Client()
    assert client.final(Option.STARTTLS) == OptionReply.ERR_POLICY
    assert client.final(Option.LIST) == OptionReply.ACK


def test_required_encryption_comes_first():
    """Everything but STARTTLS and ABORT is refused, unknown options too; EXPORT_NAME ends the connection."""
    client = Client(tls=TlsPolicy.REQUIRED)
    for option in (Option.LIST, Option.INFO, Option.GO, Option.STRUCTURED_REPLY, 99):
        assert client.final(option, encode_info_request("disk")) == OptionReply.ERR_TLS_REQD
    assert client.final(Option.ABORT) == OptionReply.ACK
    with pytest.raises(RemoteProtocolError):
        Client(tls=TlsPolicy.REQUIRED).say(encode_option(Option.EXPORT_NAME, b"disk"))


@pytest.mark.parametrize("tls", [TlsPolicy.REQUIRED, TlsPolicy.OPTIONAL])
def test_encryption_forgets_what_came_before_it(tls: TlsPolicy):
    """Structured replies and contexts must be agreed upon again; a second STARTTLS is refused."""
    client = Client(tls=tls)
    client.option(Option.EXTENDED_HEADERS)
    assert client.option(Option.STARTTLS) == [(OptionReply.ACK, b"")]
    assert client.last == StartTls()
    client.server.tls_started()
    assert client.final(Option.STARTTLS) == OptionReply.ERR_INVALID
    assert client.final(Option.GO, encode_info_request("")) == OptionReply.ACK
    assert client.last == Agreed(DISK, HeaderStyle.SIMPLE, {})


def test_bytes_smuggled_behind_starttls_are_noticed():
    """What was sent in the clear must not be taken for something that came encrypted."""
    client = Client(tls=TlsPolicy.REQUIRED)
    client.say(encode_option(Option.STARTTLS) + encode_option(Option.LIST))
    assert client.last == StartTls()
    with pytest.raises(RemoteProtocolError):
        client.server.tls_started()


def test_encryption_needs_the_fixed_handshake():
    """A client that did not agree to fixed newstyle is not offered TLS."""
    client = Client(tls=TlsPolicy.OPTIONAL, flags=CLIENT_FLAGS.pack(0))
    assert client.final(Option.STARTTLS) == OptionReply.ERR_POLICY


def test_a_server_that_shuts_down_says_so():
    """Every option is refused, ABORT is not, EXPORT_NAME ends the connection."""
    client = Client()
    client.server.shutting_down = True
    for option in (Option.LIST, Option.GO, 99):
        assert client.final(option, encode_info_request("")) == OptionReply.ERR_SHUTDOWN
    assert client.final(Option.ABORT) == OptionReply.ACK
    other = Client()
    other.server.shutting_down = True
    with pytest.raises(RemoteProtocolError):
        other.say(encode_option(Option.EXPORT_NAME))


def test_the_number_of_options_is_limited():
    """A client that never chooses is dropped."""
    client = Client()
    for _ in range(OPTIONS_MAX):
        client.option(Option.LIST)
    with pytest.raises(RemoteProtocolError):
        client.option(Option.LIST)


def test_one_event_answers_one_option():
    """A client that sends many options at once makes the server hold the answer to one."""
    client = Client()
    client.server.receive_data(encode_option(Option.LIST) * 5)
    client.server.next_event()
    assert len(client.server.data_to_send()) == len(Client().say(encode_option(Option.LIST)))


def test_an_option_must_start_with_its_magic():
    """Anything else cannot be followed."""
    with pytest.raises(RemoteProtocolError):
        Client().say(b"GET / HTTP/1.1\r\n")


@given(
    st.sampled_from(list(TlsPolicy)),
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.tuples(st.integers(0, 13), st.binary(max_size=40)),
            st.tuples(st.sampled_from([6, 7]), st.just(encode_info_request("disk", [1, 2, 3]))),
            st.tuples(st.sampled_from([9, 10]), st.just(encode_context_queries("disk", ["base:"]))),
        ),
        max_size=10,
    ),
    st.integers(1, 50),
)
def test_any_client_ends_in_an_answer_or_a_clean_error(
    tls: TlsPolicy, parts: list[bytes | tuple[int, bytes]], step: int
):
    """Whatever comes, the server answers in whole messages, or declares the client lost."""
    try:
        client = Client(tls=tls, step=step)
        for part in parts:
            client.say(part if isinstance(part, bytes) else encode_option(*part))
            assert len(client.server.trailing) < 1000
    except RemoteProtocolError as error:
        assert str(error)  # noqa: PT017
