"""The target's receiving: chunks are verified and installed, and older versions are refused.

Versions (safety rule 12). Before the handover every push carries the round in which it was read, and a chunk
takes none that is older than its last invalidation. After it, content does not change any more, and only what
was sent as final counts. So whatever a connection still held when it broke cannot do harm, and neither can anything
of another migration.

Pushes come over several connections, and nothing orders those among one another. What came too late is refused by its
round; what came too early, before its round was announced, waits (`until_announced`), or else it would be dropped in
favour of the older content that its round invalidates, and count as there all the same. What was sent before the
handover and comes after it is refused. (That an invalidation waits for a fill that has begun is the volume's business.)

Installing is filling: only what is absent is written, so the guest always wins, and doing it twice is harmless.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import zstandard
from blake3 import blake3

from silo.abc import Buffer, Clock
from silo.chunkmap import RESIDENCY_MASK, SYNC_DIRTY, ChunkMap, Indices, Residency, runs_of
from silo.errors import RemoteProtocolError
from silo.p2p.chunksets import SET_WINDOW
from silo.p2p.messages import FINAL_ROUND, Heat, Invalidate, Round, Zeros, message_set
from silo.p2p.meter import Meter
from silo.p2p.peer_source import PeerSource
from silo.p2p.precopy import dequantise
from silo.p2p.records import HandoverBody, unpack_set
from silo.p2p.signal import Signal
from silo.p2p.wire import ChunkFrame, Encoding
from silo.volume import Volume

__all__ = ["Installer"]


class Installer:
    """See the module. Volumes are numbered as in the offer. Nothing is durable before the group was flushed."""

    def __init__(self, migration: bytes, volumes: Sequence[Volume], peer: PeerSource, clock: Clock) -> None:
        self.is_final = False
        """The handover is applied: nothing is invalidated any more."""
        self.meter = Meter()
        self.volumes = volumes
        self._clock = clock
        self._migration = migration
        self._peer = peer
        self._unpacker = zstandard.ZstdDecompressor()
        self._round = 0
        self._announced = 0
        self._is_closing = False
        """The handover is being applied: what was sent before it, and comes over other lanes, counts no more."""
        self._changed = Signal()
        self._invalid: list[npt.NDArray[np.uint16]] = [
            np.zeros(volume.chunks.count, dtype=np.uint16) for volume in volumes
        ]
        """The round of each chunk's last invalidation; of no use once final."""

    async def start_empty(self) -> None:
        """Whatever the devices hold is not of this migration: every chunk is absent, durably.

        Otherwise a power loss after the handover could bring back what was there before. From here on until `settle`
        no map is made durable: after a power loss in between, everything is absent, and comes again.
        """
        for volume in self.volumes:
            counts = volume.chunks.count_residency()
            if sum(counts.values()) > counts[Residency.ABSENT_STORE] + counts[Residency.ABSENT_PEER]:
                await volume.invalidate(0, volume.chunks.count, Residency.ABSENT_STORE)
                await volume.checkpoint()
            volume.keeps_map = False

    # ---- rounds -----------------------------------------------------------------------------------------

    async def invalidate(self, message: Invalidate) -> None:
        """The source has newer content of these chunks than it sent before."""
        volume = self._volume(message.volume)
        if self.is_final or not self._round <= message.round < FINAL_ROUND:
            raise RemoteProtocolError(f"round {message.round} was announced after round {self._round}")
        chunks = message_set(message, volume.chunks.count)
        self._round = message.round
        self._invalid[message.volume][chunks] = message.round
        for first, limit in runs_of(chunks):
            await volume.invalidate(first, limit, Residency.ABSENT_PEER)

    def announce(self, message: Round) -> None:
        """Every invalidation of a round has been dealt with."""
        if self.is_final or not max(self._round, self._announced) <= message.round < FINAL_ROUND:
            raise RemoteProtocolError(f"round {message.round} began after round {self._round}")
        self._round = self._announced = message.round
        self._changed.notify()

    async def until_announced(self, round_: int) -> None:
        """Return when content of this round may be judged. No deadline: a source that does not go on is silent, too."""
        await self._changed.until(
            lambda: self.is_final or (round_ <= self._announced and round_ != FINAL_ROUND)
        )

    async def install(self, frame: ChunkFrame) -> None:
        """Verify a pushed or demanded chunk, and fill it if it is absent and the push is not outdated.

        `RemoteProtocolError` when it is not what it says; raises what the device raises.
        """
        volume = self._volume(frame.volume)
        if frame.migration != self._migration or frame.chunk >= volume.chunks.count:
            raise RemoteProtocolError(f"chunk {frame.chunk} of another migration, or of no volume, was sent")
        if frame.length != volume.geometry.extent_of(frame.chunk)[1]:
            raise RemoteProtocolError(f"chunk {frame.chunk} of {volume.name} came with {frame.length} bytes")
        content: Buffer | None = None
        if frame.encoding is not Encoding.ZERO:
            content = frame.payload if frame.encoding is Encoding.RAW else self._unpacked(frame)
            if blake3(content).digest() != frame.digest:
                raise RemoteProtocolError(f"chunk {frame.chunk} of {volume.name} was damaged on its way")
            self.meter.add(frame.length, self._clock.monotonic())
        if not self._is_current(frame.round, frame.volume, frame.chunk):
            return
        if self._peer.arrived(frame.volume, frame.chunk, content):
            return
        if not volume.fill_nowait(frame.chunk, content):
            await volume.fill(frame.chunk, content)

    def _unpacked(self, frame: ChunkFrame) -> bytes:
        """Never allocates more than the chunk has, whatever hostile bytes claim."""
        try:
            if zstandard.frame_content_size(frame.payload) != frame.length:
                raise RemoteProtocolError(f"chunk {frame.chunk} was packed as one of another length")
            return self._unpacker.decompress(
                frame.payload, max_output_size=frame.length, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise RemoteProtocolError(f"chunk {frame.chunk} cannot be unpacked: {error}") from None

    def install_zeros(self, message: Zeros) -> None:
        """As `install`, for runs of zeros."""
        volume = self._volume(message.volume)
        chunks = message_set(message, volume.chunks.count)
        if self.is_final or message.round == FINAL_ROUND:
            current = chunks if self._is_current(message.round, message.volume, 0) else chunks[:0]
        else:
            current = chunks[self._invalid[message.volume][chunks] <= message.round]
            current = current[:0] if self._is_closing else current
        self._peer.arrived_zeros(message.volume, current)
        for first, limit in runs_of(current):
            volume.fill_zeros_nowait(first, limit)

    def _is_current(self, round_: int, volume: int, chunk: int) -> bool:
        if self.is_final:
            return round_ == FINAL_ROUND
        if round_ == FINAL_ROUND:
            raise RemoteProtocolError("final content was sent before the handover")
        return not self._is_closing and round_ >= int(self._invalid[volume][chunk])

    def adopt_heat(self, message: Heat) -> None:
        """How hot chunks are at the source: what hydration and the next migration go by."""
        volume = self._volume(message.volume)
        limit = message.first + len(message.reads)
        if len(message.reads) != len(message.writes) or limit > volume.chunks.count:
            raise RemoteProtocolError(f"heat was sent for chunks that {volume.name} does not have")
        for view, ranks in ((volume.heat.read_view, message.reads), (volume.heat.write_view, message.writes)):
            counts = dequantise(np.frombuffer(ranks, dtype=np.uint8))
            view[message.first : limit] += counts * np.float32(volume.heat.weight)

    def _volume(self, number: int) -> Volume:
        if number >= len(self.volumes):
            raise RemoteProtocolError(f"volume {number} was named, which was not offered")
        return self.volumes[number]

    # ---- the handover -----------------------------------------------------------------------------------

    def check(self, body: HandoverBody) -> None:
        """`RemoteProtocolError` unless the handover is of this migration and of these volumes."""
        here = [(volume.name, volume.geometry) for volume in self.volumes]
        there = [(part.volume.name, part.volume.geometry()) for part in body.volumes]
        if body.migration != self._migration or here != there:
            raise RemoteProtocolError("the handover is of another migration, or of other volumes")

    async def apply(self, body: HandoverBody) -> None:
        """What is missing becomes absent. Once, before the record is written: later the guest may have written it."""
        self._is_closing = True
        for volume, part in zip(self.volumes, body.volumes, strict=True):
            for missing in unpack_set(part.missing, volume.geometry):
                for first, limit in runs_of(missing):
                    await volume.invalidate(first, limit, Residency.ABSENT_PEER)

    def settle(self, body: HandoverBody) -> None:
        """Say of all that is absent where it is to be had, and of all that no commit covers that it is dirty.

        Harmless when repeated, and repeated after a restart. One synchronous step of about 5 ms per million chunks.
        """
        for volume, part in zip(self.volumes, body.volumes, strict=True):
            chunks = volume.chunks
            covered = 0
            for unsynced in unpack_set(part.unsynced, volume.geometry):
                first = int(unsynced[0]) // SET_WINDOW * SET_WINDOW
                limit = min(first + SET_WINDOW, chunks.count)
                _set_absent(chunks, covered, first, Residency.ABSENT_STORE)
                only_here = np.zeros(limit - first, dtype=bool)
                only_here[unsynced - first] = True
                states = chunks.view[first:limit]
                residency = np.where(
                    only_here, np.uint8(Residency.ABSENT_PEER), np.uint8(Residency.ABSENT_STORE)
                )
                absent = states & RESIDENCY_MASK < Residency.ZERO
                states[:] = np.where(absent, states & np.uint8(0xFF & ~RESIDENCY_MASK) | residency, states)
                chunks.mark_many(unsynced, SYNC_DIRTY)
                covered = limit
            _set_absent(chunks, covered, chunks.count, Residency.ABSENT_STORE)
        for volume in self.volumes:
            volume.keeps_map = True
        self.is_final = True
        self._invalid = []
        self._changed.notify()

    def needed(self) -> list[Indices]:
        """The chunks of each volume that only the source has. Reads every map."""
        return [volume.chunks.select(RESIDENCY_MASK, Residency.ABSENT_PEER) for volume in self.volumes]


def _set_absent(chunks: ChunkMap, first: int, limit: int, residency: Residency) -> None:
    """Whatever is absent in the run is to be had from there."""
    states = chunks.view[first:limit]
    absent = states & RESIDENCY_MASK < Residency.ZERO
    states[:] = np.where(absent, states & np.uint8(0xFF & ~RESIDENCY_MASK) | np.uint8(residency), states)
