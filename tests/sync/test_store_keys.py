"""Keys, prefixes and ranges: the same answers on every store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import InvalidRequestError
from silo.sync.store_keys import (
    KEY_SIZE_MAX,
    check_key,
    check_prefix,
    check_range,
    clip_range,
    is_key,
    just_before,
)

component = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True).filter(
    lambda text: text not in (".", "..")
)
keys = st.lists(component, min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize(
    "key", ["head", "vm1/segments/0f/0001-0002-ab", ".a", "a.", "...", "-", "_", "k" * 255]
)
def test_keys(key: str) -> None:
    check_key(key)
    assert is_key(key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        ".",
        "..",
        "a/.",
        "./a",
        "a/../b",
        "a b",
        "a\n",
        "caf\u00e9",
        "a~",
        "a\\b",
        "k" * 256,
        "/".join(["k" * 200] * 5),
    ],
)
def test_not_keys(key: str) -> None:
    assert not is_key(key)
    with pytest.raises(InvalidRequestError):
        check_key(key)


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/.", "a/..", ".", "..", "k" * 255, "a" * 200 + "/"])
def test_prefixes(prefix: str) -> None:
    check_prefix(prefix)
    completed = prefix if is_key(prefix) else prefix + "x"
    assert completed.startswith(prefix)
    assert is_key(completed)


@pytest.mark.parametrize("prefix", ["/", "/a", "a//", "a/../", "./", "a b", "k" * 257, "a/" * KEY_SIZE_MAX])
def test_not_prefixes(prefix: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_prefix(prefix)


@given(keys, st.integers(0, 60))
def test_every_start_of_a_key_is_a_prefix(key: str, length: int) -> None:
    check_prefix(key[:length])
    assert is_key(key)


@given(keys, keys)
def test_just_before_is_before_every_key_with_the_prefix(prefix: str, rest: str) -> None:
    before = just_before(prefix)
    assert before is None or before < prefix
    assert before is None or not before.startswith(prefix)
    assert before is None or before < prefix + rest


def test_just_before_skips_what_sorts_earlier() -> None:
    assert just_before("segments/3f") == "segments/3ez"
    assert just_before("a/-") == "a"
    assert just_before("-") is None


@pytest.mark.parametrize(("start", "length"), [(-1, None), (-1, 5), (0, 0), (5, 0), (5, -1)])
def test_ranges_without_sense(start: int, length: int | None) -> None:
    with pytest.raises(InvalidRequestError):
        check_range(start, length)


def test_clip_range() -> None:
    assert clip_range(0, None, 0) == 0
    assert clip_range(0, None, 10) == 10
    assert clip_range(3, None, 10) == 7
    assert clip_range(3, 4, 10) == 4
    assert clip_range(3, 100, 10) == 7
    for start, length, size in ((0, 1, 0), (10, None, 10), (11, 5, 10)):
        with pytest.raises(InvalidRequestError):
            clip_range(start, length, size)
