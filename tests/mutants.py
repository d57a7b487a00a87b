"""Mutation testing of the methods: `make mutants`, or `python -m tests.mutants [METHOD ...]`.

cosmic-ray changes the two files of a method in one place at a time, in a copy of the repository. A mutant is
killed if a test fails that compares the method with NumPy or with the other framework, or in JAX one on
other data than images. The mutants are a sample, drawn from a seed. docs/trust/mutants.json has the results.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator
from parso.python.tree import Keyword

from tests.pages import ROOT

FILE = ROOT / "docs" / "trust" / "mutants.json"
FOLDERS = ("sequel_core", "sequel_flax", "sequel_lightning", "benchmarks", "tests")
PLUGINS = {"sequel_flax": ("flax", "jax"), "sequel_lightning": ("lightning", "pytorch")}
"""The words for a framework in the names of tests."""

STAGES = (
    ("tests/reference/test_reference.py", "slow or not slow"),
    ("tests/parity/test_parity.py", "not slow"),
    ("tests/flax/test_any_data.py", "not slow"),
)
"""Files of tests, and which of them are run."""

TIMES = count(1)

FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # as in conftest.py
)

SECONDS = 900
"""After this time a mutant counts as killed; the tests of a method take a tenth of it."""

LIBRARIES = (
    "sequel_core.experiment.compose",
    "sequel_core.runs.orchestrator",
    "sequel_core.testing",
    "sequel_benchmarks",
    "hypothesis.extra.numpy",
    "xdist",
    "sklearn.datasets",
    "torch.utils.data",
    "clu.metrics",
    "flax.nnx",
    "hypothesis",
    "jax",
    "optax",
    "orbax.checkpoint",
    "pytorch_lightning",
)
"""Imported once. Each mutant's process is a fork, which imports the changed package and the tests itself."""

ALREADY_IMPORTED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"

NAMES = [
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot"),
    *("NumberReplacer", "ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("USub", "Not", "Invert")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Mul_Add", "Div_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("BitAnd_BitOr", "BitOr_BitAnd")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_GtE", "GtE_Lt", "Gt_LtE", "LtE_Gt")),
]
"""The operators of cosmic-ray that are used; others mostly give code that raises at once."""


class DropTerm(Operator):  # type: ignore[misc]
    """Drops the last operand of a sum or of a product."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type in ("arith_expr", "term"):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        del node.children[-2:]
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("a + b", "a"), Example("a * b / c", "a * b"))


class DropStatement(Operator):  # type: ignore[misc]
    """Drops a call and an assignment to an attribute or an item, which other code can do without."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        call = node.type == "atom_expr" and node.children[-1].type == "trailer"
        assigned = node.type == "expr_stmt" and node.children[0].type == "atom_expr"
        if node.parent is not None and node.parent.type == "simple_stmt" and (call or assigned):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return Keyword("pass", node.start_pos, node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("f(x)", "pass"), Example("a.b = 1", "pass"))


class Mutant(NamedTuple):
    """A change of a file, and the test that fails with it."""

    file: str
    line: int
    function: str
    before: str
    after: str
    killed_by: str = ""  # empty: it survived
    remark: str = ""  # about a survivor


def annotated(code: str) -> set[tuple[int, int]]:
    """Return the first line and column of each part of an annotation."""
    trees: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            trees.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            trees.append(node.returns)
    ranges = ((tree.lineno, tree.col_offset, tree.end_col_offset) for tree in trees if tree is not None)
    return {(line, column) for line, first, last in ranges for column in range(first, last or first)}


def places(code: str) -> dict[Any, list[tuple[Operator, int]]]:
    """Return the changes of some code, by place: an operator and which of its occurrences."""
    tree, skipped = get_ast(code), annotated(code)
    changes: dict[Any, list[tuple[Operator, int]]] = {}
    operators = [get_operator(f"core/{name}")() for name in NAMES]
    for operator in [*operators, DropTerm(), DropStatement()]:
        positions = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for occurrence, place in enumerate(positions):
            if place[0] not in skipped:
                changes.setdefault(place, []).append((operator, occurrence))
    return changes


def compiles(code: str) -> bool:
    try:
        compile(code, "", "exec")
    except SyntaxError:
        return False
    return True


def function_at(code: str, line: int) -> str:
    """Return the innermost function or class around a line."""
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    around = [node for node in nodes if node.lineno <= line <= (node.end_lineno or 0)]
    return max(around, key=lambda node: node.lineno).name if around else ""


def sample(file: str, number: int, seed: int) -> list[tuple[Mutant, str]]:
    """Return some mutants of a file with their code, at most one for each place."""
    code = (ROOT / file).read_text()
    changes, generator = places(code), random.Random(f"{seed} {file}")
    mutants: list[tuple[Mutant, str]] = []
    for place in generator.sample(sorted(changes), len(changes)):
        changed = mutate_code(code, *generator.choice(changes[place]))
        if changed not in (None, code) and compiles(changed):
            mutants.append((described(file, code, changed), changed))
        if len(mutants) == number:
            break
    return sorted(mutants)


