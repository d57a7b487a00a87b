"""`sequel reproduce`: verdicts, intervals, and which runs are reused; mostly with a NumPy learner."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sequel_core.cli import main
from sequel_core.cli import reproduce as command
from sequel_core.cli.processes import new_directory
from sequel_core.cli.reproduce import (
    fingerprint,
    kept,
    published,
    reproduce,
    verdict,
)
from sequel_core.experiment.compose import compose
from sequel_core.experiment.schema import CLASSES
from sequel_core.hparams import TrainingHParams
from sequel_core.runs import learner
from sequel_core.runs.results import load_result
from sequel_core.runs.statistics import interval
from sequel_core.settings import setting
from tests.cli.conftest import Plugin

EXPERIMENT = "naive_rotateddigits"
SMALL = ["benchmark.num_tasks=2", "benchmark.per_task_rotation=90", "benchmark.subset=200"]
REACHED = [*SMALL, "expected.avg_acc=60", "expected.std=1", "expected.runs=5", "expected.tolerance=40"]
MISSED = [*SMALL, "expected.avg_acc=99", "expected.std=1.5"]
ABOVE = [*SMALL, "expected.avg_acc=1", "expected.std=1", "comment=an easier stream"]


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def row(out: str, mode: str) -> list[str]:
    """Return the cells of the row of a mode in the table."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    return next(cells for cells in lines if cells[:1] == [mode])


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace MNIST with digits in the composed experiments; tests add the expected numbers."""
    overrides = ["benchmark=rotateddigits", *SMALL]
    monkeypatch.setattr(command, "compose", lambda line: compose([*line, *overrides]))
    return overrides


@pytest.mark.parametrize(
    ("mean", "expected", "result"),
    [
        (44.75, (46.25, 1.25, 1.5), "reached"),  # 46.25 - 1.5
        (44.74, (46.25, 1.25, 1.5), "missed"),
        (48.75, (46.25, 1.25, 1.5), "reached"),  # 46.25 + 2 * 1.25
        (48.76, (46.25, 1.25, 1.5), "above"),
        (47.75, (46.25, 0.5, 1.5), "reached"),  # the tolerance is larger than 2 * 0.5
        (47.76, (46.25, 0.5, 1.5), "above"),
        (50.0, (50.0, 0.0, 0.0), "reached"),
        (float("nan"), (46.25, 1.25, 1.5), "missed"),
    ],
)
def test_the_verdict_by_hand(mean: float, expected: tuple[float, float, float], result: str) -> None:
    avg_acc, std, tolerance = expected
    assert verdict(mean, {"avg_acc": avg_acc, "std": std, "tolerance": tolerance}) == result


def test_without_a_tolerance_the_mean_must_reach_the_number() -> None:
    assert verdict(50.0, {"avg_acc": 50, "std": 1}) == "reached"
    assert verdict(49.99, {"avg_acc": 50, "std": 1}) == "missed"


@pytest.mark.parametrize(
    ("values", "t"),
    [([1.0, 2.0], 12.706), ([1.0, 2.0, 3.0], 4.303), ([1.0, 2.0, 3.0, 4.0, 5.0], 2.776)],  # from a t table
)
def test_the_interval_is_students_t(values: list[float], t: float) -> None:
    bounds = interval(values)
    assert bounds is not None
    n, mean = len(values), sum(values) / len(values)
    half = t * (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    assert bounds == pytest.approx((mean - half, mean + half), abs=2e-3)


def test_one_seed_has_no_interval() -> None:
    assert interval([1.0]) is None


@pytest.mark.parametrize("name", published())
def test_a_published_experiment_has_all_fields_that_are_printed(name: str) -> None:
    config = compose([f"+experiment={name}"]).config
    assert {"avg_acc", "std", "runs", "tolerance"} <= config.expected.keys()
    assert config.source
    assert config.comment


def test_numbers_of_the_mcsgd_paper() -> None:
    expected = {name: (e["avg_acc"], e["std"], e["runs"], e["tolerance"]) for name, e in published().items()}
    assert expected["naive_rotatedmnist"] == (46.3, 1.37, 5, 1.5)
    assert expected["ewc_rotatedmnist"] == (48.5, 1.24, 5, 1.5)
    assert expected["er_rotatedmnist"] == (69.2, 1.10, 5, 1.5)
    assert expected["stable_sgd_rotatedmnist"] == (70.8, 0.78, 5, 1.5)


def test_both_frameworks_reach_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*REACHED, "training.epochs_per_task=1", "optimizer.lr=0.1"]
    assert reproduce(EXPERIMENT, ["pytorch", "jax"], 2, tmp_path, overrides) == 0
    out = capsys.readouterr().out
    accuracies: dict[str, list[float]] = {}
    for mode in ("pytorch", "jax"):
        paths = sorted((tmp_path / EXPERIMENT).glob(f"{mode}_seed?_????????"))
        results = [load_result(path) for path in paths]
        assert [(r.config["mode"], r.config["training"]["seed"]) for r in results] == [(mode, 0), (mode, 1)]
        accuracies[mode] = [100 * result.average_accuracy for result in results]
        mean, half = np.mean(accuracies[mode]), 12.706 * abs(np.diff(accuracies[mode])[0]) / 2
        assert half > 0
        cells = row(out, mode)
        assert cells[:3] == [mode, "0, 1", f"{mean:.2f}"]
        low, high = map(float, cells[3].split(" to "))
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01 + 1e-4 * half)
        forgetting = 100 * np.mean([result.forgetting for result in results])
        assert cells[4:] == [f"{forgetting:.2f}", "60", "40", "reached"]
    assert accuracies["pytorch"] == pytest.approx(accuracies["jax"], abs=2)
    assert len(list((tmp_path / EXPERIMENT).iterdir())) == 4


def test_a_finished_run_is_reused(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = partial(reproduce, EXPERIMENT, ["jax"], results=tmp_path / "kept")
    assert again(seeds=1, overrides=REACHED) == 0
    (path,) = (tmp_path / "kept" / EXPERIMENT).iterdir()
    before = snapshot(path)
    first = row(capsys.readouterr().out, "jax")
    assert first[3] == "-"
    assert again(seeds=1, overrides=REACHED) == 0
    out = capsys.readouterr().out
    assert f"jax, seed 0: reused from {path}\n" in out
    assert row(out, "jax") == first
    assert len(numpy_plugin.built) == 1
    assert snapshot(path) == before
    assert again(seeds=3, overrides=REACHED) == 0
    assert [config.training.seed for config in numpy_plugin.built] == [0, 1, 2]
    # Another expected number does not change the run, another learning rate does.
    assert again(seeds=1, overrides=[*MISSED, "source=another paper"]) == 1
    assert len(numpy_plugin.built) == 3
    assert again(seeds=1, overrides=[*REACHED, "optimizer.lr=0.5"]) == 0
    assert len(numpy_plugin.built) == 4
    assert snapshot(path) == before


def test_reused_runs_need_no_framework_and_no_data(
    numpy_plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reproduce(EXPERIMENT, ["jax"], 1, tmp_path, REACHED) == 0

    def missing(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(learner, "plugin", missing)
    monkeypatch.setattr(command, "build_benchmark", missing)
    assert reproduce(EXPERIMENT, ["jax"], 1, tmp_path, REACHED) == 0


@pytest.mark.parametrize("damage", ["no summary", "broken summary", "failed", "empty"])
def test_an_unfinished_run_is_kept_and_repeated_elsewhere(
    damage: str, numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(EXPERIMENT, ["jax"], 1, tmp_path, REACHED) == 0
    (path,) = (tmp_path / EXPERIMENT).iterdir()
    summary = path / "summary.json"
    if damage == "no summary":
        summary.unlink()
    elif damage == "broken summary":
        summary.write_text("{")
    elif damage == "failed":
        summary.write_text(summary.read_text().replace('"finished"', '"failed"'))
    else:
        shutil.rmtree(path)
        path.mkdir()
    before = snapshot(path)
    assert reproduce(EXPERIMENT, ["jax"], 1, tmp_path, REACHED) == 0
    assert snapshot(path) == before
    again = path.with_name(f"{path.name}_1")
    assert {*(tmp_path / EXPERIMENT).iterdir()} == {path, again}
    assert load_result(again).summary["status"] == "finished"
    capsys.readouterr()
    assert reproduce(EXPERIMENT, ["jax"], 1, tmp_path, REACHED) == 0
    assert f"reused from {again}\n" in capsys.readouterr().out
    assert len(numpy_plugin.built) == 2


def test_concurrent_processes_use_different_directories(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: new_directory(tmp_path / "a" / "b", "run"), range(16)))
    assert {path.name for path in paths} == {"run", *(f"run_{k}" for k in range(1, 16))}
    assert kept(tmp_path / "a" / "b", "run") is None


def test_the_table_shows_a_diverged_run_and_the_others_continue(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = numpy_plugin.build_learner

    def first_diverges_second_fails(config: Any, benchmark: Any, run_dir: Path, callbacks: Any) -> Any:
        if config.training.seed == 1:
            raise OSError("no space")
        model = build(config, benchmark, run_dir)
        if config.training.seed == 0:
            model.config = compose(["optimizer.lr=100"]).config
        return model

    monkeypatch.setattr(numpy_plugin, "build_learner", first_diverges_second_fails)
    assert reproduce(EXPERIMENT, ["jax"], 3, tmp_path, REACHED) == 1
    captured = capsys.readouterr()
    cells = row(captured.out, "jax")
    assert (cells[1], cells[3], cells[-1]) == ("2", "-", "seed 0 diverged, seed 1 failed")
    first, second = captured.err.splitlines()
    assert "no longer finite at task 0" in first
    assert second.endswith("failed: no space")
    (failed,) = (tmp_path / EXPERIMENT).glob("jax_seed1_*")
    assert (failed / "error.txt").read_text() == "no space\n"


def test_no_run_finished(numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(EXPERIMENT, ["jax"], 1, tmp_path, [*REACHED, "optimizer.lr=100"]) == 1
    assert row(capsys.readouterr().out, "jax") == ["jax", *"----", "60", "40", "seed 0 diverged"]


def test_the_command_line(
    numpy_plugin: Plugin, tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small += [text for text in REACHED if text.startswith("expected.")]
    assert main(["reproduce", "naive", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "naive_rotatedmnist, compared with: MC-SGD paper" in out
    assert "expected average accuracy: 60 % (std 1, 5 runs), reached if at least 20 %" in out
    assert out.count("average accuracy: measured") == 4
    assert [(config.mode, config.training.seed) for config in numpy_plugin.built] == [
        ("pytorch", 0), ("pytorch", 1), ("jax", 0), ("jax", 1),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"reproduced"}
    line = ["reproduce", "naive_rotatedmnist", "--mode", "flax", "--seeds", "1", "--results", "else where"]
    assert main(line) == 0
    assert "pytorch" not in capsys.readouterr().out
    (path,) = (tmp_path / "else where" / "naive_rotatedmnist").iterdir()
    assert path.name.startswith("jax_seed0_")


def test_missed_and_above(numpy_plugin: Plugin, small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = ["reproduce", "naive", "--mode", "jax", "--seeds", "2"]
    stream = list(small)
    small += [text for text in MISSED if text.startswith("expected.")]
    assert main(line) == 1
    out = capsys.readouterr().out
    assert row(out, "jax")[5:] == ["99", "0", "missed"]
    assert "above the published number" not in out
    small[:] = [*stream, *ABOVE]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert row(out, "jax")[5:] == ["1", "0", "above"]
    assert "above the published number in jax: an easier stream\n" in out
    assert len(numpy_plugin.built) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "NAME must be one of "),
        (["naiv"], "did you mean naive?\n"),
        (["ewc_rotatedmnst"], "did you mean ewc_rotatedmnist?\n"),
        ([EXPERIMENT], "NAME must be one of "),
        (
            ["naive", "--mode", "jx"],
            "--mode must be one of pytorch, jax, both, got 'jx'; did you mean jax?\n",
        ),
        (["naive", "--seeds", "0"], "seeds must be >= 1, got 0\n"),
        (
            ["naive", "--seeds", "a"],
            "argument --seeds: invalid int value: 'a'; see sequel reproduce --help\n",
        ),
        (
            ["naive", "optimizer.lr=1"],
            "unrecognized arguments: optimizer.lr=1; see sequel reproduce --help\n",
        ),
        (
            ["naive", "--results", "file"],
            "results must be a directory, got the file file; choose another path\n",
        ),
        (
            ["naive", "--mode", "jax", "--data-dir", "it's/nowhere"],
            "MNIST is not in the data directory it's/now",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    line: list[str],
    message: str,
    numpy_plugin: Plugin,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("pooch.retrieve", no_network)
    (tmp_path / "file").touch()
    assert main(["reproduce", *line]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert numpy_plugin.built == []
    assert not (tmp_path / "reproduced").exists()


def test_an_experiment_without_a_spread_raises(numpy_plugin: Plugin, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experiment must have expected\.avg_acc and expected\.std, got "):
        reproduce(EXPERIMENT, ["jax"], 1, tmp_path, SMALL)
    assert numpy_plugin.built == []


def test_help_lists_the_experiments_with_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: sequel reproduce")
    lines = [line.split() for line in out.splitlines()]
    assert ["naive_rotatedmnist", "46.3", "%", "(std", "1.37,", "5", "runs)"] in lines
    assert all(any(line[:1] == [name] for line in lines) for name in published())


def test_which_settings_change_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*overrides: str) -> str:
        return fingerprint(compose(["+experiment=naive_rotatedmnist", *overrides]).config)

    first = of()
    assert len(first) == 8
    assert of("benchmark.data_dir=/a", "expected.tolerance=9", "source=b", "comment=c") == first
    others = {of(text) for text in ("mode=jax", "seed=1", "optimizer.lr=0.02", "benchmark.seed=1")}
    assert len({first, *others}) == 5
    monkeypatch.setattr(metadata, "version", lambda _: "99")
    assert of() != first


def test_a_new_setting_keeps_the_fingerprint_of_finished_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class LaterHParams(TrainingHParams):
        warm_up: int = setting(0, "number of steps before training")

    def of(*overrides: str) -> str:
        return fingerprint(compose(["+experiment=naive_rotatedmnist", *overrides]).config)

    before = of()
    monkeypatch.setitem(CLASSES, "training", LaterHParams)
    assert of() == of("training.warm_up=0") == before
    assert of("training.warm_up=1") != before


def test_a_run_prints_the_number_with_its_spread(
    numpy_plugin: Plugin, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["run", *SMALL, "expected.avg_acc=46.3", "expected.forgetting=0.5", "run_dir=out"]
    assert main([*line, "expected.std=1.37", "expected.runs=5", "expected.tolerance=1.5"]) == 0
    result = load_result("out")
    *_, accuracy, forgetting = capsys.readouterr().out.splitlines()
    measured = f"{100 * result.average_accuracy:.2f}"
    assert accuracy == f"average accuracy: measured {measured} %, expected 46.3 % (std 1.37, 5 runs)"
    assert forgetting == f"forgetting: measured {result.forgetting}, expected 0.5"


@pytest.mark.parametrize("key", ["std", "runs", "tolerance"])
@pytest.mark.parametrize("value", ["-1", "a", "true", "null", "nan"])
def test_a_spread_is_a_number(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^expected\.{key} must be .*, got "):
        compose([f"expected.{key}={value}"])
