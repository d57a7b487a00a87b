"""`sequel run`: its output, files and exit codes, with a NumPy learner."""

import csv
import json
from pathlib import Path

import pytest

from sequel_core.algorithms import ALGORITHMS
from sequel_core.cli import main
from sequel_core.runs.results import load_result
from tests.cli.conftest import Plugin

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = ["benchmark.num_tasks=2", "benchmark.subset=200"]


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_run_writes_to_its_directory_only(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["run", "algo=ewc", *SMALL, "run_dir=it's a run", "expected.avg_acc=50", "source=a paper"]
    assert main(line) == 0
    assert files(tmp_path) == {"it's a run"}
    left = files(tmp_path / "it's a run")
    assert left.isdisjoint({".hydra", "main.log", "sequel.log", "multirun.yaml", "error.txt"})
    assert {"config.yaml", "summary.json", "accuracy_matrix.csv"} <= left
    result = load_result(tmp_path / "it's a run")
    assert result.matrix.shape == (2, 2)
    assert result.matrix[0, 0] > 0.8
    assert result.matrix[1, 1] > 0.8
    assert result.matrix[1, 0] < 0.4
    measured = 100 * result.average_accuracy
    assert last_line(capsys.readouterr().out) == (
        f"average accuracy: measured {measured:.2f} %, expected 50 % (a paper)"
    )
    (config,) = numpy_plugin.built
    assert config.algo.name == "ewc"


def test_without_run_dir_a_run_gets_a_new_directory_under_runs(numpy_plugin: Plugin, tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["run", *SMALL]) == 0
    assert files(tmp_path) == {"runs"}
    assert len(files(tmp_path / "runs")) == 2


@pytest.mark.parametrize("mode", ["pytorch", "jax"])
def test_the_papers_file_runs_in_both_modes(numpy_plugin: Plugin, tmp_path: Path, mode: str) -> None:
    file = FIXTURES / "code2_ewc.yaml"
    # MNIST may be missing, so the file runs on the bundled digits.
    assert main(["run", str(file), f"mode={mode}", "benchmark=rotateddigits", "run_dir=out"]) == 0
    (config,) = numpy_plugin.built
    assert config.mode == mode
    assert config.benchmark == ("rotateddigits", {"num_tasks": 20, "per_task_rotation": 9})
    assert load_result(tmp_path / "out").matrix.shape == (20, 20)


def test_a_sweep_ranks_its_runs_by_validation_accuracy(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["run", "-m", *SMALL, "benchmark.batch_size=10,20,30", "optimizer.lr=0.001,0.1", "run_dir=sweep"]
    assert main(line) == 0
    assert files(tmp_path) == {"sweep"}
    assert files(tmp_path / "sweep") == {"0", "1", "2", "3", "4", "5", "sweep.csv"}
    assert [(c.training.batch_size, c.optimizer.lr) for c in numpy_plugin.built] == [
        (10, 0.001), (10, 0.1), (20, 0.001), (20, 0.1), (30, 0.001), (30, 0.1),
    ]  # fmt: skip
    assert {c.benchmark.arguments["validation"] for c in numpy_plugin.built} == {0.1}
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == list("123456")
    assert [row["optimizer.lr"] for row in rows] == ["0.1"] * 3 + ["0.001"] * 3
    assert {row["status"] for row in rows} == {"finished"}
    best = json.loads((tmp_path / "sweep" / rows[0]["run"] / "summary.json").read_text())
    assert float(rows[0]["validation_average_accuracy"]) == best["validation_average_accuracy"]
    assert float(rows[0]["test_average_accuracy"]) == best["average_accuracy"]
    out = capsys.readouterr().out
    assert "note: benchmark.validation=0.1" in out
    assert "ranked by validation accuracy" in out


def test_a_sweep_over_modes_and_seeds_only_has_no_validation_samples(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--multirun", "mode=pytorch,flax", "seed=range(2)", *SMALL]) == 0
    assert [(c.mode, c.training.seed) for c in numpy_plugin.built] == [
        ("pytorch", 0), ("pytorch", 1), ("jax", 0), ("jax", 1),
    ]  # fmt: skip
    assert all("validation" not in c.benchmark.arguments for c in numpy_plugin.built)
    assert "ranked by test accuracy" in capsys.readouterr().out
    (sweep,) = (tmp_path / "runs").iterdir()
    assert sweep.name.endswith("_sweep")


def test_a_sweep_may_rank_by_test_accuracy(numpy_plugin: Plugin, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", "optimizer.lr=0.001,0.1", "benchmark.validation=0", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "ranked by test accuracy" in out
    assert "note:" not in out


def test_a_sweep_over_algorithms_experiments_and_files(numpy_plugin: Plugin, tmp_path: Path) -> None:
    assert main(["run", "-m", "+experiment=naive_rotateddigits,ewc_rotateddigits", *SMALL]) == 0
    assert [c.algo.name for c in numpy_plugin.built] == ["naive", "ewc"]
    numpy_plugin.built.clear()
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"optimizer: {{lr: 0.{'ab'.index(name) + 1}}}\n")
    assert main(["run", "-m", "file=a.yaml,b.yaml", "algo.name=Naive,ewc", *SMALL]) == 0
    assert [(c.optimizer.lr, c.algo.name) for c in numpy_plugin.built] == [
        (0.1, "naive"), (0.1, "ewc"), (0.2, "naive"), (0.2, "ewc"),
    ]  # fmt: skip


def test_a_sweep_of_a_list_valued_setting(numpy_plugin: Plugin) -> None:
    assert main(["run", "-m", "backbone.widths=[8],[8,8]", *SMALL]) == 0
    assert [c.backbone.widths for c in numpy_plugin.built] == [(8,), (8, 8)]  # type: ignore[attr-defined]


def test_an_invalid_run_stops_a_sweep_before_the_first_run(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", "optimizer.lr=0.1,-1", *SMALL]) == 2
    assert capsys.readouterr().err == "sequel: optimizer.lr must be >= 0, got -1.0\n"
    assert main(["run", "-m", "benchmark.batch_size=10,300", *SMALL, "benchmark.validation=0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sequel: batch_size must be <= the samples of a task, got 300 with 200 training")
    assert error.count("\n") == 1
    assert numpy_plugin.built == []
    assert files(tmp_path) == set()


def test_a_run_that_fails_does_not_stop_the_others(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", "optimizer.lr=100,0.1", "run_dir=sweep", *SMALL]) == 1
    captured = capsys.readouterr()
    assert "no longer finite at task 0" in captured.err
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["run"], rows[0]["status"]) == ("1", "finished")
    assert rows[1]["status"] == "diverged"


def test_divergence_is_one_line_and_exit_code_1(
    numpy_plugin: Plugin, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "optimizer.lr=100", *SMALL]) == 1
    assert last_line(capsys.readouterr().err).startswith(
        "sequel: the training loss is no longer finite at task 0, epoch 0, step 0"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["algo=ewcc"], f"algo must be one of {', '.join(ALGORITHMS)}, got 'ewcc'; did you mean ewc?"),
        (["algo=icarl", "algo.mem_size=9"], "algo.mem_size must be >= 50, one exemplar of each class of each "
         "task, got 9; raise it"),
        (["algo=icarl", "algo.mem_size=9", "benchmark=splitdigits"], "algo.mem_size must be >= 10, one "
         "exemplar of each class, got 9; raise it"),
        (["algo=lamaml", "algo.alpha_init=0"], "algo.alpha_init must be > 0, got 0.0"),
        (["algo=lamaml", "algo.n_inner_updates=3"], "algo.n_inner_updates must divide batch_size=10, got 3"),
        (["algo=lamaml", "training.grad_clip=1"], "algo.grad_clip_norm replaces grad_clip in lamaml, got "
         "grad_clip=1.0; leave grad_clip out"),
        (["algo=lamaml", "optimizer.lr_decay=0.8"], "algo.lr_decay must be 1 with sync_update=false, "
         "which uses no optimizer, got 0.8; set sync_update=true or leave lr_decay out"),
        (["algo=mcsgd", "algo.lmc_line_samples=1"], "algo.lmc_line_samples must be >= 2 and <= 1000"),
        (["algo=mcsgd", "algo.mem_size=42", "benchmark.num_tasks=5"], "algo.mem_size must divide into the 5 "
         "equal parts of memory=task_quota, one for each task, got 42; use 40 or 45"),
        (["algo=er", "algo.mem_size=9"], "algo.mem_size must be 0 or give at least batch_size=10 slots, so "
         "that the samples of a step fit, got 9; raise mem_size or lower batch_size"),
        (["algo=der", "algo.mem_size=20", "algo.mem_batch_size=21"], "algo.mem_batch_size must be <= the 20 "
         "samples of the memory, got 21; lower mem_batch_size or raise mem_size"),
        (["algo=agem", "algo.mem_size=1001", "benchmark=rotateddigits", "benchmark.num_tasks=5"],
         "algo.mem_size must divide into the 50 equal parts of memory=ring, one for each class of each task, "
         "got 1001; use 1000 or 1050"),
        (["benchmark=splitdigits", "benchmark.num_tasks=3"],
         "benchmark.num_tasks must divide the 10 classes, got 3; use one of 1, 2, 5, 10"),
        (["benchmark=diabetes", "backbone=cnn"], "backbone=cnn needs images [H, W, C], benchmark diabetes "
         "has float32 [10]; use a network of your own or backbone=mlp"),
        (["benchmark=diabetes", "backbone=gru"], "backbone=gru needs integers [L], or a dict of them called "
         "input_ids, and attention_mask if there is padding, benchmark diabetes has float32 [10]; use a "
         "network of your own or backbone=mlp"),
        (["benchmark=markovchains"], "backbone=mlp needs one input array, benchmark markovchains has "
         "input_ids int64 [32], attention_mask int64 [32]; use a network of your own or "
         "backbone=transformer"),
        (["benchmark=markovchains", "backbone=transformer", "backbone.vocab_size=7"], "backbone.vocab_size "
         "must be > the largest token id 7, got 7"),
        (["benchmark=markovchains", "benchmark.min_length=33"], "benchmark.min_length must be <= length, got "
         "min_length=33 with length=32"),
        (["benchmark=diabetes", "benchmark.feature=bmii"], "benchmark.feature must be one of age, sex, bmi, "
         "bp, s1, s2, s3, s4, s5, s6, got 'bmii'; did you mean bmi?"),
        (["benchmark=diabetes", "algo=icarl"], "icarl needs targets that are class labels, one "
         "integer per sample, got float32 []; use "),
        (["benchmark.batch_size=2000"], "batch_size must be <= the samples of a task, got 2000 with "),
        (["backbone.num_classes=9"], "backbone.num_classes must be the benchmark's 10, got 9; leave it out"),
        (["training.epochs_per_task=[1,2]"], "training.epochs_per_task must be a number or have one entry"),
        (["evaluate_on=validation"], "evaluate_on=validation needs validation samples, got none in task 0; "
         "set benchmark.validation, for example to 0.1"),
        (["nofile.yaml"], "nofile.yaml is neither a file nor an override such as algo=ewc"),
        (["algo=ewc,naive"], "algo=ewc,naive has several values; use `sequel run -m` to sweep over them"),
        (["hydra.run.dir=a"], "hydra.run.dir is set by the command; use run_dir=DIR"),
        (["hydra/launcher=nosuch"], "In 'hydra/config': Could not find 'hydra/launcher/nosuch'"),
        (["run_dir=file"], "run_dir must be a directory, got the file file"),
        (["run_dir=full"], "run_dir must be empty or new, got full, which holds a"),
        (["--nosuch"], "unrecognized arguments: --nosuch; see sequel run --help"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    line: list[str], message: str, numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    assert main(["run", *line]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"sequel: {message}")
    assert captured.err.count("\n") == 1
    assert numpy_plugin.built == []
    assert files(tmp_path) == {"file", "full"}


def test_an_existing_run_directory_is_kept_if_a_run_fails(numpy_plugin: Plugin, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["run", "run_dir=mine", "backbone.num_classes=9"]) == 2
    assert files(tmp_path) == {"mine"}


def test_cfg_prints_a_file_of_the_same_configuration(
    numpy_plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "algo=ewc", "algo.ewc_lambda=3", *SMALL, "--cfg"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert numpy_plugin.built == []
    assert main(["run", "algo=ewc", "algo.ewc_lambda=3", *SMALL]) == 0
    assert main(["run", "shown.yaml"]) == 0
    first, second = numpy_plugin.built
    assert first.plain() == second.plain()


def test_interruption(numpy_plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(numpy_plugin, "build_learner", interrupt)
    assert main(["run", *SMALL]) == 130