def described(file: str, code: str, changed: str) -> Mutant:
    old, new = code.splitlines(), changed.splitlines()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    _, i1, i2, j1, j2 = next(code for code in matcher.get_opcodes() if code[0] != "equal")
    before, after = (" ".join(map(str.strip, lines)) for lines in (old[i1:i2], new[j1:j2]))
    return Mutant(file, i1 + 1, function_at(code, i1 + 1), before, after)


class Selection:
    """A plugin of pytest: runs only the tests of one method and framework, and remembers one that fails."""

    def __init__(self, method: str, plugin: str) -> None:
        others = {word for name, words in PLUGINS.items() if name != plugin for word in words}
        self.method, self.others, self.failed = method.replace("_", " "), others, ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self.selects(item.nodeid)]

    def selects(self, name: str) -> bool:
        path, _, test = name.partition("::")
        words = re.split(r"[^a-z0-9]+", f"{Path(path).stem} {test}".lower())
        of_method = f" {self.method} " in f" {' '.join(words)} "
        return of_method and not {words[-2], Path(path).parent.name} & self.others

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid


def child(copy: Path, method: str, plugin: str, stage: str, marks: str, connection: Connection) -> None:
    """Run the tests of a method in a copy of the repository and send the name of one that fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", *PLUGINS)]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    selection = Selection(method, plugin)
    options = [
        "--numprocesses=0",
        "--exitfirst",
        "-p",
        "no:cacheprovider",
        "-W",
        ALREADY_IMPORTED,
        "-m",
        marks,
        stage,
    ]
    code = pytest.main(options, plugins=[selection])
    passed = code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    connection.send(selection.failed or ("" if passed else f"{stage}: {code!r}"))


def failing_test(copy: Path, method: str, plugin: str, stage: str, marks: str) -> str:
    """Return a test that fails in a copy of the repository, or an empty text."""
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(copy, method, plugin, stage, marks, theirs))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "os.fork", RuntimeWarning
        )  # JAX has no threads before its first array
        process.start()
    theirs.close()
    try:
        name: str = ours.recv() if ours.poll(SECONDS) else f"{stage}: no end in {SECONDS} s"
    except EOFError:
        name = f"{stage}: the process crashed"
    process.kill()
    process.join()
    return name


def killed_by(copy: Path, mutant: Mutant, changed: str) -> str:
    """Return the test that kills a mutant, which passes without it; an empty text if none does."""
    path = Path(mutant.file)
    plugin, method = path.parts[0], path.stem
    original = (ROOT / path).read_text()
    for stage, marks in STAGES:
        try:
            write_source(copy / path, changed)
            name = failing_test(copy, method, plugin, stage, marks)
        finally:
            write_source(copy / path, original)
        if name:
            check_passes(copy, method, plugin, name)
            return name
    return ""


def write_source(path: Path, code: str) -> None:
    """Write a file with a time that no version of it had, by which Python notices that it has changed."""
    path.write_text(code)
    os.utime(path, (next(TIMES),) * 2)


@cache
def check_passes(copy: Path, method: str, plugin: str, name: str) -> None:
    """Raise an error if a test fails without a mutant, too."""
    if "::" in name and failing_test(copy, method, plugin, name, "slow or not slow"):
        raise RuntimeError(f"{name} fails without a mutant")


def read() -> dict[str, Any]:
    """Return the content of the file."""
    content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"files": {}}
    return content


def write(file: str, results: list[Mutant], seed: int) -> None:
    """Replace the results of a file, but keep the remarks about its survivors."""
    content = read()
    before = {(m["before"], m["after"]): m["remark"] for m in content["files"].get(file, [])}
    rows = [m._replace(remark="" if m.killed_by else before.get((m.before, m.after), "")) for m in results]
    content["files"][file] = [row._asdict() for row in rows]
    content |= {
        "seed": seed,
        "cosmic-ray": version("cosmic-ray"),
        "files": dict(sorted(content["files"].items())),
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")


def main(args: Sequence[str] | None = None) -> None:
    """Run a sample of mutants of each method and write the results after each file."""
    from sequel_core.algorithms import ALGORITHMS

    parser = argparse.ArgumentParser("make mutants", 'make mutants ARGS="[options] [METHOD ...]"', __doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all methods")
    parser.add_argument("--count", type=int, default=6, help="mutants of each file (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    options = parser.parse_args(args)
    if unknown := set(options.methods) - set(ALGORITHMS):
        parser.error(f"METHOD must be one of {', '.join(ALGORITHMS)}, got {', '.join(sorted(unknown))}")
    os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)
    conftest = import_module("tests.conftest")  # first, because JAX reads its variables when it is imported
    declared = run_path(str(ROOT / "sequel_lightning" / "_torchvision.py"))  # before Lightning imports it
    for library in LIBRARIES:
        import_module(library)
    with TemporaryDirectory(prefix="sequel-mutants-") as folder:
        copy = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (f"{p}/algorithms/{m}.py" for m in options.methods or ALGORITHMS for p in PLUGINS):
            results = []
            for mutant, changed in sample(file, options.count, options.seed):
                results.append(mutant._replace(killed_by=killed_by(copy, mutant, changed)))
                print(*results[-1], sep=" | ", flush=True)
            write(file, results, options.seed)
    del declared, conftest


if __name__ == "__main__":
    main()
