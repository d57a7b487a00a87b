"""`compare`: numbers against NumPy and SciPy from the run directories; labels, failures, bad input."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from sequel_benchmarks import RotatedDigits
from sequel_core import Benchmark, Comparison, compare, load_result, report
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.experiment.compose import compose
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.runs import learner
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.compare import Difference, Row
from sequel_core.runs.learner import PLUGINS, Learner, Mode
from sequel_core.runs.signals import InterruptedRunError
from tests.core.scripted import STEPS, ScriptedPlugin, scripted

MODES: tuple[Mode, ...] = ("pytorch", "jax")
SMALL = ["benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.subset=100"]


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Path], Path]]:
    """Keep what reports are asked for, in place of writing them, which takes seconds."""
    asked: list[tuple[list[Path], Path]] = []
    monkeypatch.setattr(
        report, "write_report", lambda directories, path, **_: asked.append((directories, path))
    )
    return asked


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest) -> None:
    if "report" not in request.node.name:
        request.getfixturevalue("reported")


@pytest.fixture(scope="module")
def digits() -> Benchmark:
    return RotatedDigits(num_tasks=3, subset=60)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ScriptedPlugin:
    made = ScriptedPlugin()
    monkeypatch.setattr(learner, "plugin", lambda mode: made)
    monkeypatch.chdir(tmp_path)
    return made


def four_learners(digits: Benchmark, seeds: int = 1) -> list[Learner]:
    hparams = (NaiveHParams(), EWCHParams())
    return [scripted(m, h, digits, s) for h in hparams for s in range(seeds) for m in MODES]


def row(comparison: Comparison, label: str, mode: Mode) -> Row:
    return next(row for row in comparison.rows if (row.label, row.mode) == (label, mode))


def matrix(path: Path) -> np.ndarray[Any, Any]:
    """Read an accuracy matrix with NumPy alone."""
    return np.genfromtxt(path / "accuracy_matrix.csv", delimiter=",", skip_header=1)


def test_the_rows_are_means_with_students_intervals(digits: Benchmark, tmp_path: Path) -> None:
    comparison = compare(four_learners(digits, seeds=3), digits, run_dir=tmp_path / "all", progress=False)
    assert [(row.label, row.mode) for row in comparison.rows] == [
        ("naive", "pytorch"), ("naive", "jax"), ("ewc", "pytorch"), ("ewc", "jax"),
    ]  # fmt: skip
    for label, mode in ((label, mode) for label in ("naive", "ewc") for mode in MODES):
        paths = [tmp_path / "all" / f"{label}_{mode}_seed{seed}" for seed in range(3)]
        r = np.array([matrix(path) for path in paths])
        summaries = [json.loads((path / "summary.json").read_text()) for path in paths]
        best = r[:, :2].copy()
        best[:, 0, 1] = -np.inf  # not yet evaluated
        values = {
            "average_accuracy": r[:, 2].mean(1),
            "forgetting": (best[:, :, :2].max(1) - r[:, 2, :2]).mean(1),
            "learning_accuracy": np.diagonal(r, axis1=1, axis2=2).mean(1),
            "seconds": np.array([summary["seconds"]["total"] for summary in summaries]),
            "steps_per_second": np.array([3 * STEPS / summary["seconds"]["train"] for summary in summaries]),
            "memory_bytes": np.array([1000.0, 1001.0, 1002.0]),
        }
        given = row(comparison, label, mode)
        assert (given.seeds, given.failed) == ((0, 1, 2), ())
        assert given.measures.keys() == values.keys()
        for name, numbers in values.items():
            low, high = scipy.stats.t.interval(0.95, 2, numbers.mean(), scipy.stats.sem(numbers))
            assert given.measures[name].mean == pytest.approx(numbers.mean(), rel=1e-12)
            assert given.measures[name].half == pytest.approx((high - low) / 2, rel=1e-9)


def test_labels_are_compared_by_seed_within_a_framework(digits: Benchmark, tmp_path: Path) -> None:
    comparison = compare(four_learners(digits, seeds=3), digits, run_dir=tmp_path, progress=False)
    assert list(comparison.tests) == list(MODES)
    for mode in MODES:
        [test] = comparison.tests[mode]
        naive, ewc = (
            [matrix(tmp_path / f"{label}_{mode}_seed{seed}")[2].mean() for seed in range(3)]
            for label in ("naive", "ewc")
        )
        assert (test.first, test.second, test.num_pairs) == ("naive", "ewc", 3)
        assert test.difference == pytest.approx(np.mean(naive) - np.mean(ewc), rel=1e-9)
        assert test.student == pytest.approx(scipy.stats.ttest_rel(naive, ewc).pvalue, rel=1e-6)
        assert test.permutation >= 2 / 2**3
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(comparison)
    text = console.export_text()
    assert "pytorch: " in text
    assert "3 paired seeds" in text
    assert "not significant: at least 6 paired seeds are needed." in text


def test_the_differences_are_numpys(digits: Benchmark, tmp_path: Path) -> None:
    comparison = compare(four_learners(digits, seeds=2), digits, run_dir=tmp_path, progress=False)
    assert [(one.label, one.seed) for one in comparison.differences] == [
        ("naive", 0), ("naive", 1), ("ewc", 0), ("ewc", 1),
    ]  # fmt: skip
    for one in comparison.differences:
        first, second = (tmp_path / f"{one.label}_{mode}_seed{one.seed}" for mode in MODES)
        gap = np.abs(matrix(first) - matrix(second))
        assert one.score == np.nanmax(gap) > 0
        assert gap[one.score_at] == one.score
        with np.load(first / "weights.npz") as a, np.load(second / "weights.npz") as b:
            gaps = {name: np.abs(a[name] - b[name]) for name in a.files}
        assert one.weight == max(gap.max() for gap in gaps.values())
        name, _, place = one.weight_at.rstrip("]").partition("[")
        assert gaps[name][tuple(map(int, place.split(", ")))] == one.weight


def test_both_frameworks_are_equal_in_double_precision_and_the_report_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The real thing, from overrides alone; without progress neither framework says a word."""
    training = [
        "training.dtype=float64",
        "optimizer.lr=0.1",
        "backbone.widths=[32]",
        "training.epochs_per_task=2",
    ]
    comparison = compare(["algo=naive", *SMALL, *training], run_dir=tmp_path, progress=False)
    assert [(run.label, run.mode, run.seed) for run in comparison.runs] == [
        ("naive", "pytorch", 0), ("naive", "jax", 0),
    ]  # fmt: skip
    (one,) = comparison.differences
    assert (one.score, one.score_at) == (0, ())
    assert 0 < one.weight < 1e-10
    first, second = (tmp_path / f"naive_{mode}_seed0" for mode in MODES)
    np.testing.assert_array_equal(matrix(first), matrix(second))
    assert matrix(first)[0, 0] > 0.3  # one in ten by chance
    with np.load(first / "weights.npz") as a, np.load(second / "weights.npz") as b:
        assert a["head/kernel"].dtype == np.float64
        assert one.weight == max(np.abs(a[name] - b[name]).max() for name in a.files)
    assert (capsys.readouterr(), caplog.messages) == (("", ""), [])
    assert comparison.report == tmp_path / "report.html"
    text = comparison.report.read_text()
    assert "PyTorch" in text
    assert "JAX" in text


