"""The project's own source, as text and as syntax trees, for tests that check the project itself."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("silo", "tests", "benchmarks", "examples")


def python_files(*folders: str) -> list[Path]:
    """Every Python file under the folders, or under all folders with code."""
    return sorted(path for folder in folders or CODE for path in (ROOT / folder).rglob("*.py"))


def markdown_files() -> list[Path]:
    """Every document of the project."""
    return sorted(
        [*ROOT.glob("*.md"), *(path for folder in ("docs", *CODE) for path in (ROOT / folder).rglob("*.md"))]
    )


def relative(path: Path) -> str:
    """The path as people write it in a report."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def module_name(path: Path) -> str:
    """``silo/sync/head.py`` is ``silo.sync.head``, ``silo/sync/__init__.py`` is ``silo.sync``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function in the tree, nested ones and methods included."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
