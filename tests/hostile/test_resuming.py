"""Resuming runs whose files another program or a fault has changed; nothing is trained."""

import json
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sequel_core.runs.checkpoints import MANIFEST, RUN, Checkpoints, _files
from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.files import write_json
from tests.hostile import conftest
from tests.hostile.fuzzing import Dumper, Sandbox, altered, inputs, mutated

LINE = ["benchmark.num_tasks=2", "benchmark.subset=50"]
STATE: dict[str, Any] = {
    "done": [0, "evaluate"], "matrix": [[0.5, None], [None, None]], "baseline": None, "extra": {},
    "seconds": {"train": 1.0, "evaluate": 0.5, "checkpoint": 0.1}, "total_seconds": 2.0, "metrics_bytes": 0,
    "versions": {"numpy": np.__version__},
}  # fmt: skip


@pytest.fixture
def run(sandbox: Sandbox) -> Path:
    """A run that was interrupted after its first task."""
    directory = RunDirectory.create(sandbox.given / "run")
    directory.write_config(yaml.safe_load(sandbox.run(["run", *LINE, "--cfg"]).out))
    directory.append_metrics({"kind": "train", "loss": 0.5})
    save(directory.path, STATE)
    return directory.path


def save(path: Path, state: Any) -> Path:
    files = Checkpoints(path)

    def write(folder: Path) -> Any:
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(b"weights")
        return lambda: None

    files.save(write, state)
    files.close()
    return files.directory


def test_it_resumes_until_it_trains(sandbox: Sandbox, run: Path) -> None:
    answer = sandbox.run(["run", f"resume={run}"])
    assert (answer.code, answer.err) == (2, "sequel: nothing is trained here\n")
    assert "failed" in (run / "summary.json").read_text()


@pytest.mark.parametrize(
    "error",
    [
        pickle.UnpicklingError("Weights only load failed\nRun it all the same"),
        KeyError("optimizer"),
        UnicodeDecodeError("utf-8", b"\x80", 0, 1, "invalid start byte"),
        RecursionError(),
        MemoryError(),
        AttributeError("'int' object"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_undamaged_checkpoint_that_cannot_be_used(
    sandbox: Sandbox, run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def restore(_: object, directory: Path) -> None:
        raise error

    monkeypatch.setattr(conftest.Untrained, "restore", restore)
    answer = sandbox.run(["run", f"resume={run}"])
    assert answer.code == 2
    what = type(error).__name__ + (": 'optimizer'" if isinstance(error, KeyError) else "")
    message = f"checkpoint {run}/checkpoints/1 cannot be used, although it is undamaged ({what})"
    assert message in answer.err


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("done", [2, "train"], r"a task from -1 to 1 and train or evaluate, got \[2, 'train'\]"),
        ("done", [0, "both"], "a task from -1 to 1 and train or evaluate"),
        ("matrix", [[0.5, None]], r"2 x 2 fractions, got \[\[0\.5, None\]\]"),
        ("matrix", [[0.5, None], [None, 50]], "2 x 2 fractions"),
        ("baseline", [0.5], "2 fractions or null"),
        ("extra", {"masked_average_accuracy": "0.5"}, "numbers by name"),
        ("seconds", {"train": "1.0"}, "numbers by name"),
        ("total_seconds", None, "a number, got None"),
        ("versions", ["numpy"], "versions by name"),
        ("metrics_bytes", -1, "a whole number >= 0, got -1"),
        ("metrics_bytes", ..., "a whole number >= 0, got none"),
    ],
)
def test_a_state_that_no_run_has_written(
    sandbox: Sandbox, run: Path, name: str, value: Any, rule: str
) -> None:
    state = {"format": 1, **STATE, name: value}
    if value is ...:
        del state[name]
    save_again(run / "checkpoints" / "1", state)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    answer = sandbox.run(["run", f"resume={run}"])
    assert answer.code == 2
    message = rf"1 cannot be used, although it is undamaged: in its run\.json, {name} must be {rule}"
    assert re.search(rf"{run}/checkpoints/{message}", answer.err)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore::sequel_core.runs.checkpoints.CheckpointWarning")
@inputs(quick=8)
def test_any_file_of_it(sandbox: Sandbox, run: Path, seeds: range) -> None:
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config = yaml.safe_load((run / "config.yaml").read_text())

    def prepare(rng: random.Random) -> list[str]:
        shutil.rmtree(run)
        for path, content in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        damage = rng.randrange(3)
        if damage == 0:
            path = rng.choice(sorted(kept))
            path.write_bytes(mutated(kept[path], rng))
        elif damage == 1:
            (run / "config.yaml").write_text(yaml.dump(altered(config, rng), Dumper=Dumper), encoding="utf-8")
        else:
            folder = save(run, {})
            save_again(folder / "2", altered({"format": 1, **STATE}, rng))
        return ["run", f"resume={run}"]

    assert {2} == set(sandbox.fuzz(seeds, prepare))


def save_again(path: Path, state: Any) -> None:
    """Replace the orchestrator's part of a checkpoint and update the manifest."""
    write_json(path / RUN, json.loads(json.dumps(state, default=str)))
    write_json(path / MANIFEST, _files(path))
