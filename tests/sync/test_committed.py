"""The committed map in memory, against a plain dictionary, and within its bounds."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from silo.errors import CapacityError, CorruptionError, InvariantError
from silo.sync.codec import Kind, digest_of
from silo.sync.committed import CommittedMap, KeyTable, Location, VolumeMap
from silo.sync.head import PartRef
from silo.sync.layout import SegmentName
from silo.sync.mappage import Page, encode_page, parse_page
from silo.sync.segment import Index, SegmentBuilder, parse_index

CHUNKS = 5000  # five pages of 1024, the last one short
KEYS = [SegmentName("vm1", 1, seq, "0123456789abcdef").key for seq in range(1, 9)]
ZERO = Location(Kind.ZERO, "", 0, 0, b"")


def index_of(chunks: dict[int, bytes], runs: list[tuple[int, int]] = (), base: bytes | None = None) -> Index:  # type: ignore[assignment]
    """An index that stores these contents raw and says that these runs are zero (or as in a base)."""
    builder = SegmentBuilder("vm1", ["disk"])
    for chunk, content in chunks.items():
        builder.add("disk", chunk, Kind.RAW, content, digest_of(content))
    for first, limit in runs:
        builder.add_run("disk", first, limit, base=base)
    segment = builder.seal()
    return parse_index(segment.index, index_offset=segment.index_offset, digest=segment.index_digest)


@contextmanager
def a_map(parts: Mapping[int, PartRef] | None = None) -> Iterator[tuple[CommittedMap, VolumeMap]]:
    with closing(CommittedMap()) as committed:
        yield committed, committed.add("disk", CHUNKS, 1024, parts)


@pytest.fixture
def both() -> Iterator[tuple[CommittedMap, VolumeMap]]:
    """An empty map with one volume."""
    with a_map() as made:
        yield made


def digests(volume: VolumeMap) -> dict[int, bytes]:
    """What the map says of every chunk that has a payload."""
    found = {}
    for chunk in range(volume.chunk_count):
        place = volume.locate(chunk)
        assert place is not None
        if place.kind is not Kind.ZERO:
            found[chunk] = place.digest
    return found


chunk_indices = st.integers(0, CHUNKS - 1)
edges = st.sampled_from([0, 1, 1000, 1023, 1024, 1025, 2048, 4095, 4096, 4999, CHUNKS])
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("write"), st.dictionaries(chunk_indices, st.binary(min_size=1, max_size=3), max_size=5)
        ),
        st.tuples(st.just("zero"), st.tuples(edges, edges).map(sorted).filter(lambda run: run[0] < run[1])),
        st.tuples(st.just("reload"), st.none()),
    ),
    max_size=8,
)


@given(steps)
def test_the_map_is_what_was_applied_last(script: list[tuple[str, object]]) -> None:
    """Writes and zero runs in any order, with a checkpoint and a lazy reload in between, against a dictionary."""
    with ExitStack() as maps:
        replay(maps, script)


def replay(maps: ExitStack, script: list[tuple[str, object]]) -> None:
    committed, volume = maps.enter_context(a_map())
    model: dict[int, bytes] = {}
    pages: dict[int, Page] = {}
    for number, (verb, argument) in enumerate(script):
        if verb == "write":
            assert isinstance(argument, dict)
            committed.apply(index_of(argument), KEYS[number])
            model |= {chunk: digest_of(content) for chunk, content in argument.items()}
        elif verb == "zero":
            first, limit = argument  # type: ignore[misc]
            committed.apply(index_of({}, [(first, limit)]), KEYS[number])
            for chunk in range(first, limit):
                model.pop(chunk, None)
        else:
            for page in range(volume.page_total):
                if not volume.loaded[page]:
                    volume.install(pages[page])
            rendered = {page: volume.render("disk", page) for page in range(volume.page_total)}
            pages = {page: made for page, made in rendered.items() if made is not None}
            parts = {page: PartRef(KEYS[7], 16, 1, "") for page in pages}
            committed, volume = maps.enter_context(a_map(parts))
    for page in volume.pages_of(np.arange(CHUNKS)):
        data = encode_page(pages[page])
        first, limit = volume.extent_of(page)
        volume.install(
            parse_page(data, digest=digest_of(data), volume="disk", page=page, entry_count=limit - first)
        )
    assert digests(volume) == model
    for page in range(volume.page_total):
        first, limit = volume.extent_of(page)
        assert volume.is_zero(first, limit) == (not any(first <= chunk < limit for chunk in model))


def test_nothing_is_known_of_a_page_that_is_not_loaded(both: tuple[CommittedMap, VolumeMap]) -> None:
    """Only the entries applied since the root are, and they win over the page when it comes."""
    committed, volume = both
    committed.apply(index_of({0: b"old", 1: b"old", 2: b"old"}), KEYS[0])
    page = volume.render("disk", 0)
    assert page is not None
    with a_map({0: PartRef(KEYS[1], 16, 1, "")}) as (later, reloaded):
        later.apply(index_of({1: b"new"}, [(2, 3)]), KEYS[2])
        check_lazy_page(reloaded, page)


def check_lazy_page(volume: VolumeMap, page: Page) -> None:
    assert volume.locate(0) is None
    assert volume.digests(np.array([0])) == [None]
    assert not volume.is_zero(0, 1)
    assert not volume.is_zero(5, 6)
    assert volume.is_zero(2, 3)
    assert volume.is_zero(1024, CHUNKS)
    assert volume.locate(2) == ZERO
    with pytest.raises(InvariantError):
        volume.render("disk", 0)
    assert volume.pages_of(np.array([0, 7, 1500])) == [0]
    volume.install(page)
    assert digests(volume) == {0: digest_of(b"old"), 1: digest_of(b"new")}
    assert volume.locate(0) == Location(Kind.RAW, KEYS[0], 16, 3, digest_of(b"old"))


def test_a_page_that_became_zero_need_not_be_loaded() -> None:
    """Trimming a whole disk costs no reads, and its checkpoint writes no pages."""
    with a_map({page: PartRef(KEYS[0], 16, 1, "") for page in range(5)}) as (committed, volume):
        committed.apply(index_of({}, [(0, CHUNKS)]), KEYS[1])
        assert volume.pages_of(np.arange(CHUNKS)) == []
        assert np.flatnonzero(volume.changed).tolist() == [0, 1, 2, 3, 4]
        rendered = {page: volume.render("disk", page) for page in range(5)}
        assert set(rendered.values()) == {None}
        volume.checkpointed(dict.fromkeys(range(5)))
        assert volume.parts == {}
        assert not volume.changed.any()


def test_inherited_chunks_keep_the_digest_of_their_base(both: tuple[CommittedMap, VolumeMap]) -> None:
    committed, volume = both
    committed.apply(index_of({}, [(10, 2000)], base=bytes(range(32))), KEYS[0])
    assert volume.locate(1999) == Location(Kind.INHERIT, "", 0, 0, bytes(range(32)))
    assert volume.locate(2000) == ZERO
    assert volume.digests(np.array([10])) == [None]
    assert not volume.is_zero(10, 11)


def test_segments_that_nothing_refers_to_are_forgotten(both: tuple[CommittedMap, VolumeMap]) -> None:
    """Overwriting the same chunks for ever keeps the table of keys as small as it was."""
    committed, volume = both
    for number in range(100):
        key = SegmentName("vm1", 1, number + 1, "0123456789abcdef").key
        committed.apply(index_of({1: bytes([number]), 2000: b"x"}), key)
        assert len(committed.keys) == 1
    committed.apply(index_of({1: b"y"}), KEYS[0])
    assert len(committed.keys) == 2
    page = volume.render("disk", 0)
    assert page is not None
    assert page.keys == (KEYS[0],)
    committed.apply(index_of({}, [(0, CHUNKS)]), KEYS[1])
    assert len(committed.keys) == 0


def test_dropping_more_references_than_there_are_is_a_bug() -> None:
    keys = KeyTable()
    number = keys.add("a", 1)
    with pytest.raises(InvariantError):
        keys.drop(np.array([number, number], dtype=np.uint32))


def test_entries_outside_the_volume_are_refused(both: tuple[CommittedMap, VolumeMap]) -> None:
    committed, volume = both
    for index in (index_of({CHUNKS: b"x"}), index_of({}, [(0, CHUNKS + 1)])):
        with pytest.raises(CorruptionError):
            committed.apply(index, KEYS[0])
    with pytest.raises(CorruptionError):
        VolumeMap(CHUNKS, 1024, committed.keys, parts={5: PartRef(KEYS[0], 16, 1, "")})
    other = SegmentBuilder("vm1", ["ram"])
    other.add_run("ram", 0, 1)
    sealed = other.seal()
    with pytest.raises(CorruptionError, match="ram"):
        committed.apply(
            parse_index(sealed.index, index_offset=sealed.index_offset, digest=sealed.index_digest), KEYS[0]
        )
    assert digests(volume) == {}


def test_a_full_disk_is_an_error_and_not_a_signal(
    both: tuple[CommittedMap, VolumeMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Touching a mapped page that the file system cannot store would kill the process."""
    committed, volume = both

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CapacityError, match="No space left"):
            volume.reserve(np.array([4000]))
        with pytest.raises(CapacityError):
            committed.apply(index_of({4000: b"x"}), KEYS[0])
    assert volume.locate(4000) == ZERO
    assert len(committed.keys) == 0
    committed.apply(index_of({4000: b"x"}), KEYS[0])
    assert digests(volume) == {4000: digest_of(b"x")}


def test_a_sparse_disk_of_a_tebibyte_costs_what_is_used() -> None:
    """16 Mi chunks, a few of them written: kilobytes of memory and of disk."""
    chunks = 1 << 24
    with closing(CommittedMap()) as committed:
        volume = committed.add("disk", chunks, 65536)
        committed.apply(index_of({0: b"a", chunks - 1: b"b"}), KEYS[0])
        committed.apply(index_of({}, [(1, chunks - 1)]), KEYS[1])
        assert volume.locate(chunks - 1) == Location(Kind.RAW, KEYS[0], 17, 1, digest_of(b"b"))
        assert volume.is_zero(1, chunks - 1)
        assert volume.file_bytes <= 4 * 16384 + 8192
