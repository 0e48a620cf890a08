"""The source's sending: pushes over the bulk lane, and answers to demands over the other.

`Pusher.push` asks the planner what comes next, reads it and sends it, as long as the window has room. What is
read is stable: a copy while the guest may write, the device's own buffer once it cannot any more. Each chunk goes out
with the BLAKE3 digest of what was read, so that the target installs nothing else.

A batch is taken from the planner and entered as flying in one step. So a link that breaks at any await
loses nothing: what flew is wanted again.
"""

from __future__ import annotations

import asyncio
from typing import Final, Never

import numpy as np
import zstandard
from blake3 import blake3

from silo.abc import Buffer, Clock
from silo.chunkmap import RESIDENCY_MASK, Indices, Residency, runs_of
from silo.errors import RemoteProtocolError, SiloError
from silo.p2p.channel import Channel
from silo.p2p.messages import FINAL_ROUND, TEXT_MAX, Drained, Message, Unavailable, Want, decode
from silo.p2p.meter import Meter, Pacer
from silo.p2p.rounds import Rounds
from silo.p2p.settings import MigrationSettings
from silo.p2p.signal import Signal
from silo.p2p.thrift import pays
from silo.p2p.wire import DIGEST_SIZE, Encoding, FrameType, chunk_header
from silo.threads import run_to_completion
from silo.volume import Volume
from silo.zeros import is_zero

__all__ = ["BULK", "Pusher"]

NO_DIGEST: Final = bytes(DIGEST_SIZE)
"""Of a chunk of zeros, which needs none."""

BULK: Final = 0
"""The lane that always is there; the others are numbered from 1."""

LEVEL: Final = 1
"""Of zstd: more costs much and saves little."""

Content = tuple[int, int, Buffer | None]
"""A chunk, its length, and its content, which is ``None`` when it is all zeros."""


def _compressed(contents: list[Content]) -> dict[int, bytes]:
    """Those that become smaller by it, by chunk. Heavy; releases the interpreter's lock."""
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
    packed: dict[int, bytes] = {}
    for chunk, length, content in contents:
        if content is not None and len(smaller := compressor.compress(content)) < length:
            packed[chunk] = smaller
    return packed


