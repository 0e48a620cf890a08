"""Compressing what is pushed: when it pays, what travels, and what a target takes."""

from __future__ import annotations

import attrs
import pytest
import zstandard
from blake3 import blake3

from silo.chunkmap import Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.errors import RemoteProtocolError
from silo.p2p import source_session, target_session
from silo.p2p.installer import Installer
from silo.p2p.peer_source import PeerSource
from silo.p2p.thrift import pays
from silo.p2p.wire import HEADER_SIZE, ChunkFrame, Encoding, chunk_header, parse_chunk
from tests.support.migration import QUICK
from tests.support.scene import Scene, simulate
from tests.support.volumes import CHUNK, make_volume

MIGRATION = b"m" * 16
TEXT = b"It compresses well. " * (CHUNK // 20) + b"!" * (CHUNK % 20)


@pytest.mark.parametrize(
    ("packed", "took_s", "rate_bps", "expected"),
    [
        (250, 0.001, 1e5, True),  # 7.5 ms less on the link for 1 ms
        (250, 0.001, 1e6, False),  # 0.75 ms for 1 ms
        (250, 0.001, 0.0, False),  # nothing is known of the link
        (950, 0.0, 1.0, False),  # it does not compress
        (1010, 0.0, 1.0, False),
    ],
)
def test_when_it_pays(packed, took_s, rate_bps, expected):
    """A slow link and text: yes. A fast one, or noise: no."""
    assert pays(1000, packed, took_s, rate_bps) is expected


def frame(payload: bytes, content: bytes = TEXT, length: int = CHUNK) -> ChunkFrame:
    """What a compressed push becomes on the other side."""
    header = chunk_header(
        MIGRATION, 0, 0, 0, length, blake3(content).digest(), Encoding.ZSTD, packed=len(payload)
    )
    return parse_chunk(memoryview(header + payload)[HEADER_SIZE:])


async def test_a_compressed_chunk_is_installed():
    """Unpacked, verified, and filled."""
    volume = make_volume(MemoryDevice(CHUNK), Residency.ABSENT_STORE)[1]
    installer = Installer(MIGRATION, [volume], PeerSource(["disk"]), SystemClock())
    await installer.install(frame(zstandard.compress(TEXT, 1)))
    assert bytes(volume.read_nowait(0, CHUNK)) == TEXT
    assert installer.meter.total == CHUNK


@pytest.mark.parametrize(
    "payload",
    [
        b"not zstd at all",
        zstandard.compress(TEXT, 1)[:-1],
        zstandard.compress(TEXT, 1) + b"more",
        zstandard.compress(TEXT[:-1], 1),
        zstandard.compress(bytes(1 << 30), 1)[:3000],
        zstandard.compress(TEXT.swapcase(), 1),
    ],
    ids=["garbage", "cut off", "trailing", "shorter", "a bomb", "other content"],
)
async def test_hostile_payloads(payload):
    """Nothing is installed, and no more is unpacked than a chunk has."""
    volume = make_volume(MemoryDevice(CHUNK), Residency.ABSENT_STORE)[1]
    installer = Installer(MIGRATION, [volume], PeerSource(["disk"]), SystemClock())
    with pytest.raises(RemoteProtocolError):
        await installer.install(frame(payload))
    assert volume.chunks.residency(0) is Residency.ABSENT_STORE


@pytest.mark.parametrize("size", [0, CHUNK, CHUNK + 1])
def test_what_is_not_smaller_is_not_compressed(size):
    """Whoever says so is wrong."""
    with pytest.raises(RemoteProtocolError):
        frame(bytes(size))


@pytest.mark.parametrize("knows", ["both", "only the source", "only the target", "not wanted"])
def test_both_sides_must_know_it(knows, monkeypatch):
    """Features are what both have said. A group moves in any case."""
    if knows == "only the source":
        monkeypatch.setattr(target_session, "FEATURES", 0)
        monkeypatch.setattr("silo.p2p.reception.FEATURES", 0)
    elif knows == "only the target":
        monkeypatch.setattr(source_session, "FEATURES", 0)
    encodings: set[Encoding] = set()
    install = Installer.install

    async def seen(self: Installer, frame: ChunkFrame) -> None:
        encodings.add(frame.encoding)
        await install(self, frame)

    monkeypatch.setattr(Installer, "install", seen)

    async def play(here: Scene) -> None:
        disk = here.a.group.volumes["disk"]
        for chunk in range(disk.chunks.count):
            if disk.chunks.residency(chunk) is not Residency.ZERO:
                continue
            await disk.write(chunk * CHUNK, TEXT)
            here.guest.model["disk"][chunk * CHUNK : (chunk + 1) * CHUNK] = TEXT
        await here.migrate()
        await here.check_moved()

    settings = attrs.evolve(QUICK, compress=knows != "not wanted", rate_bps=200.0 * CHUNK)
    assert simulate(play, settings=settings)
    assert (Encoding.ZSTD in encodings) is (knows == "both")
