"""Private names of other packages: they may change in any release, so each has one known place."""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from sequel_core._compat import override_value_text
from sequel_core.cli.sweep import combinations

ROOT = Path(__file__).parents[2]
PACKAGES = ("sequel_core", "sequel_lightning", "sequel_flax", "benchmarks", "configs")
CHECKED = ("sequel_core", "sequel_lightning", "sequel_flax", "configs")
PUBLIC = {"_asdict", "_fields", "_make", "_replace"}  # of NamedTuple


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def defined(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module defines: functions, classes, globals, fields and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the attributes and imported names that a module uses, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for name in {module, *(alias.name for alias in node.names)}:
                yield name, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            yield ast.unparse(node.args[1]).strip("'"), node.lineno


@functools.cache
def trees(package: str) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted((ROOT / package).rglob("*.py"))}


@pytest.mark.parametrize("package", CHECKED)
def test_private_names_of_other_packages_are_only_in_compat(package: str) -> None:
    ours = {name for other in PACKAGES for tree in trees(other).values() for name in defined(tree)}
    modules = {path.stem for other in PACKAGES for path in trees(other)}
    foreign = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in trees(package).items()
        if path.name != "_compat.py"
        for name, line in used(tree)
        if is_private(name) and name not in ours | PUBLIC and name.rpartition(".")[2] not in modules
    ]
    assert not foreign, "\n".join(["", *foreign])


@pytest.mark.parametrize("text", ["{a:{b:[1,2.5,null]},c:'x y'}", "[]", "true", "1e-3"])
def test_the_value_of_an_override_is_written_as_it_was_read(text: str) -> None:
    value = OverridesParser.create().parse_override(f"key={text}").value()
    again = OverridesParser.create().parse_override(f"key={override_value_text(value)}").value()
    assert again == value


def test_the_order_of_a_sweep_is_hydras() -> None:
    overrides = ["seed=0,1", "algo=naive,ewc", "optimizer.lr=0.1", "+comment=a", "seed=2,3,4"]
    parsed = OverridesParser.create().parse_overrides(overrides)
    expected = BasicSweeper.split_arguments(parsed, None)[0]
    assert [item.overrides for item in combinations(overrides)] == expected
    assert len(expected) == len(list(itertools.product(range(3), range(2))))
