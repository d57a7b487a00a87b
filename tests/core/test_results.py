import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml

from sequel_core import metrics
from sequel_core.results import (
    Result,
    RunDirectory,
    load_result,
    load_weights,
    peak_memory_bytes,
    versions,
)

MATRIX = np.array([[1 / 3, math.nan], [0.1, 2 / 3]])
CONFIG = {
    "algo": {"name": "ewc", "ewc_lambda": 1e-05, "fisher_samples": None},
    "widths": [256, 256],
    "note": "ü: ${not} an interpolation, {nor} a mapping",
    "reset": True,
}


def complete(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.create(tmp_path / "run")
    directory.write_config(CONFIG)
    directory.write_matrix(MATRIX)
    directory.write_summary({"status": "done", **metrics.summarise(MATRIX), "steps": 40})
    directory.write_weights({"dense_0/kernel": np.eye(2), "dense_0/bias": np.array([1, 2], np.float32)})
    return directory


def test_round_trip(tmp_path: Path) -> None:
    directory = complete(tmp_path)
    result = load_result(directory.path)
    assert result.run_dir == directory.path
    assert result.config == CONFIG
    np.testing.assert_array_equal(result.matrix, MATRIX)  # every bit, and nan where nan was
    assert result.matrix.dtype == np.float64
    assert result.summary["steps"] == 40
    assert result.average_accuracy == (0.1 + 2 / 3) / 2
    assert result.forgetting == result.forgetting_with_final == 1 / 3 - 0.1
    assert result.bwt == 0.1 - 1 / 3
    assert result.learning_accuracy == pytest.approx(0.5)
    assert result.average_incremental_accuracy == pytest.approx((1 / 3 + (0.1 + 2 / 3) / 2) / 2)
    assert result.worst_case_accuracy == pytest.approx((0.1 + 2 / 3) / 2)
    assert math.isnan(result.fwt)
    weights = load_weights(directory.path)
    assert set(weights) == {"dense_0/kernel", "dense_0/bias"}
    np.testing.assert_array_equal(weights["dense_0/kernel"], np.eye(2))
    assert weights["dense_0/bias"].dtype == np.float32
    assert not [
        path for path in directory.path.iterdir() if path.name.startswith(".")
    ]  # nothing temporary stays


def test_files_are_plain(tmp_path: Path) -> None:
    path = complete(tmp_path).path
    assert yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) == CONFIG
    assert (path / "accuracy_matrix.csv").read_text() == (
        "task_0,task_1\n0.3333333333333333,\n0.1,0.6666666666666666\n"
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads((path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["fwt"] is None


def test_one_task_that_was_not_evaluated(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    directory.write_config({})
    directory.write_matrix(np.array([[math.nan]]))
    assert np.isnan(load_result(tmp_path).matrix).tolist() == [[True]]


def test_values_of_numpy_and_paths_become_plain(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    directory.write_config(
        {"a": np.float64(0.5), "b": (1, np.int64(2)), "c": Path("x/y"), "d": np.arange(2), "e": None}
    )
    assert load_result(tmp_path).config == {"a": 0.5, "b": [1, 2], "c": "x/y", "d": [0, 1], "e": None}
    for write in (directory.write_config, directory.append_metrics, directory.write_summary):
        with pytest.raises(ValueError, match=r"\.model\.net must be a plain value .*, got <object"):
            write({"model": {"net": object()}})


def test_metrics_are_there_as_soon_as_they_are_appended(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    for step in range(3):
        directory.append_metrics({"step": step, "loss": math.inf if step == 1 else np.float32(0.5)})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step + 1
    assert [json.loads(line)["loss"] for line in lines] == [0.5, None, 0.5]


def test_unfinished_run(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    directory.write_config(CONFIG)
    early = load_result(tmp_path)
    assert early.summary == {"status": "unfinished"}
    assert early.matrix.shape == (0, 0)
    assert math.isnan(early.average_accuracy)
    directory.write_matrix(MATRIX)
    late = load_result(tmp_path)
    assert late.summary["status"] == "unfinished"
    assert late.average_accuracy == (0.1 + 2 / 3) / 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [1", r"config\.yaml is damaged"),
        ("config.yaml", "", r"config\.yaml is damaged: it holds no mapping"),
        ("accuracy_matrix.csv", "", r"accuracy_matrix\.csv is damaged"),
        (
            "accuracy_matrix.csv",
            "task_0,task_1\n0.5,\n",
            r"accuracy_matrix\.csv is damaged: it must hold 2 rows of 2",
        ),
        ("accuracy_matrix.csv", "task_0\nhalf\n", r"accuracy_matrix\.csv is damaged: could not convert"),
        (
            "accuracy_matrix.csv",
            "task_0\n50\n",
            r"accuracy_matrix\.csv is damaged: matrix must hold fractions",
        ),
        ("summary.json", '{"steps": ', r"summary\.json is damaged"),
        ("summary.json", "[]", r"summary\.json is damaged: it holds no mapping"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = complete(tmp_path).path
    (path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_result(path)


def test_damaged_and_missing_weights(tmp_path: Path) -> None:
    path = complete(tmp_path).path
    whole = (path / "weights.npz").read_bytes()
    for damaged in (whole[:100], b"", b"text"):
        (path / "weights.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.npz is damaged"):
            load_weights(path)
    (path / "weights.npz").unlink()
    with pytest.raises(
        ValueError, match=r"directory must hold weights\.npz, got .*run; the run has not ended"
    ):
        load_weights(path)


def test_weights_are_never_pickled(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    with pytest.raises(ValueError, match="weights must be arrays of numbers, got objects in a/b"):
        directory.write_weights({"a/b": np.array([object()])})
    assert list(tmp_path.iterdir()) == []


def test_not_a_run_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(
            ValueError, match=r"directory must be a run directory, got .*, which has no config\.yaml"
        ):
            load_result(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = complete(tmp_path)
    before = (directory.path / "summary.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        directory.write_summary({"steps": 41})
    assert (directory.path / "summary.json").read_bytes() == before
    assert not [path for path in directory.path.iterdir() if path.name.startswith(".")]


def test_new_directories_get_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [RunDirectory.create(None).path for _ in range(3)]
    assert len(set(made)) == 3
    assert all(path.is_dir() and path.parent == Path("runs") for path in made)
    nested = RunDirectory.create("a/b/c")
    assert nested.path.is_dir()
    assert RunDirectory.create("a/b/c") == nested  # still empty


def test_refused_run_directories(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.txt").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"run_dir must be a directory, got the file .*file; choose another path"
    ):
        RunDirectory.create(tmp_path / "file")
    with pytest.raises(
        ValueError, match=r"run_dir must be empty or new, got .*full, which holds results\.txt; choose"
    ):
        RunDirectory.create(tmp_path / "full")
    with pytest.raises(
        ValueError, match=r"run_dir must be a directory that can be written, got .*\(Not a directory\)"
    ):
        RunDirectory.create(tmp_path / "file" / "run")


def test_unwritable_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # tests may run as root, whom no mode stops, so the system's answer is given here
    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(
        ValueError, match=r"can be written, got .* \(Permission denied\); choose another path"
    ):
        RunDirectory.create(tmp_path)


def test_result_without_a_directory() -> None:
    result = Result(None, {}, MATRIX, {"average_accuracy": None, "bwt": 0.25})
    assert math.isnan(result.average_accuracy)
    assert math.isnan(result.forgetting)
    assert result.bwt == 0.25


def test_peak_memory_is_a_process_s_own() -> None:
    # 200 MB more than before is seen, and a child does not start at its parent's peak
    before = peak_memory_bytes()
    block = np.ones(25_000_000)
    after = peak_memory_bytes()
    assert before is not None
    assert after is not None
    assert after >= block.nbytes
    code = "from sequel_core.results import peak_memory_bytes; print(peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(child.stdout) < block.nbytes


def test_versions_name_only_what_is_loaded() -> None:
    code = "import json, sequel_core.results as r; print(json.dumps(r.versions()))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(child.stdout)
    assert set(found) == {"python", "numpy", "sequel-cl"}
    assert found["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions()["sequel-cl"] == metadata.version("sequel-cl")
