"""Programs and modules of other projects that tests talk to.

Where one is missing, its tests are skipped with the reason; with ``SILO_REQUIRE_TOOLS=1`` in the environment,
as in continuous integration, they fail instead: a test that is always skipped is a test that nobody has.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGES = {
    "nbdkit": "nbdkit",
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdsh": "python3-libnbd",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-system-x86_64": "qemu-system-x86",
    "fio": "fio",
    "ip": "iproute2",
    "tc": "iproute2",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "radosgw": "radosgw",
    "radosgw-admin": "radosgw",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph": "ceph-common",
}
"""Where Debian keeps each program."""

SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
"""Debian keeps e2fsprogs in /usr/sbin, which is not on every user's path."""

LIBNBD_DIRECTORY = Path("/usr/lib/python3/dist-packages")


def require_tool(name: str) -> str:
    """The path of a program. When it is missing, skips the running test, or fails it where tools are required."""
    path = shutil.which(name, path=SEARCH_PATH)
    if path is None:
        package = PACKAGES.get(name)
        missing(f"{name} is not installed" + (f" (Debian package {package})" if package else ""))
    return path


def missing(reason: str) -> None:
    """Skip the running test, or fail it where tools are required."""
    if os.environ.get("SILO_REQUIRE_TOOLS") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def import_libnbd() -> ModuleType:
    """libnbd's Python module ``nbd``, which is not on PyPI, from the system's packages and nothing else of them.

    Its extension is built for the system's own Python; another version cannot load it.
    """
    for name in ("libnbdmod", "nbd"):
        if name not in sys.modules:
            _load(name)
    return sys.modules["nbd"]


def _load(name: str) -> None:
    spec = importlib.machinery.PathFinder.find_spec(name, [str(LIBNBD_DIRECTORY)])
    if spec is None or spec.loader is None:
        missing(
            f"libnbd has no {name} for Python {sys.version_info.major}.{sys.version_info.minor}"
            " (Debian package python3-libnbd)"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
