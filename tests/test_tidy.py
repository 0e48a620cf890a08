"""House rules that a machine can check. CONTRIBUTING.md gives the reasons."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source import (
    ROOT,
    functions_of,
    markdown_files,
    python_files,
    relative,
    tree_of,
)

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70

UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b|NotImplemented" + r"Error")
OWNERS = (
    "silo/hooks/calls.py",
    "silo/threads.py",
    "silo/trio.py",
    "silo/testing/loop.py",
    "silo/testing/process.py",
)
"""Where calls and tasks are started by hand, because what waits for them there is not a task group."""

SYNONYMS = {"blackout", "cutover", "dst", "leecher", "seeder", "volatility", "watermark"}
"""Words for which the glossary of ARCHITECTURE.md has another one; checked in the names that we give."""


def test_files_are_short():
    """A file that outgrows the limit is two files."""
    lengths = {relative(path): len(path.read_text().splitlines()) for path in python_files("silo")}
    assert {path: length for path, length in lengths.items() if length > FILE_LINES_MAX} == {}


def test_functions_are_short():
    """A function fits on a screen."""
    assert [
        f"{relative(path)}:{function.lineno} {function.name} has {length} lines"
        for path in python_files("silo")
        for function in functions_of(tree_of(path))
        if (length := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES_MAX
    ] == []


def test_nothing_is_left_unfinished():
    """No notes to self, no stubs: what is here works."""
    assert [
        f"{relative(path)}:{number} {line.strip()}"
        for path in python_files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if UNFINISHED.search(line)
    ] == []


def test_every_module_says_what_it_is():
    """A module begins with its theory of operation."""
    assert [relative(path) for path in python_files() if not ast.get_docstring(tree_of(path))] == []


def swallowed(tree: ast.AST) -> Iterator[int]:
    """Lines where any exception at all disappears without a trace."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            silent = all(
                isinstance(statement, ast.Pass | ast.Continue | ast.Break)
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                or (isinstance(statement, ast.Return) and statement.value is None)
                for statement in node.body
            )
            if node.type is None or (silent and _is_broad(node.type)):
                yield node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            yield from (node.lineno for kind in node.args if _is_broad(kind))


def _is_broad(kind: ast.expr) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in kinds)


def test_no_exception_disappears():
    """Whoever catches everything does something with it; a bare except is never needed."""
    assert [f"{relative(path)}:{line}" for path in python_files() for line in swallowed(tree_of(path))] == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("try:\n f()\nexcept Exception:\n pass", [3]),
        ("try:\n f()\nexcept (OSError, BaseException):\n ...", [3]),
        ("try:\n f()\nexcept:\n raise", [3]),
        ("with contextlib.suppress(Exception):\n f()", [1]),
        ("try:\n f()\nexcept Exception as error:\n log(error)", []),
        ("try:\n f()\nexcept OSError:\n pass", []),
        ("with suppress(OSError):\n f()", []),
    ],
)
def test_a_swallowed_exception_is_found(source, lines):
    """The check sees what it is there to see."""
    assert list(swallowed(ast.parse(source))) == lines


def ownerless(tree: ast.AST) -> Iterator[int]:
    """Lines that start a thread's work or a task through the event loop itself, where nobody waits for it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            on_the_loop = "loop" in ast.unparse(node.func.value)
            if node.func.attr == "run_in_executor" or (node.func.attr == "create_task" and on_the_loop):
                yield node.lineno


def test_work_has_an_owner():
    """Threads are entered through run_to_completion, tasks through a group."""
    assert [
        f"{relative(path)}:{line}"
        for path in python_files("silo", "examples")
        if relative(path) not in OWNERS
        for line in ownerless(tree_of(path))
    ] == []


def test_work_without_an_owner_is_found():
    """The check sees what it is there to see."""
    source = "loop.run_in_executor(None, f)\nget_running_loop().create_task(f())\ngroup.create_task(f())"
    assert list(ownerless(ast.parse(source))) == [1, 2]


def names_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The names that a file gives to classes, functions and arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def test_names_come_from_the_glossary():
    """One thing has one name."""
    assert [
        f"{relative(path)}:{line} {name}"
        for path in python_files("silo")
        for line, name in names_of(tree_of(path))
        if SYNONYMS & set(re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().split("_"))
    ] == []


def anchors_of(text: str) -> set[str]:
    """The anchors of a document's headings, spelt as GitHub does."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> Iterator[str]:
    """Links of a document to a file or heading of the project that is not there."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists():
            yield f"{relative(path)}: {link}"
        elif anchor and target.suffix == ".md" and anchor not in anchors_of(target.read_text()):
            yield f"{relative(path)}: {link} (no such heading)"


def test_links_between_documents_resolve():
    """Every relative link leads to a file, and its fragment to a heading."""
    assert [link for path in markdown_files() for link in broken_links(path)] == []


def test_a_broken_link_is_found(tmp_path):
    """The check sees missing files and missing headings, and nothing else."""
    (tmp_path / "there.md").write_text("# A heading: with `code`\n")
    document = tmp_path / "document.md"
    document.write_text(
        "[a](there.md) [b](there.md#a-heading-with-code) [c](https://x.org) `[d](gone.md)` [e](#own)\n"
        "# Own\n[f](gone.md) [g](there.md#gone)\n"
    )
    assert list(broken_links(document)) == [
        "document.md: gone.md",
        "document.md: there.md#gone (no such heading)",
    ]


def test_the_licence_is_whole():
    """The licence of the package is the text that its metadata names."""
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
