"""The commands on a real volume: replies, refusals, order within a batch, and what must wait."""

from __future__ import annotations

import pytest

from silo.abc import Buffer
from silo.chunkmap import Residency
from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.memory import MemoryDevice
from silo.errors import ClosedError
from silo.exports.nbd_chunks import encode_status_filter
from silo.exports.nbd_contexts import CONTEXT_NAMES
from silo.exports.nbd_replies import Replies, replies_for
from silo.exports.nbd_service import NbdService
from silo.exports.nbd_session import HeaderStyle, Request
from silo.exports.nbd_wire import Command, CommandFlag, NbdError
from silo.volume import Volume
from tests.support.volumes import CHUNK, DictSource, make_volume, states

COUNT = 16
SIZE = COUNT * CHUNK
LARGEST = 8 * CHUNK
READ, WRITE, FLUSH, TRIM = Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM
CACHE, ZEROES, STATUS = Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS
FUA, NO_HOLE, DF = CommandFlag.FUA, CommandFlag.NO_HOLE, CommandFlag.DF
FAST, ONE, PAYLOAD = CommandFlag.FAST_ZERO, CommandFlag.REQ_ONE, CommandFlag.PAYLOAD_LEN
COOKIE = 7
EVERY_STYLE = pytest.mark.parametrize("style", list(HeaderStyle))
CHUNKED = pytest.mark.parametrize("style", [HeaderStyle.STRUCTURED, HeaderStyle.EXTENDED])


class Served:
    """A volume of 16 chunks and a service on it. Chunk ``n`` is filled with bytes of value ``n + 1``."""

    def __init__(
        self,
        style: HeaderStyle = HeaderStyle.SIMPLE,
        residency: Residency = Residency.PRESENT,
        *,
        contexts: bool = True,
        **options: object,
    ) -> None:
        self.device = FaultyDevice(MemoryDevice(SIZE))
        self.volume: Volume
        _, self.volume = make_volume(self.device, residency)
        for chunk in range(COUNT):
            self.device.inner.write_nowait(chunk * CHUNK, bytes([chunk + 1]) * CHUNK)
        self.replies: Replies = replies_for(style)
        names = dict(enumerate(CONTEXT_NAMES, start=1)) if contexts else {}
        self.service = NbdService(self.volume, self.replies, payload_max=LARGEST, contexts=names, **options)

    def at_once(self, *requests: Request) -> tuple[list[bytes], list[Request]]:
        """Serve a batch; the parts of the replies, and the misses."""
        out: list[bytes] = []
        misses = self.service.serve_nowait(requests, out)
        return [bytes(part) for part in out], misses

    async def ask(self, *arguments: object, **options: object) -> bytes:
        """Serve one request to its end, at whatever speed; the whole reply."""
        parts, misses = self.at_once(request(*arguments, **options))
        for miss in misses:
            parts += [bytes(part) for part in await self.service.serve(miss)]
        return b"".join(parts)

    def refusal(self, code: int, offset: int, reply: bytes) -> bool:
        """Whether a reply is the error ``code``, whatever its message."""
        if len(reply) == 16:
            return reply == self.replies.error(COOKIE, offset, code, "")
        size = len(self.replies.done(COOKIE, offset)) + 6
        message = reply[size:].decode()
        return bool(message) and reply == self.replies.error(COOKIE, offset, code, message)


def request(
    command: int, offset: int = 0, length: int = 0, payload: bytes | None = None, *, flags: int = 0
) -> Request:
    view = None if payload is None else memoryview(bytearray(payload))
    return int(command), int(flags), COOKIE, offset, length or len(payload or b""), view


# ---- the plain commands -----------------------------------------------------------------------------------


@EVERY_STYLE
async def test_reads_and_writes(style: HeaderStyle):
    """A read returns what was there, or what was written before it in the same batch."""
    served = Served(style)
    parts, misses = served.at_once(
        request(READ, 10, 20),
        request(WRITE, 15, payload=b"new"),
        request(READ, 14, 5),
        request(READ, CHUNK - 1, 2),
    )
    data, done = served.replies.data, served.replies.done
    assert misses == []
    assert parts == [
        data(COOKIE, 10, 20),
        b"\1" * 20,
        done(COOKIE, 15),
        data(COOKIE, 14, 5),
        b"\1new\1",
        data(COOKIE, CHUNK - 1, 2),
        b"\1\2",
    ]


