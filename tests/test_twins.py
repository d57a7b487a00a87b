"""The two plug-ins read as a translation of each other: files, functions, parameters, states, docstrings."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import sequel_flax.backbones
import sequel_flax.build
import sequel_lightning.backbones
import sequel_lightning.build
from sequel_core.hparams import ALGORITHMS, BACKBONES

PLUGINS: list[ModuleType] = [sequel_flax, sequel_lightning]


def files(plugin: ModuleType, folder: str) -> dict[str, Path]:
    assert plugin.__file__ is not None
    return {path.name: path for path in (Path(plugin.__file__).parent / folder).glob("*.py")}


FOLDERS = {folder: [files(plugin, folder) for plugin in PLUGINS] for folder in ("algorithms", "backbones")}
TWINS = [(folder, name) for folder, (ours, _) in FOLDERS.items() for name in sorted(ours) if name[0] != "_"]
each_twin = pytest.mark.parametrize(("folder", "name"), TWINS, ids="/".join)


def trees(folder: str, name: str) -> list[ast.Module]:
    return [ast.parse(found[name].read_text()) for found in FOLDERS[folder]]


def functions(tree: ast.Module, container: str) -> dict[str, list[str]]:
    """Return the public functions, but for the factory that is a class in the twin, with their parameters."""
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    return {
        f.name: [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
        for f in found
        if f.name != container
    }


def states(tree: ast.Module) -> dict[str, list[tuple[str, str]]]:
    """Return the fields of each NamedTuple with their types."""
    tuples = [
        n for n in tree.body if isinstance(n, ast.ClassDef) and "NamedTuple" in map(ast.unparse, n.bases)
    ]
    return {
        t.name: [
            (ast.unparse(f.target), ast.unparse(f.annotation)) for f in t.body if isinstance(f, ast.AnnAssign)
        ]
        for t in tuples
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_same_files(folder: str) -> None:
    ours, theirs = FOLDERS[folder]
    assert ours.keys() == theirs.keys()
    names = ALGORITHMS if folder == "algorithms" else BACKBONES
    assert {f"{name}.py" for name in names} == ours.keys() - {"__init__.py"}


@each_twin
def test_the_same_functions_and_states(folder: str, name: str) -> None:
    container = name.removesuffix(".py")
    a, b = trees(folder, name)
    assert functions(a, container) == functions(b, container)
    assert states(a) == states(b)


def test_the_states_and_functions_are_found() -> None:
    for tree in trees("algorithms", "ewc.py"):
        assert functions(tree, "ewc")["consolidate"] == ["params", "state", "fisher", "hparams"]
        assert states(tree)["EWCState"] == [("anchor", "Params"), ("importance", "Params")]


@each_twin
def test_the_same_docstrings(folder: str, name: str) -> None:
    texts = [str(ast.get_docstring(tree)) for tree in trees(folder, name)]
    mirrors = [f"Mirror: {plugin.__name__}/{folder}/{name}" for plugin in reversed(PLUGINS)]
    bare = [text.replace(mirror, "") for text, mirror in zip(texts, mirrors, strict=True)]
    assert bare[0] == bare[1] != texts[0]
    mine, twins = (
        {n.name: ast.get_docstring(n) for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for tree in trees(folder, name)
    )
    for shared in mine.keys() & twins.keys() - {"MLP"}:
        assert mine[shared] == twins[shared], shared


@pytest.mark.parametrize("plugin", [0, 1], ids=["flax", "lightning"])
@each_twin
def test_an_algorithm_fits_on_a_screen_or_two(folder: str, name: str, plugin: int) -> None:
    assert len(FOLDERS[folder][plugin][name].read_text().splitlines()) <= 140


@pytest.mark.parametrize("name", ["make_learner", "build_learner", "build_optimizer"])
def test_learners_are_built_alike(name: str) -> None:
    builds = (sequel_flax.build, sequel_lightning.build)
    ours, theirs = (inspect.signature(getattr(build, name)).parameters for build in builds)
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_the_same_names_in_the_tables() -> None:
    for plugin in PLUGINS:
        assert plugin.ALGORITHMS.keys() == ALGORITHMS.keys()
        assert plugin.backbones.BACKBONES.keys() == BACKBONES.keys()


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_take_the_same_settings(name: str) -> None:
    ours = inspect.signature(sequel_flax.backbones.BACKBONES[name]).parameters
    theirs = inspect.signature(sequel_lightning.backbones.BACKBONES[name]).parameters
    own = [parameter for parameter in ours if parameter not in ("parent", "name")]  # those two are linen's
    assert own == [parameter for parameter in theirs if parameter in own]
    assert {p: ours[p].default for p in own} == {p: theirs[p].default for p in own}
    assert vars(BACKBONES[name]()).keys() <= set(own)
