"""Runs of older versions: each is read, or rejected with a one-line error that names the difference.

A folder holds one run of each mode as a version wrote it: two tasks of digits with experience replay, and the
checkpoint after the first. To add one, check out the version, and in an empty directory, for each mode:

    sequel run algo=er algo.mem_size=10 algo.mem_batch_size=4 benchmark=rotateddigits benchmark.num_tasks=2 \\
        benchmark.per_task_rotation=90 benchmark.subset=60 backbone.widths=[8] optimizer.momentum=0.9 \\
        optimizer.lr=0.1 seed=3 mode=MODE run_dir=MODE

Keep `checkpoints/1` alone, and take the directory out of orbax's `commit_success.txt` and the manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sequel_benchmarks import from_arrays
from sequel_core import load_result, load_weights, run
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.cli import main
from sequel_core.report import tables
from sequel_core.report.runs import read_study
from sequel_core.runs import versions
from sequel_core.runs.checkpoints import MANIFEST, RUN, CheckpointWarning
from sequel_core.runs.learner import Evaluation
from sequel_core.stream.task import Task
from tests.core.scripted import Scripted, scripted

FOLDER = Path(__file__).parent
RUNS = [path for version in sorted(FOLDER.glob("[0-9]*")) for path in sorted(version.iterdir())]
every_run = pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.name}")
HERE = "7.8.9"
X, Y = np.zeros((6, 2, 2, 1), np.uint8), np.resize([0, 1], 6)


@pytest.fixture(autouse=True)
def _version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this version be another one than any that is kept."""
    replaced = {versions.PACKAGE: HERE}
    monkeypatch.setattr(versions, "_version", lambda name: replaced.get(name) or metadata.version(name))


def matrix(path: Path) -> Any:
    """Read an accuracy matrix with NumPy alone."""
    return np.genfromtxt(path / "accuracy_matrix.csv", delimiter=",", skip_header=1)


def unfinished(path: Path, directory: Path, **changes: Any) -> Path:
    """Copy a run as if it had been killed in its second task; sections of its settings may be changed."""
    shutil.copytree(path, directory)
    for name in ("summary.json", "weights.npz"):
        (directory / name).unlink()
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config |= {key: {**config[key], **values} for key, values in changes.items()}
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return directory


def rewrite(checkpoint: Path, **change: Any) -> None:
    """Change the orchestrator's part of a checkpoint, and its manifest."""
    content = json.dumps(json.loads((checkpoint / RUN).read_text()) | change).encode()
    (checkpoint / RUN).write_bytes(content)
    listed = json.loads((checkpoint / MANIFEST).read_text())
    listed[RUN] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(listed))


def contents(directory: Path) -> dict[str, bytes]:
    all_files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return {name: content for name, content in all_files.items() if not name.startswith(".")}


def attempt(line: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code of a command line, and its one line of error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # of the versions, if it is read
        code = main(line)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) in ((0, 0), (2, 1)), error
    return code, error


@every_run
def test_results_are_read(path: Path) -> None:
    result = load_result(path)
    np.testing.assert_array_equal(result.matrix, matrix(path))
    assert result.version == path.parent.name
    assert result.average_accuracy == pytest.approx(np.mean(matrix(path)[-1]))
    assert result.average_accuracy == result.summary["average_accuracy"] > 0.2
    assert {a.dtype for a in load_weights(path).values()} == {np.dtype(np.float32)}
    study = read_study([path])
    assert not study.notes
    assert [group.label for group in study.groups] == ["er"]
    assert [one.status for one in study.runs] == ["finished"]