@pytest.mark.slow
def test_runs_in_jax_at_once_end_like_single_runs(tmp_path: Path) -> None:
    """From configurations and from learners; PyTorch runs one after another."""

    def learners() -> dict[str, list[Learner]]:
        jax = learner.plugin("jax")
        stream, sgd = RotatedDigits(num_tasks=2, subset=100), OptimizerHParams()
        hparams = {"naive": NaiveHParams(), "ewc": EWCHParams()}
        return {
            name: [
                jax.make_learner(h, jax.MLP((8,), 10), sgd, stream, TrainingHParams(seed=k)) for k in (0, 1)
            ]
            for name, h in hparams.items()
        }

    small: Any = [*SMALL, "algo=naive,ewc", "seed=0,1", "backbone.widths=[8]"]
    stream = RotatedDigits(num_tasks=2, subset=100)
    for name, runs, benchmark in (("config", [small] * 2, None), ("made", [learners(), learners()], stream)):
        alone, at_once = (
            compare(given, benchmark, run_dir=tmp_path / f"{name}{flag}", progress=False, together=flag)
            for given, flag in zip(runs, (False, True), strict=True)
        )
        assert {run[:3] for run in alone.runs} == {run[:3] for run in at_once.runs}
        by_name = {run[:3]: run.directory for run in alone.runs}
        for run in at_once.runs:
            assert run.result is not None
            assert (run.directory / "together.json").is_file() == (run.mode == "jax")
            with np.load(run.directory / "weights.npz") as a, np.load(by_name[run[:3]] / "weights.npz") as b:
                assert max(np.abs(a[name] - b[name]).max() for name in a.files) < 1e-4
        assert [row.seeds for row in at_once.rows] == [(0, 1)] * len(alone.rows)
        if benchmark is None:
            check_at_once_again(small, at_once)


