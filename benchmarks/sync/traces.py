"""What a guest writes between two cuts: random 4 KiB writes of three kinds, and an archive that is unpacked.

The random ones write noise, which neither compresses nor repeats. The archive is Python's own library: one ext4 image
is made without the files and one with them, and the blocks in which they differ are written in order, in requests of
up to 128 KiB, as a kernel writes back what ``tar`` has left in its cache. It is not what a real kernel's timing would
make of it, but it is a real file system with real files.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK", "RANDOM", "Cut", "image_size", "random_cut", "untar_cuts"]

BLOCK = 4096
"""What one write of the random kinds covers."""

_REQUEST_BLOCKS = 32
_IMAGE = 128 << 20
_UNTAR_CUT = 8 << 20

Cut = Sequence[tuple[int, bytes]]
"""Writes, as offsets and contents."""

RANDOM = ("uniform", "zipf", "sequential")


def image_size() -> int:
    """Of the disk that `untar_cuts` writes to."""
    return _IMAGE


def block_numbers(
    kind: str, count: int, blocks: int, generator: np.random.Generator, number: int
) -> list[int]:
    """Which blocks of a disk the writes of cut ``number`` go to, in order."""
    if kind == "uniform":
        return generator.integers(0, blocks, count).tolist()
    if kind == "sequential":
        return [(number * count + index) % blocks for index in range(count)]
    # Ranks by Zipf's law, spread over the disk: hot blocks are not neighbours.
    ranks = (generator.zipf(1.2, count) - 1) % blocks
    spread: npt.NDArray[np.int64] = ranks * 2654435761 % blocks
    return spread.tolist()


def random_cut(kind: str, count: int, size: int, generator: np.random.Generator, number: int) -> Cut:
    """``count`` writes of noise."""
    blocks = block_numbers(kind, count, size // BLOCK, generator, number)
    content = generator.bytes(count * BLOCK)
    return [
        (block * BLOCK, content[index * BLOCK : (index + 1) * BLOCK]) for index, block in enumerate(blocks)
    ]


def untar_cuts(scratch: Path) -> Iterator[Cut]:
    """An archive that is unpacked, some megabytes between two cuts. Nothing without ``mke2fs``."""
    if shutil.which("mke2fs") is None:
        return
    files = scratch / "files"
    ignored = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.so", "config-*", "idlelib")
    shutil.copytree(sysconfig.get_path("stdlib"), files, ignore=ignored)
    without, with_files = _image(scratch / "without.img", None), _image(scratch / "with.img", files)
    shutil.rmtree(files)
    changed = np.flatnonzero((without != with_files).any(axis=1)).tolist()
    cut: list[tuple[int, bytes]] = []
    size = start = 0
    for position in range(1, len(changed) + 1):
        if (
            position < len(changed)
            and changed[position] == changed[position - 1] + 1
            and position - start < _REQUEST_BLOCKS
        ):
            continue
        first = changed[start]
        content = with_files[first : first + position - start].tobytes()
        cut.append((first * BLOCK, content))
        start, size = position, size + len(content)
        if size >= _UNTAR_CUT or position == len(changed):
            yield cut
            cut, size = [], 0


def _image(path: Path, files: Path | None) -> npt.NDArray[np.uint8]:
    """An ext4 image, as its blocks. The same identifiers and times in all of them, so that only files differ."""
    options = ["-E", "hash_seed=0d8bd1e5-3c6d-4b0f-9a39-7f0c5f3a2b11,lazy_itable_init=1,nodiscard"]
    options += ["-U", "6f0c4d0e-8c7e-4b55-9d0a-3a3f3a0c1d55", "-b", str(BLOCK)]
    options += ["-d", str(files)] if files else []
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", *options, str(path), f"{_IMAGE >> 10}k"],
        check=True,
        stdout=subprocess.DEVNULL,
        env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "E2FSPROGS_FAKE_TIME": "1700000000"},
    )
    blocks = np.fromfile(path, dtype=np.uint8).reshape(-1, BLOCK)
    path.unlink()
    return blocks
