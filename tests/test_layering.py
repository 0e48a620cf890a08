"""The rings and rooms of ARCHITECTURE.md, walked import by import.

A module imports only from its own ring or a lower one, and rooms never import one another. Imports count
wherever they stand: inside a function and under ``TYPE_CHECKING`` too, since who must *know* about whom is
what the rings are about.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

import pytest

from tests.support.source import module_name, python_files, tree_of

VALUES, MACHINES, PORTS, DRIVERS, FACES = range(5)

RINGS: dict[int, str] = {
    VALUES: "addresses errors events geometry names settings",
    MACHINES: "checkpoint chunkmap dirtymap heatmap records zeros",
    PORTS: "abc",
    DRIVERS: """chunklocks clock eventloop files frozen gate group hydration linux localchunks mapfile sockets statedir
        tasks threads throttle volume volumestate""",
    FACES: """__main__ agent arriving cli config control daemon demo exporting flushing host hosted hydrator importing
        keeping keysource leaving metrics moving nbdconfig opening restoring resuming seeing storelink tending testing
        trio""",
}
"""Where everything at the first level belongs. A new module needs its place here."""

ROOMS: dict[str, str] = {
    "devices": "",
    "exports": """nbd_catalog nbd_chunks nbd_client_handshake nbd_client_replies nbd_client_request nbd_client_session
        nbd_handshake nbd_options nbd_replies nbd_session nbd_uri nbd_wire""",
    "sync": """amendments cipher claim codec collection compaction cost head hotlist layout lease mappage nametable
        planner
        retention runs s3_errors s3_location segment settings status store_faults store_keys""",
    "p2p": """budget chunksets convergence conversation handover messages meter precopy records settings terms thrift
        wire""",
    "hooks": "",
}
"""The rooms of the drivers' ring, and the modules in them that are pure."""

WORLD = """
    asyncio concurrent ctypes datetime fcntl io mmap multiprocessing os pathlib random secrets select
    selectors signal socket ssl subprocess tempfile threading time uuid
"""
"""What a pure module (of the values' or the machines' ring) may not touch."""

VOCABULARY = frozenset({"silo.abc.Buffer"})
"""Names of the ports' ring that are words rather than ports; anyone may use them."""

FIRST_LEVEL = {name: ring for ring, names in RINGS.items() for name in names.split()}


def ring_of(module: str) -> int:
    """The ring of a module of the package."""
    _, _, rest = module.partition(".")
    first, _, inner = rest.partition(".")
    if not first:
        return FACES  # the package itself re-exports everything
    if first in ROOMS:
        return MACHINES if inner in ROOMS[first].split() else DRIVERS
    return FIRST_LEVEL.get(first, FACES)


def room_of(module: str) -> str | None:
    """The room that a module is in, if any."""
    first = f"{module}.".split(".")[1]
    return first if first in ROOMS else None


def imports_of(tree: ast.AST, modules: Mapping[str, ast.AST]) -> Iterator[tuple[str, str]]:
    """Each import as (module, full name): ``from silo import errors`` gives the module ``silo.errors``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in modules else node.module), full


def impurities(tree: ast.AST) -> Iterator[str]:
    """What a pure module may not do."""
    if any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree)):
        yield "waits"
    for target, _ in imports_of(tree, {}):
        if target.split(".")[0] in WORLD.split():
            yield f"imports {target}"


def violations(modules: Mapping[str, ast.AST]) -> list[str]:
    """One sentence for each import that crosses the rings or rooms, and each piece of the world in pure code."""
    found: list[str] = []
    for module, tree in modules.items():
        ring, room = ring_of(module), room_of(module)
        if ring in (VALUES, MACHINES):
            found += [f"{module} is pure, and yet it {impurity}" for impurity in impurities(tree)]
        for target, full in imports_of(tree, modules):
            if target.split(".")[0] != "silo":
                continue
            if room and room_of(target) and room != room_of(target):
                found.append(f"{module} imports {full} from another room")
            elif ring_of(target) > ring and full not in VOCABULARY:
                found.append(f"{module} (ring {ring}) imports {full} (ring {ring_of(target)})")
    return found


def pure_in_effect(modules: Mapping[str, ast.AST]) -> set[str]:
    """The modules in rooms that do nothing which a pure module may not do, nor use a module that does."""
    pure = {
        module
        for module, tree in modules.items()
        if module.count(".") == 2 and room_of(module) and not list(impurities(tree))
    }

    def clean(module: str) -> bool:
        return all(
            target in pure or ring_of(target) <= MACHINES or full in VOCABULARY
            for target, full in imports_of(modules[module], modules)
            if target.split(".")[0] == "silo"
        )

    while dirty := {module for module in pure if not clean(module)}:
        pure -= dirty
    return pure


def cycles(modules: Mapping[str, ast.AST]) -> list[str]:
    """Circles of imports that happen while the modules load."""
    graph: dict[str, set[str]] = {}
    for module, tree in modules.items():
        top = ast.Module(body=list(_while_loading(tree)), type_ignores=[])
        graph[module] = {target for target, _ in imports_of(top, modules) if target in modules} - {module}
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" > ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return found


def _while_loading(node: ast.AST) -> Iterator[ast.stmt]:
    """The import statements that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        ):
            yield from _while_loading(child)