@every_run
def test_a_run_is_gone_on_with_or_rejected_in_one_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with the numbers that the older version came to; or the setting, or the tensor, is named."""
    directory = unfinished(path, tmp_path / "run")
    before = contents(directory)
    code, error = attempt(["run", f"resume={directory}", "-q"], capsys)
    if code == 0:
        np.testing.assert_allclose(load_result(directory).matrix, matrix(path), atol=0.02)
        assert load_result(directory).summary["status"] == "finished"
    else:
        version = re.escape(path.parent.name)
        assert re.search(r"[\w./]+ is .* there,? and .* here", error)
        assert re.search(rf"written by sequel-cl {version}, this is {re.escape(HERE)}\)$", error.strip())
        assert contents(directory) == before


@every_run
def test_a_setting_that_is_not_known_is_named_with_the_version(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = unfinished(path, tmp_path / "run", algo={"colour": 3})
    for line in ([f"resume={directory}"], [str(directory / "config.yaml"), "--check"]):
        code, error = attempt(["run", *line], capsys)
        assert code == 2
        assert "algo.colour is not a setting of er" in error
        assert f"(the settings were written by sequel-cl {path.parent.name}, this is {HERE})" in error
    assert "colour" in str(load_result(directory).config)  # which the results are read with


@every_run
def test_a_setting_that_was_not_there_is_named_with_the_version(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = unfinished(path, tmp_path / "run")
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(text.replace("  mem_batch_size: 4\n", ""))
    code, error = attempt(["run", f"resume={directory}"], capsys)
    assert code == 2
    assert "algo.mem_batch_size is not set there and 10 here" in error
    assert f"written by sequel-cl {path.parent.name}, this is {HERE}" in error


@every_run
@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 0}, "has format 0, this version reads 1"), ({"seconds": [1]}, "seconds must be numbers by")],
)
def test_a_checkpoint_of_another_layout_is_named_with_the_version(
    change: dict[str, Any], message: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = unfinished(path, tmp_path / "run")
    rewrite(directory / "checkpoints" / "1", **change)
    before = contents(directory)
    code, error = attempt(["run", f"resume={directory}"], capsys)
    assert code == 2
    assert message in error or "there and" in error  # a setting that has come since is named first
    assert f"written by sequel-cl {path.parent.name}, this is {HERE})" in error
    assert contents(directory) == before


def test_a_run_says_which_version_wrote_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no setting: runs of two versions are seeds of one configuration, and the report names both."""
    line = ["run", "-q", "mode=pytorch", "benchmark.num_tasks=1", "benchmark.subset=20"]
    first, second, third = (tmp_path / name for name in "abc")
    assert main([*line, f"run_dir={first}"]) == 0
    assert yaml.safe_load((first / "config.yaml").read_text())["written_by"] == HERE
    assert load_result(first).version == HERE
    shutil.copytree(first, second)
    config = (second / "config.yaml").read_text()
    for old, new in ((HERE, "1.2.3"), ("seed: 0\n  log", "seed: 1\n  log")):
        config = config.replace(old, new)
    (second / "config.yaml").write_text(config)
    study = read_study([first, second])
    assert [len(group.runs) for group in study.groups] == [2]
    table = tables.every_run(study)
    assert sorted(row[table.header.index("SequeL version")] for row in table.rows) == ["1.2.3", HERE]
    assert main(["run", str(second / "config.yaml"), "-q", f"run_dir={third}"]) == 0  # its settings, run anew
    assert load_result(third).version == HERE
    assert load_result(third).config["training"]["seed"] == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("checkpoint {path} does not fit: a/b is missing there, and float32 [3] here"), "a/b is"),
        (KeyError("outputs"), "cannot be used, although it is undamaged (KeyError: 'outputs'); delete it"),
    ],
    ids=["shape", "key"],
)
def test_a_learners_part_that_does_not_fit_is_named_with_the_version(
    error: Exception, message: str, tmp_path: Path
) -> None:
    benchmark = from_arrays([((X, Y), (X, Y))])
    first, again = (scripted("jax", NaiveHParams(), benchmark, batch_size=2) for _ in range(2))
    run(first, benchmark, run_dir=tmp_path / "run", progress=False)
    (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / "checkpoints" / "1"
    rewrite(path, versions={"sequel-cl": "1.2.3"})

    def restore(directory: Path) -> None:
        raise type(error)(str(error.args[0]).format(path=directory))

    again.restore = restore  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        run(again, benchmark, run_dir=tmp_path / "run", progress=False, resume=True)
    assert str(raised.value).startswith(f"checkpoint {path} ")
    assert str(raised.value).endswith(f"(it was written by sequel-cl 1.2.3, this is {HERE})")


def assert_true(value: bool) -> None:
    assert value


class Waiting(Scripted):
    """Whose first checkpoint is still being written when the second task has been evaluated."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.evaluated = threading.Event()

    def save(self, directory: Path) -> Callable[[], None]:
        super().save(directory)
        return lambda: assert_true(self.evaluated.wait(10))

    def evaluate(self, task: Task, split: str) -> Evaluation:
        evaluation = super().evaluate(task, split)
        if task.index == 1:
            self.evaluated.set()
        return evaluation


def test_a_checkpoint_holds_what_was_known_when_it_was_made(tmp_path: Path) -> None:
    benchmark = from_arrays([((X, Y), (X, Y))] * 2)
    model = Waiting("jax", NaiveHParams(), benchmark, batch_size=2)  # type: ignore[abstract]
    run(model, benchmark, run_dir=tmp_path / "run", progress=False)
    known = json.loads((tmp_path / "run" / "checkpoints" / "1" / RUN).read_text())
    assert known["matrix"][1] == [None, None]
