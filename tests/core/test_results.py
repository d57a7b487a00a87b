import json
import math
import os
import platform
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml

from sequel_core.runs import metrics
from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.files import read_json, read_yaml
from sequel_core.runs.memory import peak_memory_bytes
from sequel_core.runs.results import Result, load_result, load_weights, read_metrics
from sequel_core.runs.versions import loaded_versions

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
    directory.write_summary({"status": "done", **metrics.summarise(MATRIX, samples=[30, 10]), "steps": 40})
    directory.write_weights({"dense_0/kernel": np.eye(2), "dense_0/bias": np.array([1, 2], np.float32)})
    return directory


def test_round_trip(tmp_path: Path) -> None:
    directory = complete(tmp_path)
    result = load_result(directory.path)
    assert result.run_dir == directory.path
    assert result.config == CONFIG
    np.testing.assert_array_equal(result.matrix, MATRIX)  # every bit; nan stays nan
    assert result.matrix.dtype == np.float64
    assert result.summary["steps"] == 40
    assert result.average_accuracy == (0.1 + 2 / 3) / 2
    assert result.forgetting == result.forgetting_with_final == 1 / 3 - 0.1
    assert result.bwt == 0.1 - 1 / 3
    assert result.learning_accuracy == pytest.approx(0.5)
    assert result.average_incremental_accuracy == pytest.approx((1 / 3 + (0.1 + 2 / 3) / 2) / 2)
    pooled = (1 / 3 + (0.1 * 30 + 2 / 3 * 10) / 40) / 2
    assert result.average_incremental_accuracy_over_samples == pytest.approx(pooled)
    assert result.worst_case_accuracy == pytest.approx((0.1 + 2 / 3) / 2)
    assert math.isnan(result.fwt)
    weights = load_weights(directory.path)
    assert set(weights) == {"dense_0/kernel", "dense_0/bias"}
    np.testing.assert_array_equal(weights["dense_0/kernel"], np.eye(2))
    assert weights["dense_0/bias"].dtype == np.float32
    assert not [
        path for path in directory.path.iterdir() if path.name.startswith(".")
    ]  # no temporary file is left


def test_files_are_plain(tmp_path: Path) -> None:
    path = complete(tmp_path).path
    assert yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) == CONFIG
    assert (path / "accuracy_matrix.csv").read_text() == (
        "task_0,task_1\n0.3333333333333333,\n0.1,0.6666666666666666\n"
    )

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads((path / "summary.json").read_text(), parse_constant=reject)
    assert summary["fwt"] is None


