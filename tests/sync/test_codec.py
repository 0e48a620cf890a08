"""Chunk contents: stored small, recognised when unchanged, verified when read."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from silo.errors import CorruptionError
from silo.sync.codec import ChunkDecoder, ChunkEncoder, Encoded, Kind, digest_of

SIZE = 4096
NOISE = b"".join(digest_of(number.to_bytes(4, "little")) for number in range(SIZE // 32))

contents = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda text, tail: (text * SIZE)[:SIZE] + bytes(tail), st.binary(min_size=1), st.integers(0, SIZE)
    ),
    st.builds(
        lambda first, length: (NOISE * 2)[first : first + length], st.integers(0, SIZE), st.integers(0, SIZE)
    ),
)


def encode(content: bytes | bytearray | memoryview, known: bytes | None = None) -> Encoded:
    encoded = ChunkEncoder().encode(content, known)
    assert encoded is not None
    return encoded


@given(contents)
def test_round_trip(content: bytes) -> None:
    """Whatever the content, it comes back, never larger than it was."""
    encoded = encode(memoryview(content))
    assert len(encoded.payload) <= len(content)
    if encoded.kind is Kind.ZERO:
        assert content == bytes(len(content))
    else:
        decoded = ChunkDecoder().decode(encoded.kind, encoded.payload, len(content), encoded.digest)
        assert bytes(decoded) == content


def test_the_kind_follows_the_content() -> None:
    """Zeros cost nothing, text is compressed, noise is stored as it is."""
    assert encode(bytearray(SIZE)) == Encoded(Kind.ZERO, b"", b"")
    assert encode(b"text" * (SIZE // 4)).kind is Kind.ZSTD
    noise = encode(NOISE)
    assert (noise.kind, noise.payload, noise.digest) == (Kind.RAW, NOISE, digest_of(NOISE))


def test_a_saving_under_five_percent_is_not_taken() -> None:
    """Between pure noise and half zeros the kind changes once, at 5 %."""
    for zeros in range(0, SIZE, 64):
        content = NOISE[: SIZE - zeros] + bytes(zeros)
        encoded = encode(content) if zeros < SIZE else None
        assert encoded is not None
        if encoded.kind is Kind.ZSTD:
            assert len(encoded.payload) <= SIZE * 0.95
        else:
            assert zeros < SIZE * 0.06


def test_known_content_is_recognised_before_it_is_compressed() -> None:
    encoder = ChunkEncoder()
    assert encoder.encode(NOISE, digest_of(NOISE)) is None
    assert encoder.encode(NOISE, digest_of(b"other")) is not None


def test_every_flipped_byte_is_noticed() -> None:
    decoder = ChunkDecoder()
    for content in (NOISE, b"text" * (SIZE // 4)):
        encoded = encode(content)
        payload = bytearray(encoded.payload)
        for at in range(len(payload)):
            payload[at] ^= 0x08
            try:
                found = decoder.decode(encoded.kind, payload, SIZE, encoded.digest)
            except CorruptionError:
                pass
            else:  # a frame header has a bit that means nothing
                assert encoded.kind is Kind.ZSTD
                assert found == content
            payload[at] ^= 0x08


@given(st.binary(max_size=200), st.integers(0, 1 << 22), st.sampled_from([1, 2, 3, 4, 5, 77]))
def test_hostile_payloads_are_refused(payload: bytes, length: int, kind: int) -> None:
    with pytest.raises(CorruptionError):
        ChunkDecoder().decode(kind, payload, length, bytes(32))


def test_a_frame_that_claims_to_be_huge_allocates_nothing() -> None:
    """A zstd header may claim 2^60 bytes; the chunk has 4096."""
    bomb = bytes.fromhex("28b52ffde0") + (1 << 60).to_bytes(8, "little") + bytes(20)
    with pytest.raises(CorruptionError, match="does not claim"):
        ChunkDecoder().decode(Kind.ZSTD, bomb, SIZE, bytes(32))


def test_a_frame_with_something_behind_it_is_refused() -> None:
    encoded = encode(b"text" * (SIZE // 4))
    with pytest.raises(CorruptionError):
        ChunkDecoder().decode(encoded.kind, bytes(encoded.payload) + b"x", SIZE, encoded.digest)
