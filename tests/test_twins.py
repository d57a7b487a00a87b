"""The two plug-ins read as a translation of each other: files, functions, parameters, states, docstrings.

The share of a pair of files is the share of its code that lies in twin functions. Code is counted in words:
names, numbers, strings and operators, after `ast.unparse`. These do not count:

- docstrings, comments, imports, annotations and decorators;
- the names of the frameworks, such as `jnp`, `torch` and `lax`;
- the names by which a function reaches the network: a module in Lightning; in Flax a train state, its
  parameters and the state;
- what only connects a method to its framework: attributes of a class, the statement that a factory returns,
  and a method or nested function whose body is one call.

Two functions, or a method and a function that is nested in a factory, are twins under three conditions: they
have the same name, the same parameters, and bodies whose words have a `difflib` ratio of at least `SIMILAR`.
The ratio is twice the number of words that both have in the same order, divided by the words of both. It is 1
for the same words, and about 0.2 for functions of the same name that work differently. A NamedTuple is a twin
if both files have it with the same fields.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import re
import tokenize
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
    paths = (Path(plugin.__file__).parent / folder).glob("*.py")
    single = SINGLE.get(folder, ((), ()))[PLUGINS.index(plugin)]
    return {
        path.name: path
        for path in paths
        if path.name not in single and (folder != SHARED or path.name in SHARED_FILES)
    }


SINGLE = {"backbones": ({"normalisation.py"}, {"normalisation.py", "torchvision.py"})}
"""Files of one plug-in only: torch has the layers and takes any module, Flax has no torchvision."""
FILE_NAMES = {"resnet18": "resnet", "resnet18_thin": "resnet"}
SHARED = "."
SHARED_FILES = {"coresets.py", "exemplars.py", "kernels.py", "quadratic.py", "replay.py", "second_phase.py"}
CONTAINERS = {
    "coresets.py": ("plan_start", "apply_start", "start_task"),
    "exemplars.py": ("init_exemplars",),
    "quadratic.py": ("quadratic", "init_quadratic"),
    "replay.py": ("replay", "one_pass", "no_outputs", "joined", "written", "total_weight"),
}
"""Functions of the Flax files that are a LightningModule's in the other plug-in."""
COMMON = [name for name, hparams in BACKBONES.items() if len(hparams.modes) == len(PLUGINS)]
NETWORKS = {"MLP", "CNN", "Block", "ResNet18", "TaskHeads"}
"""Classes whose docstrings differ, because torch needs to know image_shape or the channels of the input."""
TRANSLATED = {"jax.Array": "Tensor", "jax.Array | None": "Tensor | None"}

FOLDERS = {
    folder: [files(plugin, folder) for plugin in PLUGINS] for folder in ("algorithms", "backbones", SHARED)
}
TWINS = [(folder, name) for folder, (ours, _) in FOLDERS.items() for name in sorted(ours) if name[0] != "_"]
each_twin = pytest.mark.parametrize(("folder", "name"), TWINS)


def trees(folder: str, name: str) -> list[ast.Module]:
    return [ast.parse(paths[name].read_text()) for paths in FOLDERS[folder]]


def functions(tree: ast.Module, containers: tuple[str, ...]) -> dict[str, str]:
    """Return the public functions, except for a factory whose twin is a class, with their parameters."""
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    return {f.name: parameters(f) for f in public if f.name not in containers}


