"""`sequel compare`, `sequel demo` and the quiet mode of all commands, with a learner that does not train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sequel_core import compare, report
from sequel_core.cli import demo, main
from sequel_core.experiment.compose import compose
from sequel_core.runs import learner
from sequel_core.runs.learner import PLUGINS
from sequel_core.runs.results import load_result
from tests.core.scripted import ScriptedPlugin

SMALL = ["benchmark.num_tasks=2", "benchmark.subset=100"]


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ScriptedPlugin:
    made = ScriptedPlugin()
    monkeypatch.setattr(learner, "plugin", lambda mode: made)
    monkeypatch.setattr(report, "write_report", lambda directories, path, **_: Path(path).touch())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return made


def cells(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]


def test_both_frameworks_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compare", "+experiment=ewc_rotateddigits", *SMALL, "run_dir=it's all"]) == 0
    out = capsys.readouterr().out
    results = {mode: load_result(tmp_path / "it's all" / f"ewc_{mode}_seed0") for mode in PLUGINS}
    assert [row[:4] for row in cells(out)[:2]] == [
        ["ewc", mode, "0", f"{100 * result.average_accuracy:.2f}"] for mode, result in results.items()
    ]
    assert "the largest differences" not in out
    assert "largest differences between pytorch and jax" in out
    assert "In float32" in out
    assert out.endswith(f"report: {Path('it' + chr(39) + 's all') / 'report.html'}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"it's all"}


def test_the_command_equals_the_function(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ["algo=naive,ewc", "seed=3", "mode=jax", *SMALL]
    assert main(["compare", "-q", *line, "run_dir=command"]) == 0
    comparison = compare(line, run_dir=tmp_path / "function", progress=False)
    assert capsys.readouterr().out == ""
    assert len(comparison.runs) == 2
    for run in comparison.runs:
        assert run.result is not None
        twin = load_result(tmp_path / "command" / run.directory.name)
        assert twin.config == run.result.config
        np.testing.assert_array_equal(twin.matrix, run.result.matrix)


def test_float64_has_no_note_on_float32(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *SMALL, "training.dtype=float64", "run_dir=out"]) == 0
    out = capsys.readouterr().out
    assert "largest differences between pytorch and jax" in out
    assert "In float32" not in out


def test_a_file_of_experiments_and_a_note(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, plugin: ScriptedPlugin
) -> None:
    (tmp_path / "a.yaml").write_text("mode: jax\nalgo: {name: ewc, ewc_lambda: 3}\noptimizer: {lr: 0.5}\n")
    assert main(["compare", "a.yaml", "algo=ewc,naive", *SMALL, "run_dir=out"]) == 0
    out = capsys.readouterr().out
    assert out.count("note: algo=naive in place of ewc: dropped the file's algo.ewc_lambda\n") == 1
    assert [(c.algo.name, c.mode, c.optimizer.lr) for c in plugin.built] == [
        (name, mode, 0.5) for name in ("ewc", "naive") for mode in PLUGINS
    ]


def test_a_failing_run_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compare", "seed=13,0", *SMALL, "mode=jax", "run_dir=out"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "sequel: run naive_jax_seed13 failed: no space\n"
    assert [row[:3] for row in cells(captured.out)] == [["naive", "jax", "0; failed: 13"]]
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_repeated_command_runs_what_is_missing(
    capsys: pytest.CaptureFixture[str], plugin: ScriptedPlugin
) -> None:
    line = ["compare", "mode=jax", *SMALL, "run_dir=out", "resume=auto"]
    assert main([*line, "seed=0,1"]) == 0
    assert main([*line, "seed=0,1,2"]) == 0
    assert [config.training.seed for config in plugin.built] == [0, 1, 2]
    seeds = [row[2] for row in cells(capsys.readouterr().out) if row[0] == "naive"]
    assert seeds == ["0, 1", "0, 1, 2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["resume=out"], "resume must be auto for a comparison, got 'out'; "),
        ([], "the following arguments are required: FILE|KEY=VALUE; see sequel compare --help"),
        (["algo=naive,ewcc"], "algo must be one of "),
        (["nofile.yaml"], "nofile.yaml is neither a file nor an override such as algo=ewc"),
        (["algo=ewc", "algo.ewc_lambda=1,-1"], "algo.ewc_lambda must be >= 0, got -1"),
        (["algo=ewc", "--over"], "unrecognized arguments: --over; see sequel compare --help"),
        (["run_dir=file"], "run_dir must be a directory, got the file file; choose another path"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    line: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    plugin: ScriptedPlugin,
) -> None:
    (tmp_path / "file").touch()
    assert main(["compare", *line]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sequel: {message}")
    assert error.count("\n") == 1
    assert plugin.built == []
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: sequel compare")
    examples = [
        line.split("  ")[1].split() for line in out.splitlines() if line.startswith("  sequel compare")
    ]
    assert len(examples) >= 4


@pytest.mark.parametrize(
    "line",
    [
        ["run", "-m", "algo=naive,ewc", *SMALL],
        ["run", "expected.avg_acc=50", "source=a paper", *SMALL],
        ["compare", "mode=jax", *SMALL],
        ["reproduce", "naive", "--mode", "jax", "--seeds", "1"],
    ],
    ids=" ".join,
)
def test_quiet_prints_nothing(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = ["benchmark=rotateddigits", *SMALL, "expected.avg_acc=50", "expected.std=1"]
    monkeypatch.setattr("sequel_core.cli.reproduce.compose", lambda texts: compose([*texts, *smaller]))
    assert main([*line, "-q"]) in (0, 1)  # 1 if the published number is not reached
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_quiet_prints_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--quiet", "-m", "seed=0,13", *SMALL]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "sequel: run 1 failed: no space\n")
    assert main(["run", "-q", "algo=ewcc"]) == 2
    assert capsys.readouterr().err.startswith("sequel: algo must be one of ")


def test_the_demo(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plugin: ScriptedPlugin,
) -> None:
    monkeypatch.setattr(demo, "compose", lambda texts: compose([*texts, *SMALL]))
    assert main(["demo", "--run-dir", "here"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("RotatedDigits: five rotations of real handwritten digits, one after another\n")
    assert [row[:3] for row in cells(out)] == [
        *([name, mode, "0"] for name in ("naive", "ewc") for mode in PLUGINS),
        *([name, "0", row[2]] for name, row in zip(("naive", "ewc"), cells(out)[4:], strict=True)),
    ]
    assert "In float32 the two frameworks round differently" in " ".join(out.split())
    assert out.endswith("\n  sequel compare +experiment=ewc_rotateddigits training.dtype=float64\n")
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        "report.html", *(f"{name}_{mode}_seed0" for name in ("naive", "ewc") for mode in PLUGINS),
    }  # fmt: skip
    assert [vars(config.algo).get("ewc_lambda") for config in plugin.built] == [None, None, 100, 100]


def test_a_missing_plug_in_is_reported_before_the_first_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(mode: Any) -> None:
        raise ValueError(f"mode={mode} needs the package jax")

    monkeypatch.setattr(learner, "plugin", missing)
    assert main(["compare", *SMALL]) == 2
    assert capsys.readouterr().err == "sequel: mode=pytorch needs the package jax\n"
    assert list(tmp_path.iterdir()) == []
