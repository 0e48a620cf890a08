"""Envelopes: what is put into one comes out of it, there and nowhere else; and keys that are not right."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import CorruptionError, InvalidRequestError, InvariantError
from silo.sync.cipher import OVERHEAD, SALT_SIZE, KeyRing, check_keys, parse_keys
from silo.sync.codec import ChunkDecoder, ChunkEncoder, Kind, Place, digest_of

OLD, NEW, FOREIGN = bytes(range(32)), bytes(range(1, 33)), bytes(range(2, 34))
SALT = b"s" * SALT_SIZE
KEY = "vm1/segments/00/0000000001-000000000001-00000000000000aa"


@given(data=st.binary(max_size=5000), chunk=st.integers(0, 1 << 38))
def test_what_goes_in_comes_out(data: bytes, chunk: int) -> None:
    ring = KeyRing([NEW])
    sealer = ring.sealer(KEY, SALT)
    sealed = sealer.chunk(data, "disk", chunk)
    part = sealer.part(data, 16)
    assert len(sealed) == len(part) == len(data) + OVERHEAD
    assert ring.open_chunk(sealed, KEY, "disk", chunk) == (data, ring.current)
    assert ring.open_part(part, KEY, 16) == data


def test_equal_contents_have_unlike_envelopes() -> None:
    """Within an object, and in two objects."""
    ring = KeyRing([NEW])
    sealer, other = ring.sealer(KEY, SALT), ring.sealer(KEY, bytes(SALT_SIZE))
    envelopes = [sealer.chunk(b"same" * 9, "disk", 1), sealer.chunk(b"same" * 9, "disk", 1)]
    envelopes.append(other.chunk(b"same" * 9, "disk", 1))
    assert len({envelope[40:] for envelope in envelopes}) == 3
    assert all(b"same" not in envelope for envelope in envelopes)


@pytest.mark.parametrize(
    "place",
    [
        (KEY, "disk", 2),
        (KEY, "other", 1),
        (KEY.replace("vm1", "vm2"), "disk", 1),
        (KEY[:-1] + "b", "disk", 1),
    ],
)
def test_what_was_moved_cannot_be_opened(place: tuple[str, str, int]) -> None:
    """To another chunk, volume, group or object."""
    ring = KeyRing([NEW])
    sealed = ring.sealer(KEY, SALT).chunk(b"content", "disk", 1)
    with pytest.raises(CorruptionError, match="not what belongs there"):
        ring.open_chunk(sealed, *place)
    with pytest.raises(CorruptionError):
        ring.open_part(sealed, KEY, 1)


def test_no_bit_may_change() -> None:
    """Neither of the envelope's head, which chooses key and nonce, nor of what is in it."""
    ring = KeyRing([NEW, OLD])
    sealed = ring.sealer(KEY, SALT).chunk(b"content", "disk", 1)
    for bit in range(len(sealed) * 8):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            ring.open_chunk(damaged, KEY, "disk", 1)
    for length in range(len(sealed)):
        with pytest.raises(CorruptionError):
            ring.open_chunk(sealed[:length], KEY, "disk", 1)


def test_rotation() -> None:
    """The newest key encrypts, the older ones still decrypt; without them it is said which one is missing."""
    before, after = KeyRing([OLD]), KeyRing([NEW, OLD])
    sealed = before.sealer(KEY, SALT).chunk(b"old", "disk", 1)
    assert after.open_chunk(sealed, KEY, "disk", 1) == (b"old", before.current)
    assert after.sealer(KEY, SALT).key_id == after.current != before.current
    assert after.ids == {before.current, after.current}
    with pytest.raises(CorruptionError, match=f"{before.current:08x}"):
        KeyRing([NEW]).open_chunk(sealed, KEY, "disk", 1)


def test_digests_are_keyed() -> None:
    """They tell nothing to whoever guesses a content; and each is checked under the key of its time."""
    before, after = KeyRing([OLD]), KeyRing([NEW, OLD])
    content = b"guess me" * 512
    assert len({digest_of(content), before.digest(content), after.digest(content)}) == 3
    encoded = ChunkEncoder(before).encode(content)
    assert encoded is not None
    assert encoded.digest == before.digest(content)
    sealed = before.sealer(KEY, SALT).chunk(encoded.payload, "disk", 1)
    place = Place(KEY, "disk", 1)
    assert ChunkDecoder(after).decode(Kind.ZSTD, sealed, len(content), encoded.digest, place) == content
    assert ChunkEncoder(before).encode(content, encoded.digest) is None
    assert ChunkEncoder(after).encode(content, encoded.digest) is not None
    with pytest.raises(CorruptionError):
        ChunkDecoder(after).decode(Kind.ZSTD, sealed, len(content), after.digest(content), place)
    with pytest.raises(InvariantError):
        ChunkDecoder(after).decode(Kind.ZSTD, sealed, len(content), encoded.digest)


def test_keys_are_never_shown() -> None:
    ring = KeyRing([NEW, OLD])
    shown = repr(ring) + str(ring) + f"{ring.sealer(KEY, SALT)!r}"
    for secret in (NEW, OLD):
        assert secret.hex() not in shown
        assert repr(secret) not in shown


@pytest.mark.parametrize("encode", [bytes.hex, lambda secret: base64.b64encode(secret).decode()])
def test_a_file_of_keys(encode) -> None:
    text = f"# since October\n{encode(NEW)}\n\n  {encode(OLD)}\n"
    ring = parse_keys(text, "keys")
    assert (ring.current, ring.ids) == (KeyRing([NEW]).current, KeyRing([NEW, OLD]).ids)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        (NEW.hex()[:-2], "line 1 is no key"),
        (f"{NEW.hex()}\nhunter2", "line 2 is no key"),
        (f"{NEW.hex()}\n{NEW.hex()}", "the same"),
    ],
)
def test_what_is_no_key(text: str, said: str) -> None:
    """The line is named and never shown."""
    with pytest.raises(InvalidRequestError, match=said) as refused:
        parse_keys(text, "keys")
    assert NEW.hex()[:16] not in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_what_a_head_asks_for() -> None:
    new, old = KeyRing([NEW]), KeyRing([OLD])
    check_keys("vm1", (), None)
    check_keys("vm1", (new.current,), new)
    check_keys("vm1", (old.current,), KeyRing([NEW, OLD]))
    for keys, ring, said in (
        ((), new, "is not encrypted"),
        ((old.current,), None, "there is no key"),
        ((old.current,), new, f"{old.current:08x}.*there is the key {new.current:08x}"),
        ((old.current, new.current), new, f"key {old.current:08x};"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            check_keys("vm1", keys, ring)