class Pusher:
    """See the module. `push` and `serve_demands` run for one link at a time."""

    def __init__(
        self, rounds: Rounds, migration: bytes, clock: Clock, settings: MigrationSettings, changed: Signal
    ) -> None:
        self.meter = Meter()
        self.window = settings.window
        """Pushes that may be under way and not acknowledged: ours, or less if the target wants less."""
        self.is_frozen = False
        """The guest is stopped for good: what is read does not change any more."""
        self.error: SiloError | None = None
        """Why a chunk could not be read here; the link breaks over it."""
        self._rounds = rounds
        self._planner = rounds.planner
        self._migration = migration
        self._clock = clock
        self._settings = settings
        self._changed = changed
        self.may_compress = False
        """The target can unpack."""
        self._carried = Meter()
        self._sampler = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
        self._enabled = False
        self._drained = False
        self._pacer = Pacer(settings.rate_bps)

    def start(self) -> None:
        """What is planned may go out on the present link."""
        self._enabled = True
        self._drained = False
        self._changed.notify()

    def stop(self) -> None:
        """Nothing more is begun: the link broke, or the handover is next."""
        self._enabled = False

    @property
    def is_idle(self) -> bool:
        """Everything that was planned has been sent and acknowledged."""
        return self._enabled and not self._rounds.announcements and self._planner.is_settled

    # ---- pushing ----------------------------------------------------------------------------------------

    async def push(self, channel: Channel) -> Never:
        """Send what is planned, for as long as the link lives. After the handover, say when nothing is left."""
        while True:
            await self._changed.until(self._has_work)
            if self._rounds.announcements:
                await channel.send(self._rounds.announcements.popleft())
            elif self._planner.wanted_bytes:
                await self._push_batch(channel, BULK)
            else:
                self._drained = True
                await channel.send(Drained())

    async def help_push(self, channel: Channel, lane: int) -> Never:
        """Send chunks on another lane, for as long as it lives. Everything else is the bulk lane's."""
        while True:
            await self._changed.until(self._has_chunks)
            await self._push_batch(channel, lane)

    def _has_work(self) -> bool:
        if not self._enabled:
            return False
        if self._rounds.announcements:
            return True
        if self._planner.wanted_bytes:
            return self._planner.flying_bytes < self.window
        return self.is_frozen and not self._drained and self._planner.is_settled

    def _has_chunks(self) -> bool:
        """A round is announced whole before any other lane goes on: until then the target would let it wait."""
        return (
            self._enabled
            and not self._rounds.announcements
            and self._planner.wanted_bytes > 0
            and self._planner.flying_bytes < self.window
        )

    async def _push_batch(self, channel: Channel, lane: int) -> None:
        batch = self._planner.take_batch(self._settings.batch)
        if batch is None:
            self._rounds.reorder()  # what became wanted behind the place where the walk was
            return
        volume = self._rounds.volumes[batch.volume]
        size = len(batch.chunks) * volume.geometry.chunk_size
        self._planner.launched(batch, len(batch.chunks), size, lane)
        try:
            contents = await self._read(volume, batch.chunks)
        except SiloError as error:
            self.error = error
            self._changed.notify()
            raise
        sent = await self._send(channel, batch.volume, batch.round, contents)
        delay_s = self._pacer.delay_s(sent, self._clock.monotonic())
        await asyncio.sleep(delay_s)  # also when it is 0: sending may not have given way to anybody

    async def _send(self, channel: Channel, index: int, round_: int, contents: list[Content]) -> int:
        """Hash, compress where it pays, and send; returns the bytes that content took on the link."""
        packed: dict[int, bytes] = {}
        if self.may_compress and self._settings.compress and self._compressing_pays(contents):
            packed = await run_to_completion(None, _compressed, contents)
        buffers: list[Buffer] = []
        total = carried = 0
        for chunk, length, content in contents:
            digest, encoding, payload = NO_DIGEST, Encoding.ZERO, content
            if content is not None:
                digest, encoding = blake3(content).digest(), Encoding.RAW
                if chunk in packed:
                    encoding, payload = Encoding.ZSTD, packed[chunk]
            size = 0 if payload is None else len(payload)
            header = chunk_header(
                self._migration, round_, index, chunk, length, digest, encoding, packed=size
            )
            buffers += (header,) if payload is None else (header, payload)
            total += length if content is not None else 0
            carried += size
        await channel.send_raw(FrameType.CHUNK, buffers)
        now = self._clock.monotonic()
        self.meter.add(total, now)
        self._carried.add(carried, now)
        return carried

    def _compressing_pays(self, contents: list[Content]) -> bool:
        """Try it on one chunk, and compare with how fast the link is."""
        sample = next((content for _, _, content in contents if content is not None), None)
        if sample is None:
            return False
        begun = self._clock.monotonic()
        packed = len(self._sampler.compress(sample))
        now = self._clock.monotonic()
        return pays(len(sample), packed, now - begun, self._carried.rate_bps(now))

    # ---- reading ----------------------------------------------------------------------------------------

    async def _read(self, volume: Volume, chunks: Indices) -> list[Content]:
        """The content of ascending chunks. Neighbours are read together."""
        found: list[Content] = []
        for first, limit in runs_of(chunks):
            whole = self._read_run_nowait(volume, first, limit)
            start = volume.geometry.extent_of(first)[0]
            for chunk in range(first, limit):
                offset, length = volume.geometry.extent_of(chunk)
                if whole is None:
                    content = await volume.read_chunk(chunk)
                else:
                    content = whole[offset - start : offset - start + length]
                zero = content is None or is_zero(content)
                found.append((chunk, length, None if zero else content))
        return found

    def _read_run_nowait(self, volume: Volume, first: int, limit: int) -> memoryview | None:
        """The content of neighbours that are all on the device, if that can be had at once."""
        states = volume.chunks.view[first:limit]
        if not bool(np.all(states & RESIDENCY_MASK == Residency.PRESENT)):
            return None
        start = volume.geometry.extent_of(first)[0]
        last, length = volume.geometry.extent_of(limit - 1)
        live = volume.device.read_nowait(start, last + length - start)
        if live is None:
            return None
        return memoryview(live if self.is_frozen else bytes(live))

    # ---- demands ----------------------------------------------------------------------------------------

    async def serve_demands(self, channel: Channel) -> Never:
        """Answer what guests at the target wait for, then send what is next to it. As long as the link lives."""
        while True:
            wants = [self._check(decode(frame)) for frame in await channel.receive()]
            for want in wants:
                await self._answer(channel, want)
            for want in wants:
                near = self._planner.take_neighbours(want.volume, want.chunk, self._settings.neighbours)
                await self._follow(channel, want.volume, near[near != want.chunk])

    def _check(self, want: Message) -> Want:
        if not isinstance(want, Want) or want.volume >= len(self._rounds.volumes):
            raise RemoteProtocolError("the demand lane carried something else than a demand")
        if want.chunk >= self._rounds.volumes[want.volume].chunks.count:
            raise RemoteProtocolError(f"chunk {want.chunk} was demanded, which does not exist")
        return want

    async def _answer(self, channel: Channel, want: Want) -> None:
        volume = self._rounds.volumes[want.volume]
        try:
            contents = await self._read(volume, np.array([want.chunk], dtype=np.int64))
        except SiloError as error:
            message = str(error)[:TEXT_MAX]
            await channel.send(Unavailable(volume=want.volume, chunk=want.chunk, message=message))
            return
        await self._send(channel, want.volume, FINAL_ROUND, contents)

    async def _follow(self, channel: Channel, index: int, near: Indices) -> None:
        if len(near):
            contents = await self._read(self._rounds.volumes[index], near)
            await self._send(channel, index, FINAL_ROUND, contents)