@EVERY_STYLE
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, ZEROES])
async def test_empty_requests_succeed(style: HeaderStyle, command: Command):
    """Nothing is done to nothing, and the connection goes on."""
    served = Served(style)
    payload = b"" if command is WRITE else None
    assert await served.ask(command, 5, payload=payload) == served.replies.done(COOKIE, 5)


@EVERY_STYLE
async def test_zeroing_and_trimming(style: HeaderStyle):
    """WRITE_ZEROES reads back as zeros to the byte; TRIM takes whole chunks and leaves the edges."""
    served = Served(style)
    done = served.replies.done
    assert await served.ask(ZEROES, 100, 2 * CHUNK) == done(COOKIE, 100)
    assert bytes(await served.volume.read(99, 2 * CHUNK + 2)) == b"\1" + bytes(2 * CHUNK) + b"\3"
    assert await served.ask(TRIM, 4 * CHUNK - 5, CHUNK + 10) == done(COOKIE, 4 * CHUNK - 5)
    assert bytes(await served.volume.read(4 * CHUNK - 5, CHUNK + 10)) == b"\4" * 5 + bytes(CHUNK) + b"\6" * 5
    assert await served.ask(TRIM, 8 * CHUNK + 1, CHUNK) == done(COOKIE, 8 * CHUNK + 1)
    assert bytes(await served.volume.read(8 * CHUNK, CHUNK + 2)) == b"\x09" * CHUNK + b"\x0a\x0a"


