"""No file is unpickled: each of these pickles would create a folder."""

import ast
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sequel_benchmarks import cache
from sequel_core.hparams import TrainingHParams
from sequel_core.report import page
from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.results import load_weights
from tests.hostile.fuzzing import Sandbox
from tests.report.directories import write_run

PACKAGES = ("sequel_core", "sequel_lightning", "sequel_flax", "benchmarks", "configs")
ROOT = Path(__file__).parents[2]


class Trap:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    made = Trap(tmp_path / "trapped")
    yield made
    assert not made.folder.exists()
    pickle.loads(pickle.dumps(made))  # the trap works
    assert made.folder.exists()


def objects(trap: Trap) -> bytes:
    """Return a .npy file of Python objects."""
    file = io.BytesIO()
    np.save(file, np.array([trap], object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("name", cache.NPY_FILES)
@pytest.mark.parametrize("raw", [False, True], ids=["objects", "a pickle alone"])
def test_in_the_array_cache(sandbox: Sandbox, trap: Trap, name: str, raw: bool) -> None:
    folder = sandbox.given / "data" / "mnist"
    (folder / name).write_bytes(pickle.dumps(trap) if raw else objects(trap))
    sums = {key: hashlib.sha256((folder / key).read_bytes()).hexdigest() for key in cache.NPY_FILES}
    for checked in (False, True):
        if checked:
            (folder / cache.SUMS).write_text(json.dumps(sums))
        answer = sandbox.run(["data", "mnist"])
        assert answer.code == 2
        assert f"{name} is damaged" in answer.err


@pytest.mark.parametrize("name", ["config.yaml", "accuracy_matrix.csv", "metrics.jsonl", "summary.json"])
def test_in_a_run_directory(sandbox: Sandbox, trap: Trap, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(sandbox.given / "run")
    for content in (pickle.dumps(trap), f"!!python/object/apply:os.mkdir ['{trap.folder}']\n".encode()):
        (run / name).write_bytes(content + b"\n")
        monkeypatch.setattr(page, "_svg", lambda *_: "")
        answer = sandbox.run(["report", str(run), "-o", str(sandbox.given / "report.html")])
        assert answer.code == (0 if name == "metrics.jsonl" else 2)
        assert f"{name} is damaged" in answer.out + answer.err
        if name == "config.yaml":
            for line in ([str(run / name)], [f"resume={run}"]):
                answer = sandbox.run(["run", *line, "--check"])
                assert answer.code == 2
                assert "is not a YAML file of settings" in answer.err


def test_in_an_experiment_file(sandbox: Sandbox, trap: Trap) -> None:
    file = sandbox.given / "experiment.yaml"
    for tag in ("apply:os.mkdir", "new:os.mkdir"):
        file.write_text(f"algo: ewc\ncomment: !!python/object/{tag} ['{trap.folder}']\n")
        answer = sandbox.run(["run", str(file), "--check"])
        assert answer.code == 2
        assert "could not determine a constructor for the tag" in answer.err


def test_in_the_weights(trap: Trap, tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    file = directory.path / "weights.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("dense_0/kernel.npy", objects(trap))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"weights\.npz is damaged: "):
            load_weights(directory.path)
        file.write_bytes(pickle.dumps(trap))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_in_a_checkpoint_of_lightning(trap: Trap, tmp_path: Path) -> None:
    import torch

    from sequel_benchmarks import SplitDigits
    from sequel_lightning import MLP, Naive, make_learner

    made = make_learner(
        Naive.hparams_class(),
        MLP((4,), num_classes=10, image_shape=(8, 8, 1)),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        SplitDigits(),
        TrainingHParams(),
    )
    good = tmp_path / "1"
    good.mkdir()
    made.save(good)()
    whole = torch.load(good / "lightning.ckpt", weights_only=True)
    for content in (whole | {"epoch": trap}, {"state_dict": trap}, trap):
        torch.save(content, good / "lightning.ckpt")
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            made.restore(good)
    (good / "lightning.ckpt").write_bytes(pickle.dumps(trap))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        made.restore(good)


DAMAGE = """
import contextlib, os, pathlib, sys, optax
from sequel_benchmarks import SplitDigits
from sequel_core.algorithms.naive import NaiveHParams
from sequel_flax import MLP, make_learner

folder, trap = map(pathlib.Path, sys.argv[1:])
learner = make_learner(NaiveHParams(), MLP((4,), num_classes=10), optax.sgd(0.1), SplitDigits())
learner.save(folder)()
for path in [path for path in folder.rglob("*") if path.is_file()]:
    whole = path.read_bytes()
    path.write_bytes(trap.read_bytes())
    with contextlib.suppress(Exception):
        learner.restore(folder)  # not every file is read
    path.write_bytes(whole)
learner.restore(folder)
print("restored", flush=True)
os._exit(0)  # orbax's unfinished coroutines would fill stderr
"""


def test_in_a_checkpoint_of_flax(trap: Trap, tmp_path: Path) -> None:
    # in a process of its own: orbax leaves coroutines and tasks behind, which raise in later tests
    (tmp_path / "trap").write_bytes(pickle.dumps(trap))
    run = subprocess.run(
        [sys.executable, "-c", DAMAGE, str(tmp_path / "checkpoints" / "1"), str(tmp_path / "trap")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stdout) == (0, "restored\n"), run.stderr


FORBIDDEN = {
    "pickle.load", "pickle.loads", "joblib.load", "dill.load", "marshal.load", "shelve.open", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "shutil.unpack_archive", "os.system",
}  # fmt: skip
SAFE = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
"""The keyword argument that a call must have."""


def test_no_code_loads_pickles() -> None:
    """The exceptions: `_ArraysOnly` in cifar.py only rebuilds arrays; sharding.py reads no file.

    It sends values from one process of a run to the others, as Lightning's `broadcast` does.
    """
    problems = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {
            node: function.name
            for function in ast.walk(tree)  # the outer ones first
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                required = SAFE.get(name)
                loads = name.endswith(("load_from_checkpoint", ".fit")) and {"ckpt_path"} & keywords.keys()
                if (
                    name in FORBIDDEN
                    or name.endswith((".extractall", ".extract"))
                    or (required and keywords.get(required[0]) != str(required[1]))
                    or (loads and keywords.get("weights_only") != "True")
                ):
                    problems.append(f"{path.relative_to(ROOT)}: {name} in {functions.get(node)}")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                if names & {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}:
                    problems.append(f"{path.relative_to(ROOT)} imports {ast.unparse(node)}")
    assert sorted(problems) == [
        "benchmarks/cifar.py imports import pickle",
        "sequel_flax/sharding.py imports import pickle",
        "sequel_flax/sharding.py: pickle.loads in agree",
        "sequel_flax/sharding.py: pickle.loads in gather",
    ]
