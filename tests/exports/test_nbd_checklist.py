"""The checklist in docs/nbd.md names tests; they exist."""

from __future__ import annotations

import re

from tests.support.source import ROOT

HOMES = {
    "libnbd": "tests/interop/test_libnbd.py",
    "tools": "tests/interop/test_nbd_tools.py",
    "extended": "tests/interop/test_nbd_extended.py",
    "hostile": "tests/interop/test_nbd_hostile.py",
    "maps": "tests/interop/test_nbd_maps.py",
    "others": "tests/interop/test_nbd_client_others.py",
    "import_kill": "tests/crash/test_import_kill.py",
    "importing": "tests/test_importing.py",
    "serve": "tests/cli/test_serve_tls.py",
    "trim": "tests/test_volume_trim.py",
}


def test_the_tests_of_the_checklist_exist():
    """A line of the checklist whose test was renamed or removed proves nothing."""
    named = re.findall(r"`(\w+)::(test_\w+)`", (ROOT / "docs/nbd.md").read_text())
    assert len(named) > 100
    sources = {
        home: (ROOT / HOMES.get(home, f"tests/exports/test_nbd_{home}.py")).read_text() for home, _ in named
    }
    assert [f"{home}::{test}" for home, test in named if f"def {test}(" not in sources[home]] == []
