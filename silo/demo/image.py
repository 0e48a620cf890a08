"""An ext4 image full of real files, and the one file in it that a guest may overwrite.

``mke2fs -d`` fills the image from a directory, so no mount and no root are needed. The files come from a tree
that every machine with Python has. One more file of random bytes is put beside them: its extents on the disk
are read back with ``debugfs``, and overwriting just those leaves a file system without a fault.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import attrs

from silo.errors import InvalidRequestError, SiloError

__all__ = ["DemoImage", "build_image", "missing_tools"]

TOOLS = ("mke2fs", "debugfs", "e2fsck")
FILE_MIN, FILE_MAX = 16 << 10, 64 << 20
GUEST_FILE = "guest.bin"
EXTENT = re.compile(r"\(\d+(?:-\d+)?\):(\d+)(?:-(\d+))?")
BLOCK = 4096


@attrs.frozen
class DemoImage:
    """The image, and where in it the guest may write: extents in bytes."""

    path: Path
    size: int
    used: int
    writable: tuple[tuple[int, int], ...]


def find_tool(name: str) -> str | None:
    """Where a tool is; Debian keeps those of e2fsprogs outside of a user's PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def missing_tools() -> list[str]:
    """The tools that the demo needs and that are not there."""
    return [name for name in TOOLS if find_tool(name) is None]


def _tool(name: str) -> str:
    if (path := find_tool(name)) is None:
        raise InvalidRequestError(f"the demo needs {name}", hint="install e2fsprogs")
    return path


def _roots() -> list[Path]:
    """Trees to take files from; the first ones are there wherever Python is."""
    paths = sysconfig.get_paths()
    roots = [paths["stdlib"], paths["purelib"], f"{sys.base_prefix}/lib", "/usr/lib", "/usr/share"]
    return [path for root in roots if (path := Path(root)).is_dir()]


def _files(root: Path) -> Iterator[tuple[Path, int]]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            try:
                status = path.lstat()
            except OSError:
                continue  # it went away while we looked
            if status.st_mode & 0o170000 == 0o100000 and FILE_MIN <= status.st_size <= FILE_MAX:
                yield path, status.st_size


def _stage(directory: Path, wanted: int) -> tuple[int, int]:
    """Copy files into ``directory`` until they hold ``wanted`` bytes. Returns how many bytes and files it took."""
    total = 0
    seen: set[Path] = set()
    for number, root in enumerate(_roots()):
        for path, size in _files(root):
            if total >= wanted:
                return total, len(seen)
            if path in seen:
                continue
            seen.add(path)
            target = directory / f"tree{number}" / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(path, target)
            except OSError:
                continue  # unreadable for us: take the next one
            total += size
    return total, len(seen)


def build_image(directory: Path, *, used: int, guest_file: int, content: bytes) -> DemoImage:
    """Build ``disk.img`` in ``directory`` with at least ``used`` bytes of files.

    ``content`` is repeated to fill the guest's file of ``guest_file`` bytes. `SiloError` when a tool fails or
    the machine does not have that many bytes of files.
    """
    staging = directory / "files"
    staging.mkdir()
    with (staging / GUEST_FILE).open("wb") as file:
        while file.tell() < guest_file:
            file.write(content)
        file.truncate(guest_file)
    staged, files = _stage(staging, used)
    total = staged + guest_file
    if total < used:
        raise SiloError(f"only {total >> 20} MiB of readable files were found, {used >> 20} MiB are needed")
    path = directory / "disk.img"
    size = (total * 5 // 4 + (128 << 20)) // (1 << 20) << 20
    with path.open("wb") as file:
        file.truncate(size)
    options = ["-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-m", "0", "-N", str(2 * files + 1000)]
    _run([_tool("mke2fs"), *options, "-d", str(staging), str(path)])
    shutil.rmtree(staging)
    return DemoImage(path, size, total, _extents(path, guest_file))


def _extents(path: Path, length: int) -> tuple[tuple[int, int], ...]:
    """Where the guest's file lies, from ``debugfs``."""
    shown = _run([_tool("debugfs"), "-R", f"stat /{GUEST_FILE}", str(path)])
    found = []
    for match in EXTENT.finditer(shown.partition("EXTENTS:")[2]):
        first, last = int(match[1]), int(match[2] or match[1])
        found.append((first * BLOCK, (last - first + 1) * BLOCK))
    if sum(size for _, size in found) < length:
        raise SiloError(f"debugfs shows less than {length} bytes for the guest's file", hint=shown[:500])
    return tuple(found)


def check_image(path: Path) -> str:
    """What ``e2fsck -fn`` says of the image; `SiloError` when it finds a fault."""
    return _run([_tool("e2fsck"), "-fn", str(path)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SiloError(
            f"{Path(command[0]).name} ended with {done.returncode}", hint=done.stderr.strip()[-500:]
        )
    return done.stdout