@pytest.mark.parametrize("length", [100, 3 * CHUNK, LARGEST + CHUNK])
async def test_no_hole_allocates(length: int):
    """With NO_HOLE the zeros are written: the chunks stay allocated."""
    served = Served(HeaderStyle.SIMPLE, Residency.ZERO)
    assert await served.ask(ZEROES, 0, length, flags=NO_HOLE) == served.replies.done(COOKIE, 0)
    touched = -(-length // CHUNK)
    assert states(served.volume) == [Residency.PRESENT] * touched + [Residency.ZERO] * (COUNT - touched)
    assert bytes(await served.volume.read(0, length)) == bytes(length)


@EVERY_STYLE
async def test_fast_zero_is_fast_or_refused(style: HeaderStyle):
    """Whole chunks are a matter of the map; less than one, or with NO_HOLE, is not faster than writing."""
    served = Served(style)
    assert await served.ask(ZEROES, 100, 3 * CHUNK, flags=FAST) == served.replies.done(COOKIE, 100)
    for offset, length, flags in ((100, 200, FAST), (0, CHUNK, FAST | NO_HOLE)):
        before = bytes(await served.volume.read(0, CHUNK))
        reply = await served.ask(ZEROES, offset, length, flags=flags)
        assert served.refusal(NbdError.ENOTSUP, offset, reply)
        assert bytes(await served.volume.read(0, CHUNK)) == before


@EVERY_STYLE
@pytest.mark.parametrize("command", [WRITE, TRIM, ZEROES])
async def test_fua_answers_after_a_flush(style: HeaderStyle, command: Command):
    """The change is made at once; the reply waits for the device's flush."""
    served = Served(style)
    payload = b"x" * CHUNK if command is WRITE else None
    parts, misses = served.at_once(request(command, CHUNK, CHUNK, payload, flags=FUA))
    assert parts == []
    assert len(misses) == 1
    served.device.fail(Verb.FLUSH)
    (failed,) = await served.service.serve(misses[0])
    assert served.refusal(NbdError.EIO, CHUNK, failed)
    assert await served.service.serve(misses[0]) == [served.replies.done(COOKIE, CHUNK)]


@EVERY_STYLE
async def test_flush_flushes(style: HeaderStyle):
    """FLUSH reaches the device; so does a FLUSH with FUA, which some clients send."""
    served = Served(style)
    for flags in (0, FUA):
        before = served.device.calls
        assert await served.ask(FLUSH, flags=flags) == served.replies.done(COOKIE, 0)
        assert served.device.calls == before + 1


async def test_a_flush_that_fails_is_an_error():
    """Nothing is promised that the device did not promise."""
    served = Served()
    served.device.fail(Verb.FLUSH)
    assert served.refusal(NbdError.EIO, 0, await served.ask(FLUSH))
    served.device.fail(Verb.FLUSH)
    assert served.refusal(NbdError.EIO, 9, await served.ask(WRITE, 9, payload=b"x", flags=FUA))


# ---- refusals ---------------------------------------------------------------------------------------------


@EVERY_STYLE
@pytest.mark.parametrize(
    ("arguments", "flags", "code"),
    [
        ((READ, SIZE - 1, 2), 0, NbdError.EINVAL),
        ((READ, 1 << 63, 2), 0, NbdError.EINVAL),
        ((TRIM, SIZE, 1), 0, NbdError.EINVAL),
        ((CACHE, SIZE, 1), 0, NbdError.EINVAL),
        ((STATUS, SIZE, 1), 0, NbdError.EINVAL),
        ((WRITE, SIZE - 1, 2, b"xx"), 0, NbdError.ENOSPC),
        ((ZEROES, SIZE - 1, 2), 0, NbdError.ENOSPC),
        ((ZEROES, (1 << 64) - 1, 2), 0, NbdError.ENOSPC),
        ((FLUSH, 512, 0), 0, NbdError.EINVAL),
        ((FLUSH, 0, 512), 0, NbdError.EINVAL),
        ((99, 0, 0), 0, NbdError.EINVAL),
        ((8, 0, 0), 0, NbdError.EINVAL),
        ((READ, 0, 1), 1 << 15, NbdError.EINVAL),
        ((READ, 0, 1), NO_HOLE, NbdError.EINVAL),
        ((READ, 0, 1), PAYLOAD, NbdError.EINVAL),
        ((WRITE, 0, 1, b"x"), DF, NbdError.EINVAL),
        ((WRITE, 0, 1), 0, NbdError.EINVAL),
        ((FLUSH, 0, 0), NO_HOLE, NbdError.EINVAL),
        ((TRIM, 0, 1), FAST, NbdError.EINVAL),
        ((CACHE, 0, 1), ONE, NbdError.EINVAL),
        ((ZEROES, 0, 1), DF, NbdError.EINVAL),
        ((STATUS, 0, 1), NO_HOLE, NbdError.EINVAL),
    ],
)
async def test_what_makes_no_sense_is_refused(
    style: HeaderStyle, arguments: tuple[object, ...], flags: int, code: NbdError
):
    """Extents outside, unknown commands, flags that do not belong: an error each, and nothing happens."""
    served = Served(style)
    reply = await served.ask(*arguments, flags=flags)
    assert served.refusal(code, int(arguments[1]), reply)
    assert bytes(await served.volume.read(0, CHUNK)) == b"\1" * CHUNK


@EVERY_STYLE
async def test_reads_beyond_the_largest_payload_are_refused(style: HeaderStyle):
    """EOVERFLOW where the client can know that word, EINVAL elsewhere."""
    served = Served(style)
    code = NbdError.EINVAL if style is HeaderStyle.SIMPLE else NbdError.EOVERFLOW
    assert served.refusal(code, 0, await served.ask(READ, 0, LARGEST + 1))
    assert len(await served.ask(READ, 0, LARGEST)) > LARGEST


async def test_df_needs_replies_that_could_be_fragmented():
    """With simple replies the flag was never offered."""
    assert Served().refusal(NbdError.EINVAL, 0, await Served().ask(READ, 0, 1, flags=DF))


@EVERY_STYLE
@pytest.mark.parametrize("read_only", ["export", "volume"])
async def test_a_read_only_export_refuses_changes(style: HeaderStyle, read_only: str):
    """EPERM for whatever would change it; reading, flushing and caching go on."""
    served = Served(style, read_only=read_only == "export")
    if read_only == "volume":
        served.volume.read_only = True
        served.service = NbdService(served.volume, served.replies, payload_max=LARGEST)
    for arguments in ((WRITE, 3, 1, b"x"), (TRIM, 3, CHUNK), (ZEROES, 3, CHUNK)):
        assert served.refusal(NbdError.EPERM, 3, await served.ask(*arguments))
    assert served.replies.data(COOKIE, 0, 1) + b"\1" == await served.ask(READ, 0, 1)
    assert await served.ask(FLUSH) == served.replies.done(COOKIE, 0)


@EVERY_STYLE
async def test_a_minimum_block_size_is_enforced(style: HeaderStyle):
    """Where the export asks for alignment, everything else is EINVAL and changes nothing."""
    served = Served(style, block_size=512)
    for arguments in ((READ, 1, 512), (READ, 0, 100), (WRITE, 256, 512, b"x" * 512), (ZEROES, 512, 700)):
        assert served.refusal(NbdError.EINVAL, int(arguments[1]), await served.ask(*arguments))
    assert await served.ask(WRITE, 512, payload=b"x" * 512) == served.replies.done(COOKIE, 512)


@EVERY_STYLE
@pytest.mark.parametrize("verb", [Verb.READ, Verb.WRITE])
async def test_a_device_error_becomes_an_error_reply(style: HeaderStyle, verb: Verb):
    """The request fails, the batch and the connection go on."""
    served = Served(style)
    served.device.fail(verb)
    arguments = (READ, 9, 1) if verb is Verb.READ else (WRITE, 9, 1, b"x")
    parts, misses = served.at_once(request(*arguments), request(READ, 0, 1))
    assert misses == []
    assert served.refusal(NbdError.EIO, 9, parts[0])
    assert parts[1:] == [served.replies.data(COOKIE, 0, 1), b"\1"]


@EVERY_STYLE
async def test_the_server_can_refuse_for_reasons_of_its_own(style: HeaderStyle):
    """While it shuts down, for instance."""
    served = Served(style)
    reply = served.service.refuse(request(READ, 5, 1), ClosedError("going down"))
    assert served.refusal(NbdError.ESHUTDOWN, 5, reply)


# ---- what waits -------------------------------------------------------------------------------------------


@EVERY_STYLE
async def test_absent_chunks_are_fetched(style: HeaderStyle):
    """A read, a partial write and a CACHE of absent chunks wait for their source; the rest of the batch does not."""
    served = Served(style, Residency.ABSENT_STORE)
    served.volume.chunks.set_residency(3, Residency.PRESENT)
    source = DictSource({chunk: bytes([100 + chunk]) * CHUNK for chunk in range(COUNT)})
    served.volume.set_source(Residency.ABSENT_STORE, source)
    parts, misses = served.at_once(
        request(READ, 0, 2),
        request(WRITE, CHUNK + 1, payload=b"x"),
        request(CACHE, 2 * CHUNK, 1),
        request(READ, 3 * CHUNK, 1),
        request(WRITE, 4 * CHUNK, payload=b"w" * CHUNK),
    )
    assert parts == [served.replies.data(COOKIE, 3 * CHUNK, 1), b"\4", served.replies.done(COOKIE, 4 * CHUNK)]
    assert [miss[0] for miss in misses] == [READ, WRITE, CACHE]
    replied = [[bytes(part) for part in await served.service.serve(miss)] for miss in misses]
    assert replied == [
        [served.replies.data(COOKIE, 0, 2), b"dd"],
        [served.replies.done(COOKIE, CHUNK + 1)],
        [served.replies.done(COOKIE, 2 * CHUNK)],
    ]
    assert bytes(await served.volume.read(CHUNK, 3)) == b"exe"
    assert sorted(chunk for chunk, _ in source.asked) == [0, 1, 2]


@EVERY_STYLE
async def test_a_closed_gate_makes_everything_wait(style: HeaderStyle):
    """Reads too, holes too: another host may have newer content."""
    served = Served(style)
    served.volume.chunks.set_residency(1, Residency.ZERO)
    await served.volume.gate.close_and_drain()
    requests = [
        request(READ, 0, 10),
        request(READ, 0, 2 * CHUNK),
        request(READ, CHUNK, 10),
        request(WRITE, 0, payload=b"x"),
        request(ZEROES, 0, CHUNK),
        request(TRIM, 0, CHUNK),
    ]
    assert served.at_once(*requests) == ([], requests)


# ---- live memory ------------------------------------------------------------------------------------------


async def test_a_read_does_not_see_a_write_that_came_after_it():
    """Replies of one batch leave together, so a view that a later write changes is copied first."""
    served = Served()
    out: list[bytes] = []
    served.service.serve_nowait(
        [
            request(READ, 0, 3),
            request(READ, CHUNK, 3),
            request(WRITE, 5 * CHUNK, payload=b"elsewhere"),
            request(WRITE, 1, payload=b"new"),
            request(READ, 0, 3),
            request(WRITE, 0, payload=b"again", flags=FUA),
        ],
        out,
    )
    assert [bytes(part) for part in out if len(part) == 3] == [b"\1\1\1", b"\2\2\2", b"\1ne"]


async def test_reads_that_nothing_overwrites_are_not_copied():
    """Writes elsewhere leave the views alone."""
    served = Served()
    out: list[bytes | memoryview] = []
    served.service.serve_nowait([request(READ, 0, 3), request(WRITE, 5 * CHUNK, payload=b"x")], out)
    assert isinstance(out[1], memoryview)


async def test_punching_an_old_hole_does_not_reach_an_earlier_read():
    """A write into a chunk that was just zeroed punches the whole chunk; a read before both keeps its bytes."""
    served = Served()
    out: list[bytes] = []
    served.service.serve_nowait(
        [
            request(READ, 100, 3),
            request(ZEROES, 0, CHUNK),
            request(WRITE, CHUNK - 5, payload=b"tail"),
            request(READ, 100, 3),
        ],
        out,
    )
    assert [bytes(part) for part in out if len(part) == 3] == [b"\1\1\1", bytes(3)]


# ---- holes and status -------------------------------------------------------------------------------------


@CHUNKED
async def test_zeros_are_answered_as_holes(style: HeaderStyle):
    """A read over zero chunks sends only what is data, in order, and ends with a chunk of its own."""
    served = Served(style)
    replies = served.replies
    served.volume.chunks.set_residency_run(1, 3, Residency.ZERO)
    assert await served.ask(READ, CHUNK + 5, 10) == b"".join(
        (replies.hole_chunk(COOKIE, CHUNK + 5, CHUNK + 5, 10), replies.done(COOKIE, CHUNK + 5))
    )
    assert await served.ask(READ, CHUNK, 3 * CHUNK) == b"".join(
        (
            replies.hole_chunk(COOKIE, CHUNK, CHUNK, 2 * CHUNK),
            replies.data_chunk(COOKIE, CHUNK, 3 * CHUNK, CHUNK),
            b"\4" * CHUNK,
            replies.done(COOKIE, CHUNK),
        )
    )


@CHUNKED
async def test_df_is_one_piece(style: HeaderStyle):
    """A client that cannot reassemble gets the zeros themselves."""
    served = Served(style)
    served.volume.chunks.set_residency(1, Residency.ZERO_UNPUNCHED)
    assert await served.ask(READ, CHUNK - 1, 3, flags=DF) == (
        served.replies.data(COOKIE, CHUNK - 1, 3) + b"\1\0\0"
    )


@CHUNKED
async def test_status_has_a_chunk_for_every_selected_context(style: HeaderStyle):
    """Then the reply is done."""
    served = Served(style)
    replies = served.replies
    served.volume.chunks.set_residency(1, Residency.ZERO)
    served.service = NbdService(
        served.volume, replies, payload_max=LARGEST, contexts={4: "base:allocation", 9: "silo:residency"}
    )
    assert await served.ask(STATUS, 0, 2 * CHUNK) == b"".join(
        (
            replies.status_chunk(COOKIE, 0, 4, [(CHUNK, 0), (CHUNK, 3)]),
            replies.status_chunk(COOKIE, 0, 9, [(CHUNK, 1), (CHUNK, 0)]),
            replies.done(COOKIE, 0),
        )
    )
    assert await served.ask(STATUS, 5, 2 * CHUNK, flags=ONE | FUA) == b"".join(
        (
            replies.status_chunk(COOKIE, 5, 4, [(CHUNK - 5, 0)]),
            replies.status_chunk(COOKIE, 5, 9, [(CHUNK - 5, 1)]),
            replies.done(COOKIE, 5),
        )
    )


@EVERY_STYLE
async def test_status_needs_a_selected_context_and_an_extent(style: HeaderStyle):
    """Without either there is nothing to say."""
    bare = Served(style, contexts=False)
    assert bare.refusal(NbdError.EINVAL, 0, await bare.ask(STATUS, 0, CHUNK))
    served = Served(style)
    assert served.refusal(NbdError.EINVAL, 0, await served.ask(STATUS, 0, 0))


async def test_status_can_be_filtered():
    """With extended headers a payload names the contexts wanted and the real extent."""
    served = Served(HeaderStyle.EXTENDED)
    reply = await served.ask(STATUS, 0, payload=encode_status_filter(CHUNK, [4]), flags=PAYLOAD)
    assert reply == served.replies.status_chunk(COOKIE, 0, 4, [(CHUNK, 1)]) + served.replies.done(COOKIE, 0)
    for payload in (
        encode_status_filter(CHUNK, [4, 4]),
        encode_status_filter(CHUNK, [77]),
        encode_status_filter(CHUNK, []),
        encode_status_filter(SIZE + 1, [4]),
        encode_status_filter(0, [4]),
        b"short",
    ):
        refused = await served.ask(STATUS, 0, payload=payload, flags=PAYLOAD)
        assert served.refusal(NbdError.EINVAL, 0, refused)


async def test_a_filter_without_extended_headers_is_an_unknown_flag():
    """Structured replies do not know filtered status."""
    served = Served(HeaderStyle.STRUCTURED)
    refused = await served.ask(STATUS, 0, payload=encode_status_filter(CHUNK, [4]), flags=PAYLOAD)
    assert served.refusal(NbdError.EINVAL, 0, refused)


class Reluctant(MemoryDevice):
    """Declines large writes, and all of them after so many."""

    def __init__(self, size: int, patience: int) -> None:
        super().__init__(size)
        self.patience = patience

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if len(data) > 256 << 10 or not self.patience:
            return False
        self.patience -= 1
        return super().write_nowait(offset, data)

    async def write(self, offset: int, data: Buffer) -> None:
        super().write_nowait(offset, data)


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize(
    ("length", "patience", "at_once"),
    [
        (1 << 20, 4, True),
        ((1 << 20) - 512, 4, True),
        (1 << 20, 3, False),
        (1 << 20, 0, False),
        (2 << 20, 99, False),
    ],
    ids=["in four steps", "the last one shorter", "declined in the end", "declined at once", "too large"],
)
async def test_a_large_write_is_offered_in_steps(length: int, patience: int, at_once: bool, flags: int):
    """Steps that were taken are part of the write; when one is declined, all of it is done again by a task."""
    device = Reluctant(4 << 20, patience)
    _, volume = make_volume(device)
    service = NbdService(volume, replies_for(HeaderStyle.SIMPLE), payload_max=4 << 20)
    content = bytes(range(256)) * (length // 256)
    out: list[Buffer] = []
    misses = service.serve_nowait([request(WRITE, 512, payload=content, flags=flags)], out)
    assert [miss[0] for miss in misses] == ([] if at_once else [WRITE])
    assert bool(out) == at_once
    for miss in misses:
        await service.serve(miss)
    assert bytes(device.read_nowait(512, length)) == content


async def test_a_lease_is_asked_for_once_per_batch():
    """Nothing of a batch is served after it has ended, and all of it waits."""
    served = Served(HeaderStyle.SIMPLE)
    asked = []
    served.volume.gate.may_serve = lambda: bool(asked.append(1)) or len(asked) == 1
    batch = [(READ, 0, COOKIE, 0, 1, None)] * 3
    parts, misses = served.at_once(*batch)
    assert (len(parts), misses, asked) == (6, [], [1])
    parts, misses = served.at_once(*batch)
    assert (parts, len(misses), asked) == ([], 3, [1, 1])
