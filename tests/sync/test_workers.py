"""Batches in threads."""

from __future__ import annotations

from contextlib import closing

from silo.errors import CorruptionError
from silo.sync.codec import Kind, digest_of
from silo.sync.workers import Stored, Workers
from silo.tasks import task_group

NOISE = b"".join(digest_of(bytes([number])) for number in range(128))


async def test_a_batch_is_encoded_and_decoded_in_order() -> None:
    """Zeros, text, noise and what is known already, several batches at a time."""
    contents = [bytes(4096), b"text" * 1024, NOISE, NOISE]
    known = [None, None, None, digest_of(NOISE)]
    with closing(Workers(2)) as workers:
        async with task_group() as tasks:
            batches = [tasks.create_task(workers.encode(contents, known)) for _ in range(8)]
        for batch in batches:
            zero, text, noise, unchanged = batch.result()
            assert zero is not None
            assert text is not None
            assert noise is not None
            assert unchanged is None
            assert (zero.kind, text.kind, noise.kind) == (Kind.ZERO, Kind.ZSTD, Kind.RAW)
            stored = [
                Stored(text.kind, text.payload, 4096, text.digest),
                Stored(noise.kind, noise.payload, 4096, noise.digest),
            ]
            assert [bytes(content) for content in await workers.decode(stored)] == [b"text" * 1024, NOISE]


async def test_a_few_payloads_do_not_keep_a_whole_batch() -> None:
    """Views of the contents, which keep all of their memory, only where most of it is needed."""
    text, noise = memoryview(b"text" * 1024), memoryview(NOISE)
    with closing(Workers(1)) as workers:
        for contents, kind in (([noise, noise, text], memoryview), ([noise, text, text, text], bytes)):
            first = (await workers.encode(contents, [None] * len(contents)))[0]
            assert first is not None
            assert type(first.payload) is kind
            assert bytes(first.payload) == NOISE


async def test_one_damaged_chunk_harms_no_other() -> None:
    with closing(Workers(1)) as workers:
        good, bad = digest_of(NOISE), digest_of(b"other")
        found = await workers.decode(
            [Stored(Kind.RAW, NOISE, 4096, good), Stored(Kind.RAW, NOISE, 4096, bad)]
        )
        assert found[0] == NOISE
        assert isinstance(found[1], CorruptionError)