def check_at_once_again(overrides: Any, first: Comparison) -> None:
    """Repeat a comparison, of which one run in JAX has no summary and one is gone."""
    directories = {run.directory.name: run.directory for run in first.runs}
    (directories["naive_jax_seed1"] / "summary.json").unlink()
    shutil.rmtree(directories["ewc_jax_seed0"])
    before = files(directories["ewc_jax_seed1"])
    again = compare(overrides, run_dir=first.directory, progress=False, together=True, resume="auto")
    assert files(directories["ewc_jax_seed1"]) == before
    assert [run[:4] for run in again.runs] == [run[:4] for run in first.runs]
    for old, new in zip(first.runs, again.runs, strict=True):
        assert old.result is not None
        assert new.result is not None
        np.testing.assert_allclose(new.result.matrix, old.result.matrix, atol=0.02)  # one of 50 samples


def test_labels_of_ones_own(digits: Benchmark, tmp_path: Path) -> None:
    weak, strong = ([scripted(mode, EWCHParams(ewc_lambda=s), digits) for mode in MODES] for s in (1.0, 50.0))
    alone = scripted("jax", NaiveHParams(), digits)
    runs: dict[str, Any] = {"weak": weak, "lambda 50": strong, "../<x>": alone}
    comparison = compare(runs, digits, run_dir=tmp_path, progress=False)
    assert [(row.label, row.mode) for row in comparison.rows] == [
        ("weak", "pytorch"), ("weak", "jax"), ("lambda 50", "pytorch"), ("lambda 50", "jax"),
        ("../<x>", "jax"),
    ]  # fmt: skip
    assert [run.directory.name for run in comparison.runs] == [
        "weak_pytorch_seed0", "weak_jax_seed0", "lambda-50_pytorch_seed0", "lambda-50_jax_seed0",
        "..-x-_jax_seed0",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {run.directory.name for run in comparison.runs}
    assert [one.label for one in comparison.differences] == ["weak", "lambda 50"]


def test_settings_go_to_every_run(digits: Benchmark, tmp_path: Path) -> None:
    class Counts(StreamCallback):
        def __init__(self) -> None:
            self.tasks: list[int] = []

        def on_task_end(self, learner: Learner, task: Any, matrix: Any) -> None:
            self.tasks.append(task.index)

    counts = Counts()
    learners = [scripted(mode, NaiveHParams(), digits) for mode in MODES]
    comparison = compare(
        learners, digits, run_dir=tmp_path, progress=False, evaluate_future=True, callbacks=[counts]
    )
    assert counts.tasks == [0, 1, 2] * 2
    assert all(run.result is not None and np.isfinite(run.result.fwt) for run in comparison.runs)


def test_overrides_with_commas_mean_every_one(plugin: ScriptedPlugin, tmp_path: Path) -> None:
    comparison = compare([*SMALL, "algo=ewc", "algo.ewc_lambda=1,20", "seed=3"], progress=False)
    assert [(run.label, run.mode, run.seed) for run in comparison.runs] == [
        (f"algo.ewc_lambda={value}", mode, 3) for value in (1, 20) for mode in MODES
    ]
    assert [vars(config.algo)["ewc_lambda"] for config in plugin.built] == [1, 1, 20, 20]
    assert comparison.directory.parent == Path("runs")
    assert load_result(comparison.runs[0].directory).config["algo"]["ewc_lambda"] == 1


def test_one_framework_where_the_overrides_say_so(plugin: ScriptedPlugin, tmp_path: Path) -> None:
    comparison = compare([*SMALL, "algo=naive,ewc", "mode=flax", "run_dir=here"], progress=False)
    assert [(run.label, run.mode) for run in comparison.runs] == [("naive", "jax"), ("ewc", "jax")]
    assert comparison.directory == Path("here")
    assert comparison.differences == ()
    assert compare("algo=naive", run_dir=tmp_path / "there", progress=False).rows[0].label == "naive"


def test_configurations(plugin: ScriptedPlugin, tmp_path: Path) -> None:
    configs = [compose([*SMALL, f"mode={mode}", f"seed={seed}"]).config for mode in MODES for seed in (3, 4)]
    comparison = compare(configs, run_dir=tmp_path, progress=False)
    assert [(row.label, row.mode, row.seeds) for row in comparison.rows] == [
        ("naive", "pytorch", (3, 4)), ("naive", "jax", (3, 4)),
    ]  # fmt: skip
    assert plugin.built == configs


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_repeated_comparison_runs_only_what_is_missing(
    plugin: ScriptedPlugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run is finished, of one only the directory is left, one failed, and one was never started."""
    overrides = ["algo=naive,ewc", "mode=jax", "seed=3,4", *SMALL]
    straight = compare(overrides, run_dir=tmp_path / "straight", progress=False)
    compare(overrides, run_dir=tmp_path / "all", progress=False)
    for name in ("naive_jax_seed4", "ewc_jax_seed3", "ewc_jax_seed4"):
        shutil.rmtree(tmp_path / "all" / name)
    (tmp_path / "all" / "naive_jax_seed4").mkdir()
    (tmp_path / "all" / "ewc_jax_seed3").mkdir()
    (tmp_path / "all" / "ewc_jax_seed3" / "error.txt").write_text("no space\n")
    before = files(tmp_path / "all" / "naive_jax_seed3")
    plugin.built.clear()

    again = compare(overrides, run_dir=tmp_path / "all", resume="auto")
    assert [(config.algo.name, config.training.seed) for config in plugin.built] == [
        ("naive", 4), ("ewc", 3), ("ewc", 4),
    ]  # fmt: skip
    assert (
        f"naive, jax, seed 3: reused from {tmp_path / 'all' / 'naive_jax_seed3'}" in capsys.readouterr().out
    )
    assert files(tmp_path / "all" / "naive_jax_seed3") == before
    assert not (tmp_path / "all" / "ewc_jax_seed3" / "error.txt").exists()
    for name in ("average_accuracy", "forgetting", "learning_accuracy", "memory_bytes"):
        assert [row.measures[name] for row in again.rows] == [row.measures[name] for row in straight.rows]
    assert again.tests == straight.tests

    plugin.built.clear()
    more = compare([*overrides[1:], "algo=er,ewc", "seed=4,5"], run_dir=tmp_path / "all", resume="auto")
    assert [(config.algo.name, config.training.seed) for config in plugin.built] == [
        ("er", 4), ("er", 5), ("ewc", 5),
    ]  # fmt: skip
    assert [(row.label, row.seeds) for row in more.rows] == [("er", (4, 5)), ("ewc", (4, 5))]


def test_a_repeated_comparison_with_other_settings_keeps_the_first_runs(
    plugin: ScriptedPlugin, tmp_path: Path
) -> None:
    overrides = ["algo=ewc", "mode=jax", *SMALL]

    def compared(strength: str) -> list[str]:
        chosen = [*overrides, f"algo.ewc_lambda={strength}"]
        comparison = compare(chosen, run_dir=tmp_path / "all", resume="auto", progress=False)
        return [run.directory.name for run in comparison.runs]

    assert compared("1") == ["ewc_jax_seed0"]
    first = files(tmp_path / "all" / "ewc_jax_seed0")
    assert compared("2") == ["ewc_jax_seed0_1"]
    assert compared("1,2,3") == ["ewc_jax_seed0", "ewc_jax_seed0_1", "algo.ewc_lambda=3_jax_seed0"]
    assert [vars(config.algo)["ewc_lambda"] for config in plugin.built] == [1, 2, 3]
    assert files(tmp_path / "all" / "ewc_jax_seed0") == first


def test_an_interrupted_comparison_says_how_to_go_on(
    digits: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From learners; the run that was not interrupted is read."""
    learners = four_learners(digits)

    def interrupt(*_: Any) -> None:
        raise InterruptedRunError(signal.SIGTERM)

    monkeypatch.setattr(learners[1], "fit_task", interrupt)
    place = re.escape(str(tmp_path / "the runs"))
    message = rf"^ended by SIGTERM; to go on: repeat it with 'run_dir={place}' resume=auto$"
    with pytest.raises(InterruptedRunError, match=message):
        compare(learners, digits, run_dir=tmp_path / "the runs", progress=False)
    before = files(tmp_path / "the runs" / "naive_pytorch_seed0")
    learners = four_learners(digits)
    monkeypatch.setattr(learners[0], "restore", lambda path: None)
    comparison = compare(learners, digits, run_dir=tmp_path / "the runs", progress=False, resume="auto")
    assert [run.result is None for run in comparison.runs] == [False] * 4
    assert files(tmp_path / "the runs" / "naive_pytorch_seed0") == before
    assert learners[0].step == 0


def test_a_run_that_fails_is_told_and_the_others_go_on(
    digits: Benchmark,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reported: list[tuple[list[Path], Path]],
) -> None:
    strong = EWCHParams(ewc_lambda=5000)
    learners = {
        "naive": [scripted(mode, NaiveHParams(), digits, seed) for seed in (13, 0) for mode in MODES],
        "strong": [scripted(mode, strong, digits) for mode in MODES],
    }
    comparison = compare(learners, digits, run_dir=tmp_path, progress=False)
    assert [run.result is None for run in comparison.runs] == [True, True, False, False, True, True]
    assert [(row.seeds, row.failed) for row in comparison.rows] == [((0,), (13,))] * 2 + [((), (0,))] * 2
    assert row(comparison, "strong", "jax").measures == {}
    assert [(one.label, one.seed) for one in comparison.differences] == [("naive", 0)]
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second, *_ = captured.err.splitlines()
    assert first == "sequel: run naive_pytorch_seed13 failed: no space"
    assert second == "sequel: run naive_jax_seed13 failed: no space"
    assert (tmp_path / "naive_pytorch_seed13" / "error.txt").read_text() == "no space\n"
    assert load_result(tmp_path / "strong_jax_seed0").summary["status"] == "diverged"
    assert reported == [([run.directory for run in comparison.runs], tmp_path / "report.html")]


def test_no_report_where_no_learner_could_be_built(
    plugin: ScriptedPlugin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(plugin, "build_learner", broken)
    comparison = compare([*SMALL, "mode=jax"], run_dir=tmp_path / "all")
    assert comparison.report is None
    assert "Traceback" in (tmp_path / "all" / "naive_jax_seed0" / "error.txt").read_text()
    captured = capsys.readouterr()
    assert captured.err == "sequel: run naive_jax_seed0 failed: a bug\n"
    assert "│naive│jax │-; failed: 0│" in captured.out


def test_an_interruption_ends_all(
    digits: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learners = four_learners(digits)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learners[1], "fit_task", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(learners, digits, run_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"naive_pytorch_seed0", "naive_jax_seed0"}
    assert capsys.readouterr().out.endswith(f"to go on: repeat it with run_dir={tmp_path} resume=auto\n")


def test_what_is_printed(
    digits: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    comparison = compare(four_learners(digits), digits, run_dir=tmp_path / "a b")
    lines = capsys.readouterr().out.splitlines()
    path = tmp_path / "a b" / "naive_pytorch_seed0"
    accuracy = 100 * matrix(path)[2].mean()
    assert lines[0] == f"naive, pytorch, seed 0: running in {path}"
    assert lines[1].startswith(f"naive, pytorch, seed 0: average accuracy {accuracy:.2f} %, ")
    assert lines[-1] == f"report: {tmp_path / 'a b' / 'report.html'}"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    first, *_, last = cells
    assert first[:4] == ["naive", "pytorch", "0", f"{accuracy:.2f}"]
    assert first[-1] == "1.0 kB"
    one = comparison.differences[-1]
    assert last[:3] == ["ewc", "0", f"{100 * one.score:.2f}"]
    assert last[3:] == [f"R[{one.score_at[0]}, {one.score_at[1]}]", f"{one.weight:.1e}", one.weight_at]
    assert all(len(line) <= 80 for line in lines if line.startswith(("│", "┏", "└")))


def test_networks_that_are_not_alike_have_no_difference(
    digits: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learners = [scripted(mode, NaiveHParams(), digits) for mode in MODES]
    monkeypatch.setattr(learners[1], "weights", lambda: {"b/kernel": np.zeros((3, 4))})
    (one,) = compare(learners, digits, run_dir=tmp_path, progress=False).differences
    assert np.isnan(one.weight)
    assert one.weight_at == ""
    assert one.score > 0


def test_a_nan_among_the_weights_is_the_largest_difference(
    digits: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learners = [scripted(mode, NaiveHParams(), digits) for mode in MODES]
    weights = {"a": np.array([1e9, 0.0]), "b": np.array([[0.0, np.nan]])}
    monkeypatch.setattr(
        learners[0], "weights", lambda: {name: np.zeros_like(w) for name, w in weights.items()}
    )
    monkeypatch.setattr(learners[1], "weights", lambda: weights)
    (one,) = compare(learners, digits, run_dir=tmp_path, progress=False).differences
    assert np.isnan(one.weight)
    assert one.weight_at == "b[0, 1]"


def test_the_parts_are_importable() -> None:
    assert {"label", "seed", "score", "weight"} <= set(Difference._fields)
    assert tuple(PLUGINS) == MODES


@pytest.mark.parametrize(
    ("runs", "settings", "message"),
    [
        ([], {}, "runs must hold at least one experiment, got none"),
        ({}, {}, "runs must hold at least one experiment, got none"),
        (["algo=naive", "seed=1,1"], {}, "runs must differ in algorithm, framework or seed, got naive, "
         "pytorch, seed 1 twice; give a mapping from labels"),
        (["algo=naive,ewcc"], {}, "algo must be one of .* did you mean ewc"),
        (["algo=ewc", "algo.ewc_lamda=1,2"], {}, "algo.ewc_lamda is not a setting of ewc; did you mean "),
        (["algo=ewc", "algo.ewc_lambda=1,-1"], {}, "algo.ewc_lambda must be >= 0, got -1"),
        (["benchmark.batch_size=10,2000"], {}, r"batch_size must be .*\(in the run benchmark.batch_size="
         r"2000, pytorch, seed 0\)"),
        (["hydra/launcher=basic"], {}, "hydra/launcher=basic is for `sequel run -m`"),
        (["algo=naive"], {"evaluate_on": "test"}, "evaluate_on is for learners, a configuration has its own"),
        (["run_dir=full"], {}, "run_dir must be empty or new, got full"),
        (["algo=naive", "mode=pytorch"], {"together": True}, "together is for runs in JAX, got none"),
        (["algo=naive"], {"together": True, "budget": "seconds=5"}, "together needs a budget of steps or "
         "memory, got "),
        (["algo=naive", "training.dtype=float32,float64"], {"together": True}, "runs at once need the same "
         "training.dtype, got float32 and float64"),
        (["run_dir=new"], {"resume": True}, "resume must be auto for a comparison, got True; "),
        (["algo=naive"], {"resume": "auto"}, "resume=auto needs run_dir, got none; "),
        (["run_dir=new"], {"resume": "auto", "budget": "seconds=5"}, "resume needs a budget of steps"),
        ([3], {}, "runs must hold learners, configurations or overrides, got a int"),
    ],
)  # fmt: skip
def test_bad_input_before_anything_is_done(
    runs: Any, settings: dict[str, Any], message: str, plugin: ScriptedPlugin, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(ValueError, match=f"^{message}"):
        compare(runs, progress=False, **settings)
    assert plugin.built == []
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_bad_learners_before_anything_is_done(digits: Benchmark, tmp_path: Path) -> None:
    def check_error(message: str, runs: Any, benchmark: Benchmark | None = digits, **settings: Any) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            compare(runs, benchmark, run_dir=tmp_path / "new", progress=False, **settings)
        assert not (tmp_path / "new").exists()

    new, used = (scripted("jax", NaiveHParams(), digits) for _ in range(2))
    used._step = 5
    check_error("benchmark must be given with learners, got None", [new], None)
    check_error("learners must be new, got one after 5 steps; make another", [new, used])
    check_error("learners must be new, got that of b, jax, seed 0 twice", {"a": new, "b": new})
    check_error("runs must differ in algorithm, framework or seed, got naive, jax, seed 0 twice",
            [new, scripted("jax", NaiveHParams(), digits)])  # fmt: skip
    check_error(
        "settings must be one of .* got 'evaluate_evry'; did you mean evaluate_every", [new], evaluate_evry=1
    )
    check_error(
        "evaluate_every must be end, task, epoch or a number of steps >= 1, got 0", [new], evaluate_every=0
    )
    check_error("evaluate_on=validation needs validation samples", [new], evaluate_on="validation")
    config = compose(SMALL).config
    check_error("benchmark is for learners, a configuration has its own; drop it", [config])
    check_error("batch_size must be ", [scripted("jax", AGEMHParams(), digits, batch_size=61)])


def test_a_framework_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLUGINS, "jax", "sequel_flux")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"^mode=jax needs the package sequel_flux; install it with: pip install "
    ):
        compare(SMALL, progress=False)
    assert list(tmp_path.iterdir()) == []
