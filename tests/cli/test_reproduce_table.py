"""`sequel reproduce TABLE`: values from the run directories, verdicts against SciPy; with a NumPy learner."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

import sequel_lightning  # noqa: F401 - declares the operators of torchvision, which Lightning imports
from sequel_core.cli import main
from sequel_core.experiment.compose import compose
from sequel_core.experiment.measured import metric_value, read_measured
from sequel_core.experiment.published import PublishedRow, PublishedTable, read_table, tables
from sequel_core.runs.results import Result, load_result
from sequel_core.runs.versions import commit, machine
from tests.cli.conftest import Plugin

DIGITS = ["benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.per_task_rotation=90"]
DIGITS += ["benchmark.subset=200", "optimizer.lr=0.1"]
KNOWN = {"location": "table 1", "evidence": "verified"}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def table_of(path: Path, rows: dict[str, dict[str, Any]], **changes: Any) -> str:
    content = {
        "title": "A paper, table 1",
        "source": "https://example.org",
        "protocol": "two rotations of the digits",
        "stream_varies": True,
        "settings": DIGITS,
        "rows": {name: KNOWN | row for name, row in rows.items()},
    }
    path.write_text(yaml.safe_dump(content | changes))
    return str(path)


def accuracies(folder: Path) -> list[float]:
    paths = sorted(folder.glob("jax_seed*"))
    return [100 * load_result(path).matrix[-1].mean() for path in paths]


def test_verdicts_are_scipys_and_rows_share_runs(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", table_of(tmp_path / "first.yaml", {"er": {"value": 5}}), "--seeds", "4"]) == 1
    measured = accuracies(tmp_path / "reproduced" / "first")
    assert len({round(value, 6) for value in measured}) == 4  # each seed has its own stream
    mean, std = float(np.mean(measured)), float(np.std(measured, ddof=1))
    rows: dict[str, dict[str, Any]] = {
        "same": {"value": round(mean, 2), "spread": std, "runs": 5},
        "high": {"value": mean + 20, "spread": 0.5, "runs": 5},
        "low": {"value": mean - 20, "evidence": "recalled"},
        "never": {"value": None, "not_expressible": "it needs a time machine", "evidence": "recalled"},
    }
    path = table_of(tmp_path / "first.yaml", rows)
    capsys.readouterr()
    assert main(["reproduce", path, "--seeds", "4"]) == 1
    out = capsys.readouterr().out
    assert len(numpy_plugin.built) == 4  # all were reused
    written = json.loads((tmp_path / "reproduced" / "first" / "table.json").read_text())
    results = {name: row["measured"].get("jax") for name, row in written["rows"].items()}
    for name, sign in (("same", 0), ("high", -1), ("low", 1)):
        row, result = rows[name], results[name]
        assert list(result["values"].values()) == pytest.approx(measured)
        assert result["difference"] == pytest.approx(mean - row["value"])
        margin = max(1.5, row.get("spread", 0))
        assert result["margin"] == margin
        sides = [
            stats.ttest_ind_from_stats(
                mean,
                std,
                4,
                row["value"] + bound,
                row.get("spread", 0),
                row.get("runs", 2),
                equal_var=False,
                alternative=side,
            ).pvalue
            for bound, side in ((-margin, "greater"), (margin, "less"))
        ]
        assert result["p"] == pytest.approx(max(sides), abs=1e-9)
        expected = ["equivalent", "different, above", "different, below"][sign]
        assert result["verdict"] == (expected if max(sides) < 0.05 or sign else "inconclusive")
    assert results["never"] is None
    assert "verified rows: " in out
    counted = "1 different, above; 1 cannot be expressed"
    assert f"recalled rows, which do not count until the paper is read: {counted}" in out
    assert "never: cannot be expressed: it needs a time machine" in out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    at = next(i for i, cells in enumerate(lines) if cells[:1] == ["high"])
    half, gap = stats.t.ppf(0.975, 3) * std / 2, f"{-20:.2f}"
    seconds = f"{results['high']['seconds']:.0f}"
    cells = ["high", "jax", f"{mean:.2f} ({std:.2f})", f"{mean + 20:g} (0.5)", gap, seconds, "different,"]
    assert lines[at] == cells
    interval, margin = f"{mean - half:.2f} to {mean + half:.2f}", "margin 1.5"
    assert lines[at + 1] == ["", "4 seeds", interval, "", margin, "", "below"]
    assert [line[0] for line in lines if line[:1] in (["low"], ["recalled"])][:2] == ["low", "recalled"]


def test_rows_modes_margins_and_exit_codes(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cause in the file, a recalled row and an inconclusive row do not make a table red."""
    rows: dict[str, dict[str, Any]] = {
        "explained": {"value": 99.0, "cause": "the stream is easier", "differs": "the angles"},
        "recalled": {"value": 99.0, "evidence": "recalled"},
        "red": {"value": 99.0},
        "forgotten": {"value": 0.0, "metric": "forgetting", "settings": ["evaluate_every=task"]},
    }
    path = table_of(tmp_path / "digits.yaml", rows)
    assert main(["reproduce", path, "--rows", "explained,rec*", "--seeds", "3"]) == 0
    assert "explained: cause: the stream is easier" in capsys.readouterr().out
    assert main(["reproduce", path, "--rows", "red", "--seeds", "3"]) == 1
    assert main(["reproduce", path, "--rows", "red", "--seeds", "1"]) == 0
    assert "red: more seeds are needed, at least 2" in capsys.readouterr().out
    assert main(["reproduce", path, "--rows", "red", "--seeds", "3", "--margin", "98"]) == 0
    assert len(numpy_plugin.built) == 3
    assert (
        main(["reproduce", path, "--rows", "forg*", "--seeds", "3", "--mode", "both", "--margin", "99"]) == 0
    )
    assert {config.mode for config in numpy_plugin.built} == {"jax", "pytorch"}
    folder = tmp_path / "reproduced" / "digits"
    written = json.loads((folder / "table.json").read_text())["rows"]["forgotten"]["measured"]
    assert list(written) == ["jax", "pytorch"]
    expected = [100 * load_result(folder / p.name).forgetting for p in sorted(folder.glob("pytorch_seed*"))]
    assert list(written["pytorch"]["values"].values()) == pytest.approx(expected)


