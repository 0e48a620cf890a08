"""Encryption at rest: what is stored of a group is unreadable without its master key.

A group is encrypted from its first generation on, or never; `Head.keys` says so. Then every payload, index, page, list
and stored root is an *envelope*::

    key id (u32) │ number (u32) │ salt (32) │ ciphertext │ tag (16)

AES-256-GCM with the number as nonce, under a key derived from the master key and the salt. One object has one random
salt, and each envelope in it a number of its own, so no key ever sees a nonce twice. The associated data names the
object and what is in the envelope: for a chunk its volume and number, for any other part its place in the object.
So nothing that was moved to where it does not belong can be opened. Envelopes are made once and kept until they are
stored: a retry sends identical bytes.

Digests of contents are keyed, so that they tell nothing to whoever has no key; digests of parts are those of their
envelopes. The id of a key is derived from the key: a wrong key is one with an unknown id.

*Rotation*: the first key of a `KeyRing` encrypts, all of them decrypt. A digest of an older key is unlike any new
one, so a chunk that is written again is stored under the new key. A key may go when no segment names it any more.

Pure, but for the random salts, which come from the caller. Thread-safe.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
import struct
from collections.abc import Sequence

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from silo.abc import Buffer
from silo.errors import CorruptionError, InvalidRequestError, InvariantError

__all__ = ["OVERHEAD", "SALT_SIZE", "KeyRing", "Sealer", "check_keys", "parse_keys"]

KEY_SIZE = SALT_SIZE = 32
_FRONT = struct.Struct("<II32s")
_TAG_SIZE = 16
OVERHEAD = _FRONT.size + _TAG_SIZE
"""Bytes by which an envelope is longer than what is in it."""

_CONTEXT = "Silo 2026 store v1: "
_HEX = re.compile(r"[0-9a-fA-F]{64}\Z")


class KeyRing:
    """The master keys of a store, the one to encrypt with first. Never shows them."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        """`InvalidRequestError` for anything but distinct keys of 32 bytes."""
        if not secrets or any(len(secret) != KEY_SIZE for secret in secrets):
            raise InvalidRequestError("a master key has 32 bytes, and at least one is needed")
        self._secrets = {_id_of(secret): secret for secret in secrets}
        if len(self._secrets) != len(secrets):
            raise InvalidRequestError("two master keys are the same", hint="draw a new one")
        self.current = next(iter(self._secrets))
        """The id of the key that encrypts."""
        self._digest_keys = {number: _derive("digest", secret) for number, secret in self._secrets.items()}
        self._cipher = functools.lru_cache(maxsize=256)(self._make_cipher)

    @property
    def ids(self) -> frozenset[int]:
        """Of all keys."""
        return frozenset(self._secrets)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(f'{number:08x}' for number in self._secrets)})"

    def digest(self, content: Buffer, key_id: int | None = None) -> bytes:
        """The digest of a content, keyed by the current key, or the one that was current when it was stored."""
        key = self._digest_keys[self.current if key_id is None else key_id]
        return blake3(content, key=key, max_threads=1).digest()

    def sealer(self, key: str, salt: bytes) -> Sealer:
        """What makes the envelopes of one object. The salt must be random and never used for another object."""
        if len(salt) != SALT_SIZE:
            raise InvariantError(f"a salt of {len(salt)} bytes")
        return Sealer(self.current, self._cipher(self.current, salt), key, salt)

    def open_chunk(self, envelope: Buffer, key: str, volume: str, chunk: int) -> tuple[bytes, int]:
        """What is in the envelope of a chunk, and the id of its key. `CorruptionError` when it is not that chunk's."""
        return self._open(envelope, _of_chunk(key, volume, chunk), f"chunk {chunk} of {volume} in {key}")

    def open_part(self, envelope: Buffer, key: str, offset: int) -> bytes:
        """What is in any other envelope. `CorruptionError` when it does not belong there."""
        return self._open(envelope, _of_part(key, offset), f"{key} at {offset}")[0]

    def _open(self, envelope: Buffer, associated: bytes, what: str) -> tuple[bytes, int]:
        if len(envelope) < OVERHEAD:
            raise CorruptionError(f"{what} is too short to be encrypted")
        key_id, number, salt = _FRONT.unpack_from(envelope)
        if key_id not in self._secrets:
            raise CorruptionError(
                f"{what} was encrypted with the key {key_id:08x}, which is not known here",
                hint="add the older master keys below the newest",
            )
        body = memoryview(envelope)[_FRONT.size :]
        try:
            return self._cipher(key_id, salt).decrypt(_nonce(number), body, associated), key_id
        except InvalidTag:
            raise CorruptionError(f"{what} was changed, or is not what belongs there") from None

    def _make_cipher(self, key_id: int, salt: bytes) -> AESGCM:
        return AESGCM(_derive("segment", self._secrets[key_id] + salt))


