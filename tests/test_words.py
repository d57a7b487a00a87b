"""Names say what they hold, in the field's words: none of these is defined anywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("sequel_core", "sequel_lightning", "sequel_flax", "benchmarks", "tests")
AVOIDED = {
    "look": "forward",
    "Seen": "Outputs",
    "Recalled": "ReplayBatch",
    "recall": "read",
    "store": "write",
    "walk": "accumulate_path_integral",
    "moved": "inner_sgd_step, or what moved",
    "between": "interpolate",
    "clamped": "clip_by_value",
    "shortened": "clip_by_norm",
    "pull": "penalty",
    "slope": "penalty_gradient, gradient",
    "told": "what was said: message, warnings",
    "found": "what was found: logits, rows",
    "own": "whose: batch, user_module",
    "kind": "of what: dtype, policy",
    "those": "what they are",
    "where": "a condition's name: mask, rows",
    "Tally": "RunningMetrics",
    "Within": "TaskPosition",
    "pressing": "checkpoint_due",
    "strangers": "unknown",
    "filled": "padded",
}


def defined(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the names that a module binds, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_name_that_says_nothing(folder: str) -> None:
    avoided = [
        f"{path.relative_to(ROOT)}:{line}: {name} -> {AVOIDED[name.lstrip('_')]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in defined(ast.parse(path.read_text()))
        if name.lstrip("_") in AVOIDED
    ]
    assert not avoided, "\n".join(["", *avoided])