def test_a_published_spread_becomes_a_standard_deviation() -> None:
    row = PublishedRow(value=50, spread=2.0, runs=9, location="table 1", evidence="verified")
    plain: dict[str, Any] = {"title": "a", "source": "b", "protocol": "c", "rows": {"row": row}}
    deviations = {
        spread: PublishedTable(**plain, spread=spread).deviation(row)
        for spread in ("standard deviation", "standard error", "95 % interval")
    }
    assert deviations["standard deviation"] == 2
    assert deviations["standard error"] == 6
    assert deviations["95 % interval"] == pytest.approx(2 * 3 / stats.t.ppf(0.975, 8))
    assert PublishedTable(**plain).deviation(row.model_copy(update={"spread": None})) == 0


def test_a_metric_over_some_of_the_tasks() -> None:
    matrix = np.array([[0.9, np.nan, np.nan], [0.5, 0.8, np.nan], [0.2, 0.6, 0.7]])
    result = Result(None, {}, matrix, {"average_accuracy": 0.5})
    common: dict[str, Any] = {"value": 1, "location": "table 1", "evidence": "recalled"}
    assert metric_value(result, PublishedRow(**common)) == 50
    assert metric_value(result, PublishedRow(**common, tasks=(1, 2))) == pytest.approx(65)
    row = PublishedRow(**common, tasks=(1, 2), metric="forgetting")
    assert metric_value(result, row) == pytest.approx(20)
    with pytest.raises(ValueError, match=r"tasks must be numbers from 0 to 2, got \[3\]"):
        metric_value(result, PublishedRow(**common, tasks=(3,)))