def test_one_task_that_was_not_evaluated(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    directory.write_config({})
    directory.write_matrix(np.array([[math.nan]]))
    assert np.isnan(load_result(tmp_path).matrix).tolist() == [[True]]


def test_numpy_values_and_paths_become_plain(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    directory.write_config(
        {"a": np.float64(0.5), "b": (1, np.int64(2)), "c": Path("x/y"), "d": np.arange(2), "e": None}
    )
    assert load_result(tmp_path).config == {"a": 0.5, "b": [1, 2], "c": "x/y", "d": [0, 1], "e": None}
    for write in (directory.write_config, directory.append_metrics, directory.write_summary):
        with pytest.raises(ValueError, match=r"\.model\.net must be a plain value .*, got <object"):
            write({"model": {"net": object()}})


def test_metrics_are_written_at_once(tmp_path: Path) -> None:
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
        ("summary.json", "[" * 100_000, r"summary\.json is damaged: it is nested too deeply"),
        ("summary.json", '{"a":' * 60 + "1" + "}" * 60, r"json is damaged: it is nested more than 50 deep"),
        ("config.yaml", "[" * 10_000, r"config\.yaml is damaged: it is nested too deeply"),
        ("config.yaml", "a: &a [*a]", r"config\.yaml is damaged: it is nested more than 50 deep"),
        ("config.yaml", "a: !!int ''", r"config\.yaml is damaged: string index out of range"),
        ("config.yaml", "a: !!python/object/apply:os.abort []", r"yaml is damaged: could not determine"),
        ("accuracy_matrix.csv", f"task_0\n{'1' * 200_000}\n", r"matrix\.csv is damaged: field larger than"),
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


def test_new_directories_get_different_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [RunDirectory.create(None).path for _ in range(3)]
    assert len(set(made)) == 3
    assert all(path.is_dir() and path.parent == Path("runs") for path in made)
    nested = RunDirectory.create("a/b/c")
    assert nested.path.is_dir()
    assert RunDirectory.create("a/b/c") == nested  # still empty


def test_run_directories_that_raise(tmp_path: Path) -> None:
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
    # tests may run as root, for whom permissions do not matter, so the error is simulated
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


def test_peak_memory_is_per_process() -> None:
    # 200 MB more are measured, and a child process does not start at its parent's peak
    before = peak_memory_bytes()
    block = np.ones(25_000_000)
    after = peak_memory_bytes()
    assert before is not None
    assert after is not None
    assert after >= block.nbytes
    code = "from sequel_core.runs.memory import peak_memory_bytes; print(peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(child.stdout) < block.nbytes


def test_versions_of_loaded_libraries_only() -> None:
    code = "import json, sequel_core.runs.versions as v; print(json.dumps(v.loaded_versions()))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    recorded = json.loads(child.stdout)
    assert set(recorded) == {"python", "numpy", "sequel-cl"}
    assert recorded["numpy"] == np.__version__
    assert recorded["python"] == ".".join(map(str, sys.version_info[:3]))
    assert loaded_versions()["sequel-cl"] == metadata.version("sequel-cl")


def test_aliases_cannot_make_a_small_file_huge(tmp_path: Path) -> None:
    """Ten levels of ten aliases are 10^10 values, or as many pairs if used as merge keys."""
    file = tmp_path / "a.yaml"
    for first, item in (("{a: 1, b: 2}", "<<: ["), ("[1, 2]", "a: [")):
        lines = [f"l0: &l0 {first}"]
        for k in range(1, 11):
            lines.append(f"l{k}: &l{k} {{{item}{', '.join([f'*l{k - 1}'] * 10)}]}}")
        file.write_text("\n".join(lines))
        with pytest.raises(ValueError, match="it is more than 100000 values"):
            read_yaml(file)
    file.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")  # ordinary use of aliases
    assert read_yaml(file) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


def test_json_of_any_number() -> None:
    many, more = "9" * 299, "9" * 400
    numbers = read_json(f'{{"a": 18446744073709551615, "b": {many}, "c": -{more}, "d": 1e999}}')
    assert numbers == {"a": 2**64 - 1, "b": 10**299 - 1, "c": -math.inf, "d": math.inf}
    assert float(numbers["b"]) == 1e299


def test_metrics_of_another_type_are_nan() -> None:
    result = Result(None, {}, MATRIX, {"average_accuracy": "high", "bwt": [], "fwt": 1})
    assert math.isnan(result.average_accuracy)
    assert math.isnan(result.bwt)
    assert result.fwt == 1.0


def test_a_damaged_line_of_the_metrics_is_named(tmp_path: Path) -> None:
    for line in ("[" * 100_000, "3", "{]", '{"a":' * 60 + "1" + "}" * 60):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
        records = read_metrics(tmp_path)
        assert next(records) == {"step": 1}
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged in line 2: "):
            next(records)


def test_targets_of_symbolic_links_are_not_written(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("years of work")
    directory = RunDirectory.create(tmp_path / "run")
    for name in ("metrics.jsonl", "config.yaml", "accuracy_matrix.csv", "summary.json"):
        (directory.path / name).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        directory.append_metrics({"step": 1})
    with pytest.raises(OSError, match="symbolic link"):
        directory.rewind_metrics(0)
    directory.write_config(CONFIG)
    directory.write_matrix(MATRIX)
    directory.write_summary({"status": "finished"})
    assert load_result(directory.path).config == CONFIG  # the links are replaced
    assert precious.read_text() == "years of work"


def test_opening_the_directory_of_a_run(tmp_path: Path) -> None:
    path = complete(tmp_path).path
    for resume in (True, "auto"):
        assert RunDirectory.open(path, CONFIG, resume).path == path
    with pytest.raises(ValueError, match=r"run_dir must be empty or new, got .*or resume its run"):
        RunDirectory.open(path, CONFIG, False)
    new = tmp_path / "new"
    for path_without_run in (new, tmp_path, None):
        with pytest.raises(ValueError, match="resume needs a run_dir that holds a run, got"):
            RunDirectory.open(path_without_run, CONFIG, True)
    assert not new.exists()
    assert RunDirectory.open(new, CONFIG, "auto").path == new
    assert RunDirectory.open(new, CONFIG, "auto").path == new  # still empty
    with pytest.raises(ValueError, match="run_dir must be empty or new"):
        RunDirectory.open(tmp_path, CONFIG, "auto")


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    directory = complete(tmp_path)
    directory.write_config({**CONFIG, "written_by": metadata.version("sequel-cl")})
    directory.check_config({**CONFIG, "logger": {"csv": {}}, "comment": "another", "checkpoint": {"keep": 1}})
    directory.check_config({**CONFIG, "widths": (256, np.int64(256))})  # as it would be written
    algo = {"name": "ewc", "ewc_lambda": 1e-4, "fisher_samples": None}
    other = {**CONFIG, "algo": algo, "widths": [256], "new": "x"}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        directory.check_config(other)
    assert str(error.value) == (
        f"run_dir holds another run, got {directory.path}: algo.ewc_lambda is 1e-05 there and 0.0001 here; "
        "new is not set there and 'x' here; widths is [256, 256] there and [256] here; resume it with its "
        "own settings, or choose another path"
    )
    (directory.path / "config.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"run/config\.yaml is damaged: it holds no mapping"):
        directory.check_config(CONFIG)


def test_whether_a_run_has_finished(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    assert not directory.finished()
    for status, finished in (("interrupted", False), ("finished", True), (None, False), (["x"], False)):
        directory.write_summary({"status": status})
        assert directory.finished() is finished
    directory.write_summary({})
    assert not directory.finished()
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"summary\.json is damaged: it holds no mapping"):
        directory.finished()


HOLD = """
import sys
from sequel_core.runs.directory import RunDirectory
with RunDirectory.open(sys.argv[1], {}, "auto").locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Lock a directory in another process until its input is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], text=True, **pipes)  # type: ignore[call-overload]
    assert child.stdout.readline() == "held\n"
    return child  # type: ignore[no-any-return]


def test_one_process_writes_into_a_directory(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with hold(tmp_path) as child:
        for _ in range(2):
            with pytest.raises(ValueError) as error, directory.locked():  # noqa: PT011
                raise AssertionError("two writers")
            assert str(error.value) == (
                f"run_dir must not be in use, got {tmp_path}, in which process {child.pid} on "
                f"{platform.node()} runs; wait for its end or choose another path"
            )
        for content in ("{", "[]", '{"host": "a"}', ""):
            (tmp_path / ".lock.json").write_text(content)
            with pytest.raises(ValueError, match="in which another process runs"), directory.locked():
                pass
        child.communicate("")  # it ends
    with directory.locked():
        holder = json.loads((tmp_path / ".lock.json").read_text())
        assert holder == {"host": platform.node(), "process": os.getpid()}
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with hold(tmp_path) as child:
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.json"}
        with RunDirectory(tmp_path).locked():
            assert json.loads((tmp_path / ".lock.json").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_run_that_died_at_its_start_are_ignored(tmp_path: Path) -> None:
    for name in (".lock", ".lock.json", "..lock.json.12", ".config.yaml.7"):
        (tmp_path / name).touch()
    assert RunDirectory.create(tmp_path).path == tmp_path
    (tmp_path / ".lock.old").touch()
    with pytest.raises(ValueError, match=r"must be empty or new, got .*, which holds \.lock\.old; choose"):
        RunDirectory.create(tmp_path)


def test_the_lock_is_released_by_an_error(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for _ in range(2):
        with pytest.raises(OSError, match="full"), directory.locked():  # noqa: PT012
            with pytest.raises(ValueError, match="in use"), RunDirectory(tmp_path).locked():
                pass
            raise OSError("full")
    assert not list(tmp_path.iterdir())
