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
from sequel_core.algorithms import ALGORITHMS
from sequel_core.backbones import BACKBONES

PLUGINS: list[ModuleType] = [sequel_flax, sequel_lightning]


def files(plugin: ModuleType, folder: str) -> dict[str, Path]:
    assert plugin.__file__ is not None
    found = (Path(plugin.__file__).parent / folder).glob("*.py")
    own = OWN.get(folder, ((), ()))[PLUGINS.index(plugin)]
    return {
        path.name: path
        for path in found
        if path.name not in own and (folder != SHARED or path.name in SHARED_FILES)
    }


OWN = {"backbones": ({"normalisation.py"}, {"normalisation.py", "torchvision.py"})}
"""What one plug-in alone needs: torch brings the layers and takes any module, Flax has no torchvision."""
FILE_NAMES = {"resnet18": "resnet", "resnet18_thin": "resnet"}
SHARED = "."
SHARED_FILES = {"coresets.py", "exemplars.py", "kernels.py", "quadratic.py", "replay.py"}
CONTAINERS = {
    "coresets.py": ("plan_start", "apply_start", "start_task"),
    "exemplars.py": ("init_exemplars",),
    "quadratic.py": ("quadratic", "init_quadratic"),
    "replay.py": ("replay",),
}
"""What the factory of a bundle is in Flax, where a LightningModule stands in its place."""
COMMON = [name for name, hparams in BACKBONES.items() if len(hparams.modes) == len(PLUGINS)]
NETWORKS = {"MLP", "CNN", "Block", "ResNet18"}
"""Classes whose docstrings differ by what torch has to be told: image_shape, channels of the input."""
TRANSLATED = {"jax.Array": "Tensor", "jax.Array | None": "Tensor | None"}

FOLDERS = {
    folder: [files(plugin, folder) for plugin in PLUGINS] for folder in ("algorithms", "backbones", SHARED)
}
TWINS = [(folder, name) for folder, (ours, _) in FOLDERS.items() for name in sorted(ours) if name[0] != "_"]
each_twin = pytest.mark.parametrize(("folder", "name"), TWINS)


def trees(folder: str, name: str) -> list[ast.Module]:
    return [ast.parse(found[name].read_text()) for found in FOLDERS[folder]]


def functions(tree: ast.Module, containers: tuple[str, ...]) -> dict[str, str]:
    """Return the public functions, but for the factory that is a class in the twin, with their parameters.

    A network is a module in Lightning; in Flax it is a train state, its parameters and the state.
    """
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    return {
        f.name: " ".join(a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)).replace(
            "ts params state", "module"
        )
        for f in found
        if f.name not in containers
    }


def states(tree: ast.Module) -> dict[str, list[tuple[str, str]]]:
    """Return the fields of each NamedTuple with their types."""
    tuples = [
        n for n in tree.body if isinstance(n, ast.ClassDef) and "NamedTuple" in map(ast.unparse, n.bases)
    ]
    return {
        t.name: [
            (ast.unparse(f.target), TRANSLATED.get(ast.unparse(f.annotation), ast.unparse(f.annotation)))
            for f in t.body
            if isinstance(f, ast.AnnAssign)
        ]
        for t in tuples
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_same_files(folder: str) -> None:
    ours, theirs = FOLDERS[folder]
    assert ours.keys() == theirs.keys()
    tables = {"algorithms": list(ALGORITHMS), "backbones": [FILE_NAMES.get(name, name) for name in COMMON]}
    tables[SHARED] = [name.removesuffix(".py") for name in SHARED_FILES]
    assert {f"{name}.py" for name in tables[folder]} == ours.keys() - {"__init__.py"}


@each_twin
def test_the_same_functions_and_states(folder: str, name: str) -> None:
    containers = CONTAINERS.get(name, (name.removesuffix(".py"),))
    a, b = trees(folder, name)
    assert functions(a, containers) == functions(b, containers)
    assert states(a) == states(b)


def test_the_states_and_functions_are_found() -> None:
    for tree in trees(SHARED, "quadratic.py"):
        found = functions(tree, CONTAINERS["quadratic.py"])
        assert found["consolidate"] == "params state importance separate gamma"
        assert states(tree)["QuadraticState"] == [("anchor", "Params"), ("importance", "Params")]
    for tree in trees(SHARED, "replay.py"):
        assert functions(tree, ())["look"] == "module samples together"
        assert states(tree)["Seen"][0] == ("logits", "Tensor")


@each_twin
def test_the_same_docstrings(folder: str, name: str) -> None:
    texts = [str(ast.get_docstring(tree)) for tree in trees(folder, name)]
    where = name if folder == SHARED else f"{folder}/{name}"
    mirrors = [f"Mirror: {plugin.__name__}/{where}" for plugin in reversed(PLUGINS)]
    bare = [text.replace(mirror, "") for text, mirror in zip(texts, mirrors, strict=True)]
    assert bare[0] == bare[1] != texts[0]
    mine, twins = (
        {n.name: ast.get_docstring(n) for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for tree in trees(folder, name)
    )
    for shared in mine.keys() & twins.keys() - NETWORKS:
        assert mine[shared] == twins[shared], shared


@pytest.mark.parametrize("plugin", [0, 1], ids=["flax", "lightning"])
@each_twin
def test_an_algorithm_fits_on_a_screen_or_two(folder: str, name: str, plugin: int) -> None:
    limit = 240 if folder == SHARED else 165
    assert len(FOLDERS[folder][plugin][name].read_text().splitlines()) <= limit


@pytest.mark.parametrize("name", ["make_learner", "build_learner", "build_optimizer", "process_settings"])
def test_learners_are_built_alike(name: str) -> None:
    builds = (sequel_flax.build, sequel_lightning.build)
    ours, theirs = (inspect.signature(getattr(build, name)).parameters for build in builds)
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_the_same_names_in_the_tables() -> None:
    for plugin, mode in zip(PLUGINS, ("jax", "pytorch"), strict=True):
        assert plugin.ALGORITHMS.keys() == ALGORITHMS.keys()
        table = {name for name, hparams in BACKBONES.items() if mode in hparams.modes}
        assert plugin.backbones.BACKBONES.keys() == table


@pytest.mark.parametrize("name", COMMON)
def test_backbones_take_the_same_settings(name: str) -> None:
    ours = inspect.signature(sequel_flax.backbones.BACKBONES[name]).parameters
    theirs = inspect.signature(sequel_lightning.backbones.BACKBONES[name]).parameters
    own = [parameter for parameter in ours if parameter not in ("parent", "name")]  # those two are linen's
    assert own == [parameter for parameter in theirs if parameter in own]
    assert {p: ours[p].default for p in own} == {p: theirs[p].default for p in own}
    assert vars(BACKBONES[name]()).keys() <= set(own)