@pytest.mark.parametrize(
    ("rows", "changes", "line", "message"),
    [
        ({"a": {"value": 1}}, {"titel": "x"}, [], r"bad.yaml: titel: Extra inputs are not permitted"),
        ({"a": {"value": "x"}}, {}, [], r"bad.yaml: rows.a.value: Input should be a valid number"),
        ({"a": {}}, {}, [], r"rows.a must have a value or a reason in not_expressible, and not both, got"),
        ({"a": {"value": 1}}, {}, ["--rows", "b"], r"--rows must match a row, got b; the rows are a"),
        ({"a": {"value": 1}}, {}, ["--margin", "0"], r"margin must be > 0, got 0"),
        ({"a": {"value": 1}}, {}, ["--seeds", "0"], r"seeds must be >= 1, got 0"),
        ({"a": {"value": 1}}, {}, ["--jobs", "0"], r"jobs must be >= 1, got 0"),
        ({"a": {"value": 1}}, {}, ["--jobs", "2", "--together"], r"jobs must be 1 with --together, got 2"),
        (
            {"a": {"value": 1, "metric": "forgetting", "settings": ["evaluate_every=end"]}},
            {},
            [],
            r"rows.a: metric=forgetting needs an evaluation after every task, got evaluate_every=end",
        ),
        ({"a": {"value": 1, "settings": ["algo=nive"]}}, {}, [], r"did you mean naive"),
    ],
)
def test_errors(
    rows: dict[str, dict[str, Any]],
    changes: dict[str, Any],
    line: list[str],
    message: str,
    numpy_plugin: Plugin,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["reproduce", table_of(tmp_path / "bad.yaml", rows, **changes), *line]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "reproduced").exists()