MODULES = {module_name(path): tree_of(path) for path in python_files("silo")}


def test_every_module_has_a_ring():
    """A new module at the first level gets its place in the table."""
    first_level = {name.split(".")[1] for name in MODULES if "." in name}
    assert first_level <= {*FIRST_LEVEL, *ROOMS}, "give the new module a ring"


def test_pure_modules_are_declared():
    """The table names every pure module, so that none loses its purity by accident."""
    declared = {f"silo.{room}.{name}" for room, names in ROOMS.items() for name in names.split()}
    effective = pure_in_effect(MODULES)
    assert sorted(effective - declared) == [], "declare these as pure in ROOMS"
    assert sorted(declared - set(MODULES)) == [], "these are declared in ROOMS, but do not exist"


def test_imports_respect_rings_and_rooms():
    """No module knows more of the package than its ring and room allow."""
    assert violations(MODULES) == []


def test_no_module_needs_itself():
    """Importing any module first works, because there are no circles."""
    assert cycles(MODULES) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("silo.geometry", "import silo.chunkmap", "silo.geometry (ring 0) imports silo.chunkmap (ring 1)"),
        ("silo.geometry", "from silo import volume", "silo.geometry (ring 0) imports silo.volume (ring 3)"),
        ("silo.volume", "import silo", "silo.volume (ring 3) imports silo (ring 4)"),
        ("silo.volume", "def f():\n from silo.host import Host", "imports silo.host.Host (ring 4)"),
        ("silo.gate", "if TYPE_CHECKING:\n from silo.host import Host", "imports silo.host.Host (ring 4)"),
        ("silo.sync.syncer", "from silo.p2p.wire import Frame", "from another room"),
        ("silo.exports.nbd_wire", "from silo.sync.head import Head", "from another room"),
        ("silo.p2p.wire", "from silo.p2p.source import Source", "silo.p2p.wire (ring 1) imports"),
        ("silo.p2p.wire", "import asyncio", "is pure, and yet it imports asyncio"),
        ("silo.chunkmap", "import os.path", "is pure, and yet it imports os.path"),
        ("silo.chunkmap", "async def f(): ...", "is pure, and yet it waits"),
        ("silo.p2p.wire", "from silo.abc import Clock", "imports silo.abc.Clock (ring 2)"),
    ],
)
def test_a_crossing_is_found(module, source, complaint):
    """The walker sees what it is there to see."""
    modules = {**dict.fromkeys(("silo.volume", "silo.host"), ast.parse("")), module: ast.parse(source)}
    (found,) = violations(modules)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("silo.p2p.wire", "from silo.abc import Buffer"),
        ("silo.p2p.wire", "import struct\nfrom silo.p2p.messages import Offer"),
        (
            "silo.host",
            "import asyncio\nfrom silo.sync.syncer import Syncer\nfrom silo.p2p.source import Source",
        ),
        ("silo.exports.nbd_server", "import socket\nfrom silo.volume import Volume"),
    ],
)
def test_what_is_allowed_passes(module, source):
    """The walker does not complain about what the architecture wants."""
    assert violations({module: ast.parse(source)}) == []


def test_a_circle_is_found():
    """Two modules that import each other are reported, one lazy or typing import breaks the circle."""
    there = ast.parse("from silo.b import x")
    for source in ("from silo.a import y", "class C:\n import silo.a"):
        assert cycles({"silo.a": there, "silo.b": ast.parse(source)}) == ["silo.a > silo.b > silo.a"]
    for source in ("def f():\n import silo.a", "if TYPE_CHECKING:\n import silo.a"):
        assert cycles({"silo.a": there, "silo.b": ast.parse(source)}) == []