def parameters(function: ast.FunctionDef) -> str:
    """Return the names of the parameters, with `module` for a network.

    A network is a module in Lightning; in Flax it is a train state, its parameters and the state, or a model
    (train state, state and objective) and its parameters.
    """
    arguments = function.args
    names = " ".join(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    return re.sub(r"\b(ts params state|params model|ts state|self)\b", "module", names)


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
    tables["backbones"].append("heads")
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
        assert (
            functions(tree, CONTAINERS["quadratic.py"])["consolidate"]
            == "params state importance separate gamma"
        )
        assert states(tree)["QuadraticState"] == [("anchor", "Params"), ("importance", "Params")]
    for tree in trees(SHARED, "replay.py"):
        assert functions(tree, ())["forward"] == "module samples together"
        assert states(tree)["Outputs"][2] == ("losses", "Tensor")


@each_twin
def test_the_same_docstrings(folder: str, name: str) -> None:
    texts = [str(ast.get_docstring(tree)) for tree in trees(folder, name)]
    path = name if folder == SHARED else f"{folder}/{name}"
    mirrors = [f"Mirror: {plugin.__name__}/{path}" for plugin in reversed(PLUGINS)]
    bare = [text.replace(mirror, "") for text, mirror in zip(texts, mirrors, strict=True)]
    assert bare[0] == bare[1] != texts[0]
    mine, twins = (
        {
            n.name: (ast.get_docstring(n) or "").partition("\n\nExample:")[0]
            for n in tree.body
            if isinstance(n, ast.FunctionDef | ast.ClassDef)
        }
        for tree in trees(folder, name)
    )
    for shared in mine.keys() & twins.keys() - NETWORKS:
        assert mine[shared] == twins[shared], shared


SIMILAR = 0.5
"""Least `difflib` ratio of the words of twin bodies."""
SHARE = 0.6
"""Least share of code in twin functions."""
BELOW: dict[str, tuple[float, str]] = {
    "agem.py": (0.2, "Lightning projects the gradient in a hook of its optimizer step"),
    "si.py": (0.2, "Lightning spreads the step over three hooks, and calls fused kernels"),
    "bic.py": (0.3, "torch replaces the memories and the correction in place"),
    "gdumb.py": (0.05, "its equations are in second_phase.py; torch trains in place"),
    "lamaml.py": (0.56, "Lightning takes its steps in `training_loss`, Flax in `train_step`"),
    "coresets.py": (0.0, "only Lightning's module takes coresets from a user's own loop, with its checks"),
    "replay.py": (0.37, "Flax carries padding, statistics and dropout keys along, torch writes in place"),
    "exemplars.py": (0.3, "Flax chooses exemplars on the host, from within compiled functions"),
}
"""Pairs that cannot reach `SHARE`: the share that they keep, and the reason."""
FRAMEWORK = {"Array", "F", "Tensor", "jax", "jnp", "lax", "nn", "np", "optax", "torch", "tree_utils"}
NETWORK = {"model", "module", "net", "params", "self", "state", "stats", "stream", "ts"}
SAME_WORD = {"axis": "dim", "keepdims": "keepdim", "concatenate": "cat"}


class Stripped(ast.NodeTransformer):
    """Removes docstrings, annotations and decorators."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.body = node.body[ast.get_docstring(node) is not None :] or [ast.Pass()]
        node.decorator_list, node.returns = [], None
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            argument.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        return node if node.value is None else ast.Assign([node.target], node.value, lineno=node.lineno)


def words(*nodes: ast.AST) -> list[str]:
    text = re.sub(r"\bjax\.tree\.map\b", "tree_map", "\n".join(map(ast.unparse, nodes)))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    types = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
    code = [t.string for t in tokens if t.type in types and t.string not in set("()[]{}.,:")]
    return [SAME_WORD.get(w, w) for w in code if w not in FRAMEWORK | NETWORK]


def is_call(function: ast.FunctionDef) -> bool:
    """Return whether the body is one call."""
    statement = function.body[0]
    returned = statement.value if isinstance(statement, ast.Return | ast.Expr) else None
    return len(function.body) == 1 and isinstance(returned, ast.Call)


def counted(tree: ast.Module, containers: tuple[str, ...]) -> tuple[dict[str, ast.AST], list[ast.AST]]:
    """Return the functions and NamedTuples by name, and the other statements that count."""
    named: dict[str, ast.AST] = {}
    others: list[ast.AST] = []
    members: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            if "NamedTuple" in map(ast.unparse, node.bases):
                named[node.name] = node
            else:
                members += [m for m in node.body if isinstance(m, ast.FunctionDef)]
        elif isinstance(node, ast.FunctionDef):
            if node.name in containers:
                members += [m for m in node.body if not isinstance(m, ast.Return)]
            else:
                named[node.name] = node
        elif isinstance(node, ast.Assign):
            others.append(node)
    for member in members:
        if not isinstance(member, ast.FunctionDef) or member.name in named:
            others.append(member)
        elif not is_call(member):
            named[member.name] = member
    return named, [node for node in others if not isinstance(node, ast.FunctionDef) or not is_call(node)]


def are_twins(a: ast.AST, b: ast.AST) -> bool:
    if not isinstance(a, ast.FunctionDef) or not isinstance(b, ast.FunctionDef):
        return True  # the fields of a NamedTuple are compared above
    ratio = difflib.SequenceMatcher(None, words(*a.body), words(*b.body), autojunk=False).ratio()
    return parameters(a) == parameters(b) and ratio >= SIMILAR


def share(folder: str, name: str) -> float:
    """Return the share of a pair's code that lies in twin functions; 1 for a pair without code."""
    containers = CONTAINERS.get(name, (name.removesuffix(".py"),))
    (a, others_a), (b, others_b) = (counted(Stripped().visit(t), containers) for t in trees(folder, name))
    twins = [n for k in a.keys() & b.keys() if are_twins(a[k], b[k]) for n in (a[k], b[k])]
    total = len(words(*a.values(), *b.values(), *others_a, *others_b))
    return len(words(*twins)) / total if total else 1.0


@pytest.mark.parametrize(
    ("folder", "name"), [pair for pair in TWINS if pair[0] != "backbones"], ids=lambda text: text
)
def test_most_code_lies_in_twin_functions(folder: str, name: str) -> None:
    """Backbones are layers rather than functions; `tests/parity` compares what they compute."""
    least, _ = BELOW.get(name, (SHARE, ""))
    assert share(folder, name) >= least
    if name in BELOW:
        assert share(folder, name) < SHARE, "it reaches the limit: remove it from BELOW"


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
    shared = [parameter for parameter in ours if parameter not in ("parent", "name")]  # those two are linen's
    assert shared == [parameter for parameter in theirs if parameter in shared]
    assert {p: ours[p].default for p in shared} == {p: theirs[p].default for p in shared}
    assert BACKBONES[name]().arguments().keys() <= set(shared)