class Sealer:
    """Makes the envelopes of one object, in order. One thread; used up when the object is complete."""

    def __init__(self, key_id: int, cipher: AESGCM, key: str, salt: bytes) -> None:
        self.key_id = key_id
        self._cipher = cipher
        self._key = key
        self._salt = salt
        self._number = 0

    def chunk(self, payload: Buffer, volume: str, chunk: int) -> bytes:
        """The envelope of a chunk's payload."""
        return self._seal(payload, _of_chunk(self._key, volume, chunk))

    def part(self, data: Buffer, offset: int) -> bytes:
        """The envelope of a part that will be at this offset of the object."""
        return self._seal(data, _of_part(self._key, offset))

    def _seal(self, data: Buffer, associated: bytes) -> bytes:
        number, self._number = self._number, self._number + 1
        sealed = self._cipher.encrypt(_nonce(number), data, associated)
        return _FRONT.pack(self.key_id, number, self._salt) + sealed


def check_keys(group: str, keys: Sequence[int], ring: KeyRing | None) -> None:
    """Raise `InvalidRequestError` unless what a head says of its ``keys`` fits to the ring that there is."""
    if not keys and ring is not None:
        raise InvalidRequestError(
            f"group {group} is not encrypted, and is to be opened with a key",
            hint="a group is encrypted from its beginning: restore it, and open the disk as a new group with the key",
        )
    missing = [f"{number:08x}" for number in keys if ring is None or number not in ring.ids]
    if missing:
        have = (
            "no key"
            if ring is None
            else "the key " + ", ".join(f"{number:08x}" for number in sorted(ring.ids))
        )
        raise InvalidRequestError(
            f"group {group} is encrypted with the key {', '.join(missing)}; there is {have}",
            hint="give its master keys: --encryption-key-file, --encryption-key-command; older ones below the newest",
        )


def parse_keys(text: str, origin: str) -> KeyRing:
    """The keys of a file or of a command's output: one per line, the newest first, 32 bytes in hexadecimal or base64.

    Empty lines and those that begin with ``#`` do not count. `InvalidRequestError` names the line, never its content.
    """
    secrets = []
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        secret = _decode(word)
        if len(secret) != KEY_SIZE:
            raise InvalidRequestError(
                f"{origin}: line {number} is no key", hint="32 random bytes each: openssl rand -hex 32"
            )
        secrets.append(secret)
    if not secrets:
        raise InvalidRequestError(f"{origin} holds no key", hint="32 random bytes: openssl rand -hex 32")
    return KeyRing(secrets)


def _decode(word: str) -> bytes:
    try:
        return bytes.fromhex(word) if _HEX.match(word) else base64.b64decode(word, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _derive(purpose: str, material: bytes) -> bytes:
    return blake3(material, derive_key_context=_CONTEXT + purpose).digest()


def _id_of(secret: bytes) -> int:
    """Not 0, which means that something is not encrypted."""
    return int.from_bytes(_derive("key id", secret)[:4], "little") or 1


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _of_chunk(key: str, volume: str, chunk: int) -> bytes:
    return f"{key}\0chunk\0{volume}\0{chunk}".encode("ascii")


def _of_part(key: str, offset: int) -> bytes:
    return f"{key}\0part\0{offset}".encode("ascii")
