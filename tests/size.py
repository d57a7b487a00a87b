"""Lines of code of the packages, without docstrings, comments and blank lines.

Run `python -m tests.size [FOLDER]`.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGES = ("sequel_core", "sequel_lightning", "sequel_flax", "benchmarks", "configs")
IGNORED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
Definition = ast.FunctionDef | ast.ClassDef


class Size(NamedTuple):
    """A function or a class with its lines of code."""

    name: str  # path:line name
    lines: int
    methods: int  # of a class


def files(root: Path) -> list[Path]:
    """Return the Python files of the packages."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that hold code."""
    lines = {
        number
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in IGNORED
        for number in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # a docstring
    return lines


def sizes(path: Path, node_type: type[Definition]) -> Iterator[Size]:
    """Yield the functions or the classes of a file."""
    source = path.read_text()
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, node_type):
            count = sum(node.lineno <= number <= (node.end_lineno or 0) for number in lines)
            methods = sum(isinstance(child, ast.FunctionDef) for child in node.body)
            yield Size(f"{path}:{node.lineno} {node.name}", count, methods)


def main(root: Path) -> None:
    """Print the lines of each package, and the longest functions and classes."""
    total = 0
    for package in PACKAGES:
        count = sum(
            len(code_lines(path.read_text())) for path in files(root) if path.is_relative_to(root / package)
        )
        total += count
        print(f"{count:7,} {package}")
    print(f"{total:7,} in all")
    functions = [size for path in files(root) for size in sizes(path, ast.FunctionDef)]
    classes = [size for path in files(root) for size in sizes(path, ast.ClassDef)]
    body = [size.lines for size in functions]
    middle, high = np.percentile(body, [50, 95])
    print(f"functions: {len(body)}, median {middle:g} lines, 95th percentile {high:g}")
    for listed in (functions, classes):
        for size in sorted(listed, key=lambda size: -size.lines)[:10]:
            print(f"{size.lines:7,} {size.name}" + (f", {size.methods} methods" if size.methods else ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