def test_masks_class_order_and_angles(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: dict[str, dict[str, Any]] = {"class": {"value": 50}, "task": {"value": 50, "masks": "test"}}
    path = table_of(tmp_path / "digits.yaml", rows, masks="none", angles="0 and 90", class_order="none")
    assert main(["reproduce", path, "--rows", "class", "--seeds", "1"]) == 0
    assert "masks: none\nclass order: none\nangles: 0 and 90\n" in capsys.readouterr().out
    assert main(["reproduce", path, "--seeds", "1"]) == 0
    assert "masks: none (class); test (task)\n" in capsys.readouterr().out
    path = table_of(tmp_path / "digits.yaml", rows, masks="sometimes")
    assert main(["reproduce", path]) == 2
    assert "masks: Input should be 'none', 'test' or 'training and test'" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_in_processes_are_the_same_and_do_not_stop_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows: dict[str, dict[str, Any]] = {
        "bad": {"value": 50, "settings": ["optimizer.lr=1e30"]},
        "good": {"value": 50, "settings": ["algo=er"]},
    }
    path = table_of(tmp_path / "digits.yaml", rows)
    values, file = {}, tmp_path / "measured.json"
    for name, how in (("1", []), ("at once", ["--together", "--record", str(file)]), ("2", ["--jobs", "2"])):
        folder = tmp_path / name
        assert main(["reproduce", path, *how, "--seeds", "2", "--results", str(folder)]) == 1
        out = capsys.readouterr().out
        written = json.loads((folder / "digits" / "table.json").read_text())["rows"]
        values[name] = written["good"]["measured"]["jax"]["values"]
        assert written["bad"]["measured"]["jax"]["failures"] == ["seed 0 diverged", "seed 1 diverged"]
    assert values["1"] == values["2"] != {}
    assert values["at once"] == pytest.approx(values["1"], abs=0.5)  # rounding, which training amplifies
    assert [place.together for place in read_measured(file).environments] == [2]
    assert "/4] bad, jax, seed 0: diverged" in out
    assert "[4/4] good, jax, seed " in out
    assert main(["reproduce", path, "--jobs", "2", "--seeds", "2", "--results", "2", "--rows", "good"]) == 1
    assert capsys.readouterr().out.count("reused from") == 2


def test_options_of_tables_need_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in (["--rows", "a"], ["--margin", "1"], ["--record", "a.json"], ["--commands"]):
        assert main(["reproduce", "naive", *flag]) == 2
        message = f"{flag[0]} is for tables, got the experiment naive; drop it"
        assert message in capsys.readouterr().err


def test_recorded_values_are_added_to_a_file(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of other seeds, rows and modes stay; those of a row with other settings do not."""
    rows: dict[str, dict[str, Any]] = {"er": {"value": 50, "spread": 2.0}, "naive": {"value": 50}}
    path, file = table_of(tmp_path / "digits.yaml", rows), tmp_path / "out" / "measured.json"
    line = ["reproduce", path, "--margin", "90", "--record", str(file)]
    assert main([*line, "--rows", "er", "--seeds", "3"]) == 0
    assert main([*line, "--rows", "*", "--seeds", "2", "--mode", "pytorch"]) == 0
    measured = read_measured(file)
    measured.check(read_table(path))
    folder = tmp_path / "reproduced" / "digits"
    assert {(key, mode): list(row.runs) for key, by in measured.rows.items() for mode, row in by.items()} == {
        ("er", "jax"): [0, 1, 2],
        ("er", "pytorch"): [0, 1],
        ("naive", "pytorch"): [0, 1],
    }
    assert list(measured.rows["er"]["jax"].values.values()) == accuracies(folder)
    lines = list(csv.DictReader(file.with_suffix(".csv").read_text().splitlines()))
    assert [float(line["value"]) for line in lines[:3]] == accuracies(folder)
    summary = json.loads(next(folder.glob("jax_seed0*/summary.json")).read_text())
    assert lines[0]["machine"] == summary["machine"] == machine()
    assert (lines[0]["seed"], lines[0]["metric"]) == ("0", "average_accuracy")
    assert lines[0]["numpy"] == np.__version__
    assert summary["commit"] == commit()
    table_of(tmp_path / "digits.yaml", rows | {"er": {"value": 50, "settings": ["optimizer.lr=0.2"]}})
    with pytest.raises(ValueError, match=r"digits: the settings of er have changed; measure it again"):
        measured.check(read_table(path))
    assert main([*line, "--rows", "er", "--seeds", "1"]) == 0
    assert list(read_measured(file).rows["er"]["jax"].runs) == [0]
    table_of(tmp_path / "other.yaml", rows)
    assert main(["reproduce", str(tmp_path / "other.yaml"), "--seeds", "1", "--record", str(file)]) == 2
    assert "must be a file of the table other, got one of digits" in capsys.readouterr().err
    file.write_text('{"table": "digits", "rows": {"er": 1}}')
    assert main(line) == 2
    assert f"{file} is damaged: rows.er: Input should be a valid dictionary" in capsys.readouterr().err


def test_the_shipped_tables() -> None:
    """Every row composes; the default run composes some of the long tables."""
    assert tables() == ["der", "lamaml", "mcsgd", "sequel", "si"]
    for name in tables():
        table = read_table(name)
        for key in list(table.rows)[:: 1 + len(table.rows) // 6]:
            composed = compose([*table.settings, *table.rows[key].settings, "mode=jax"])
            assert composed.notes == []
            assert composed.config.training.drop_last == (name == "sequel")


@pytest.mark.slow
def test_every_row_of_the_shipped_tables_composes_in_both_modes() -> None:
    for table in map(read_table, tables()):
        for row in table.rows.values():
            for mode in ("jax", "pytorch"):
                assert compose([*table.settings, *row.settings, f"mode={mode}"]).notes == []


def test_the_commands_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: dict[str, dict[str, Any]] = {
        "a": {"settings": ["algo=er", "backbone.widths=[8,8]"], "value": 5, "differs": "the angles"},
        "never": {"value": None, "not_expressible": "it needs a time machine"},
    }
    path = table_of(tmp_path / "mine.yaml", rows, settings=["benchmark=rotateddigits"])
    assert main(["reproduce", path, "--mode", "both", "--commands"]) == 0
    settings = "benchmark=rotateddigits algo=er 'backbone.widths=[8,8]'"
    assert capsys.readouterr().out.splitlines() == [
        "# a: table 1",
        "# differs: the angles",
        f"sequel run {settings} mode=jax seed=0 benchmark.seed=0",
        f"sequel run {settings} mode=pytorch seed=0 benchmark.seed=0",
        "# never: table 1",
        "# cannot be expressed: it needs a time machine",
    ]
    assert not (tmp_path / "reproduced").exists()
    assert main(["reproduce", "ewc", "--commands"]) == 2
    assert "--commands is for tables, got the experiment ewc" in capsys.readouterr().err
