"""User-defined code through `_target_`: a package outside the repository, in both modes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from sequel_core.cli import main
from sequel_core.experiment.build import build_benchmark
from sequel_core.experiment.compose import compose
from sequel_core.runs.results import Result, load_result
from tests.cli.conftest import Plugin

FILE = {
    "algo": {"_target_": "outside.${mode}_code.Magnitude", "strength": 0.3},
    "benchmark": {"_target_": "outside.data.Prepared", "num_tasks": 2},
    "optimizer": {"_target_": "outside.${mode}_code.SGD", "lr": 0.1, "lr_decay": 0.5},
    "backbone": {"widths": [8]},
}
BOTH = pytest.mark.parametrize("mode", ["pytorch", "jax"])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the package into the current directory, which is not on `sys.path`."""
    shutil.copytree(Path(__file__).parent / "fixtures" / "outside", tmp_path / "outside")
    (tmp_path / "user.yaml").write_text(yaml.safe_dump(FILE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "outside"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def run(*line: str) -> Result:
    name = f"run{sum(path.is_dir() for path in Path.cwd().iterdir())}"
    assert main(["run", *line, f"run_dir={name}"]) == 0
    return load_result(name)


def directory(result: Result) -> Path:
    assert result.run_dir is not None
    return result.run_dir


def weights(result: Result) -> dict[str, np.ndarray]:
    with np.load(directory(result) / "weights.npz") as arrays:
        return dict(arrays)


def test_one_file_of_user_code_gives_the_same_numbers_in_both_modes(package: Path) -> None:
    torch, flax = (run("user.yaml", f"mode={mode}", "training.dtype=float64") for mode in ("pytorch", "jax"))
    np.testing.assert_array_equal(torch.matrix, flax.matrix)
    theirs = weights(flax)
    assert theirs.keys() == weights(torch).keys()
    for path, array in weights(torch).items():
        np.testing.assert_allclose(array, theirs[path], rtol=1e-10, err_msg=path)
    assert torch.summary["memory_bytes"] == flax.summary["memory_bytes"] > 0
    assert torch.config["algo"] == {
        "_target_": "outside.pytorch_code.Magnitude",
        "consolidate": "last",
        "lr_decay": 0.5,
        "min_lr": 0.0,
        "reset_optimizer": True,
        "strength": 0.3,
        "task_given": False,
    }
    assert torch.config["optimizer"] == {"_target_": "outside.pytorch_code.SGD", "lr": 0.1}
    assert flax.config["optimizer"] == {"_target_": "outside.jax_code.SGD", "learning_rate": 0.1}
    assert flax.config["benchmark"] == {"_target_": "outside.data.Prepared", "num_tasks": 2}


def test_zero_penalty_equals_the_built_in_naive_and_optimizer(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user_defined = run("user.yaml", "algo.strength=0", "optimizer.learning_rate=0.05")
    built_in = run("user.yaml", "algo=naive", "optimizer=sgd", "optimizer.lr=0.05")
    assert "dropped the file's algo.strength" in capsys.readouterr().out
    assert built_in.config["algo"]["name"] == "naive"
    assert built_in.config["algo"]["lr_decay"] == 0.5
    assert built_in.config["optimizer"]["lr"] == 0.05
    strong = weights(run("user.yaml", "algo.strength=30", "optimizer.lr=0.05"))
    for path, array in weights(built_in).items():
        np.testing.assert_array_equal(weights(user_defined)[path], array)
    assert max(np.abs(strong[path] - array).max() for path, array in weights(user_defined).items()) > 1e-3


@BOTH
def test_user_network_logger_and_transforms_from_the_command_line(package: Path, mode: str) -> None:
    line = [
        f"mode={mode}",
        "+backbone._target_=outside.${mode}_code.Net",
        "+backbone.width=16",
        "logger={_target_: outside.${mode}_code.Writer}",
        "benchmark={_target_: outside.data.transformed, transforms: [null, {_target_: outside.data.Turn}]}",
        "++benchmark.size=400",
        "optimizer.lr=0.1",
        "algo=er",
    ]
    line += ["callbacks={steps: {_target_: outside.pytorch_code.Counter, path: steps}}"] * (mode == "pytorch")
    result = run(*line)
    assert result.matrix[0, 0] > 0.9  # chance is 0.5
    assert result.matrix[1, 1] > 0.9
    arrays = weights(result).values()
    assert {array.shape for array in arrays} == {(16, 16), (16,), (16, 2), (2,)}
    assert len(list(directory(result).rglob("*.csv"))) == 2  # the logger's and the matrix
    if mode == "jax":
        return
    assert (package / "steps").read_text() == "40\n40\n"
    again = run(str(directory(result) / "config.yaml"))
    assert again.config == result.config
    np.testing.assert_array_equal(again.matrix, result.matrix)
    for array, same in zip(arrays, weights(again).values(), strict=True):
        np.testing.assert_array_equal(array, same)


WATCHING = """
from pathlib import Path

from sequel_core.runs.callbacks import StreamCallback
from {module} import {base}


class Tasks(StreamCallback):
    def __init__(self, directory):  # the run's
        self.path = Path(directory) / type(self).__name__

    def tell(self, text):
        with self.path.open("a") as file:
            print(text, file=file)

    def on_task_start(self, learner, task):
        self.tell(f"task {{task.index}}")


class Both(Tasks, {base}):
    def {method}(self, *arguments):
        self.tell("trains")


def make_both(directory):
    return Both(directory)
"""


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("pytorch", {"module": "pytorch_lightning", "base": "Callback", "method": "on_train_start"}),
        ("jax", {"module": "sequel_flax.hooks", "base": "Hook", "method": "before_epoch"}),
    ],
)
def test_callbacks_of_the_stream_and_of_the_framework(
    package: Path, mode: str, names: dict[str, str]
) -> None:
    (package / "outside" / "watching.py").write_text(WATCHING.format(**names))
    given = "{a: {_target_: outside.watching.Tasks}, b: {_target_: outside.watching.make_both}}"
    result = run("user.yaml", f"mode={mode}", f"callbacks={given}")
    starts = ["task 0", "task 1"]
    assert (directory(result) / "Tasks").read_text().splitlines() == starts
    assert (directory(result) / "Both").read_text().splitlines() == [starts[0], "trains", starts[1], "trains"]


def test_each_task_is_consolidated_at_its_best_weights(package: Path) -> None:
    import torch

    keeper = "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: kept, monitor: val/loss, "
    keeper += "mode: max}"
    line = ["benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.subset=60", "backbone.widths=[8]"]
    line += ["benchmark.validation=0.3", "algo=naive", "algo.consolidate=best", f"callbacks=[{keeper}]"]
    result = run(*line, "training.epochs_per_task=3", "optimizer.lr=0.5")
    (file,) = (package / "kept" / "task_1").iterdir()
    kept = torch.load(file, weights_only=True)
    assert kept["epoch"] < 2
    best = weights(result)
    np.testing.assert_array_equal(best["head/kernel"], kept["state_dict"]["net.head.weight"].T)
    np.testing.assert_array_equal(best["head/bias"], kept["state_dict"]["net.head.bias"])


def test_objects_as_arguments(package: Path) -> None:
    from tests.cli.fixtures.outside.data import Halves

    line = ["benchmark._target_=outside.data.transformed", "benchmark.validation=0.25"]
    turns = "benchmark.transforms=[{_target_: outside.data.Turn, quarters: 2}, {_target_: outside.data.Turn}]"
    config = compose([*line, turns]).config
    stream = build_benchmark(config)
    assert [len(task.train) for task in stream.tasks] == [45, 45]
    images = Halves(20, 2).images[..., None]
    for task, quarters in zip(stream.tasks, (2, 1), strict=True):
        samples = task.test.take(np.arange(20))
        np.testing.assert_array_equal(samples.x, np.rot90(images, quarters, axes=(1, 2)))
        assert samples.y.tolist() == [0, 1] * 10
    lazy = "benchmark.transforms=[{_target_: numpy.rot90, _partial_: true, k: 3}]"
    stream = build_benchmark(compose([*line, lazy]).config)
    np.testing.assert_array_equal(
        stream.tasks[0].test.take(np.arange(20)).x, np.rot90(images, 3, axes=(1, 2))
    )
    owner = "owner={_target_: outside.data.Prepared, num_tasks: 3, batch_size: 1}"
    line = [f"benchmark.{owner}", "benchmark._target_=sequel_benchmarks.from_prepared"]
    line += ["benchmark.scenario=task", "benchmark.num_classes=4"]
    stream = build_benchmark(compose([*line, "benchmark.heads=shared"]).config)
    assert (len(stream), stream.scenario, stream.num_classes) == (3, "task", 4)
    with pytest.raises(ValueError, match=r"benchmark.num_classes must be >= 6, as every task has separate"):
        build_benchmark(compose(line).config)


def test_a_name_replaces_a_target_and_vice_versa(package: Path) -> None:
    config, notes = compose(["user.yaml", "algo=ewc", "algo.ewc_lambda=2"])
    assert config.algo.name == "ewc"
    assert notes == ["algo=ewc in place of outside.${mode}_code.Magnitude: dropped the file's algo.strength"]
    text = "algo: {name: ewc, ewc_lambda: 2, min_lr: 0.1}\nexpected: {avg_acc: 5}\n"
    (package / "named.yaml").write_text(text)
    config, notes = compose(["named.yaml", "algo._target_=outside.pytorch_code.Magnitude"])
    assert config.algo.min_lr == 0.1
    assert (config.algo.name, config.expected) == ("magnitude", {})
    assert notes == [
        "algo=outside.pytorch_code.Magnitude in place of ewc: dropped the file's algo.ewc_lambda, "
        "expected.avg_acc"
    ]
    assert compose([]).config.user_code == {}
    (package / "two.yaml").write_text(
        "callbacks:\n  a: {_target_: outside.pytorch_code.Counter, path: a}\n"
        "  b: {_target_: outside.pytorch_code.Counter, path: b}\n"
    )
    (kept,) = compose(["two.yaml", "callbacks.a=null"]).config.callbacks
    assert (kept.key, kept.arguments) == ("callbacks.b", {"path": "b"})


def test_a_sweep_over_an_argument_of_user_code(package: Path, numpy_plugin: Plugin) -> None:
    line = ["user.yaml", "mode=jax", "algo.strength=0,1", "+benchmark.size=60,80", "optimizer=sgd"]
    assert main(["run", "-m", *line, "run_dir=sweep"]) == 0
    assert [vars(config.algo)["strength"] for config in numpy_plugin.built] == [0, 0, 1, 1]
    assert [config.benchmark.arguments["size"] for config in numpy_plugin.built] == [60, 80] * 2
    rows = (package / "sweep" / "sweep.csv").read_text().splitlines()
    assert rows[0].startswith("rank,run,algo.strength,benchmark.size,")
    assert [row.rpartition(",")[2] for row in rows[1:]] == ["finished"] * 4


MAGNITUDE = "algo._target_=outside.pytorch_code.Magnitude"
NET = "backbone._target_=outside.pytorch_code.Net"
PREPARED = "benchmark._target_=outside.data.Prepared"
BAD = [
    (["algo._target_=outsid.code.Magnitude"],
     "algo._target_=outsid.code.Magnitude: there is no module outsid; did you mean outside?"),
    (["algo._target_=outside.pytorch_cod.Magnitude"],
     "algo._target_=outside.pytorch_cod.Magnitude: outside has no pytorch_cod; did you mean "
     "pytorch_code?"),
    (["algo._target_=outside.pytorch_code.Magnitud"],
     "algo._target_=outside.pytorch_code.Magnitud: outside.pytorch_code has no Magnitud; did you mean "
     "Magnitude?"),
    (["algo._target_=outside.broken.X"],
     "algo._target_=outside.broken.X: importing outside.broken failed with ModuleNotFoundError: No "
     "module named 'nosuch'"),
    (["algo._target_=3"],
     "algo._target_ must be a dotted path such as package.module.Name, got 3"),
    (["algo._target_=outside.data"],
     "algo._target_ must be callable, got outside.data, a module"),
    (["algo._target_=outside.data.Turn"],
     "algo._target_ must be a ContinualModule whose hparams_class, or a function (hparams, seed) -> "
     "Algorithm whose first annotation, is a subclass of AlgorithmHParams with a name, got "
     "outside.data.Turn with int"),
    ([MAGNITUDE, "mode=jax"],
     "algo._target_ must be a function (hparams, seed) -> Algorithm with mode=jax, got "
     "outside.pytorch_code.Magnitude; a file for both modes can write ${mode} within the path"),
    (["algo._target_=outside.jax_code.Magnitude"],
     "algo._target_ must be a ContinualModule with mode=pytorch"),
    ([MAGNITUDE, "algo.strenght=1"],
     "algo.strenght is not a setting of outside.pytorch_code.Magnitude; did you mean algo.strength (>= "
     "0)?"),
    ([MAGNITUDE, "algo.strength=-1"],
     "algo.strength must be >= 0, got -1.0"),
    (["algo=ewc", MAGNITUDE],
     "algo and algo._target_ differ: 'ewc' and "),
    ([NET, "backbone.widht=3"],
     "backbone.widht is not an argument of outside.pytorch_code.Net; did you mean backbone.width?"),
    (["backbone._target_=outside.jax_code.Perceptron", "mode=jax", "backbone.widht=3"],
     "backbone.widht is not an argument of outside.jax_code.Perceptron; did you mean backbone.width?"),
    (["backbone._target_=outside.jax_code.Perceptron", "mode=jax"],
     "backbone.width is an argument that outside.jax_code.Perceptron needs; give it a value"),
    (["backbone._target_=outside.data.Turn"],
     "backbone._target_ must give a torch.nn.modules.module.Module with mode=pytorch, got a Turn from "
     "outside.data.Turn"),
    ([NET, "backbone.num_classes=9"],
     "backbone.num_classes must be the benchmark's 10, got 9; leave it out"),
    ([PREPARED],
     "benchmark.num_tasks is an argument that outside.data.Prepared needs; give it a value"),
    ([PREPARED, "benchmark.num_tasks=0"],
     "benchmark.num_tasks must be >= 1, got 0"),
    (["benchmark._target_=outside.data.nothing"],
     "benchmark._target_ must give a Benchmark or an object with prepare_datasets(), got a NoneType "
     "from outside.data.nothing"),
    (["benchmark._target_=outside.data.transformed",
      "benchmark.transforms=[{_target_: outside.data.Turn, turns: 1}]"],
     "benchmark.transforms.0.turns is not an argument of outside.data.Turn; its arguments are quarters"),
    (["benchmark._target_=sequel_benchmarks.from_prepared",
      "benchmark.owner=null", "benchmark.scenaro=task"],
     "benchmark.scenaro is not an argument of sequel_benchmarks.from_prepared; did you mean "
     "benchmark.scenario?"),
    (["optimizer._target_=torch.optim.SGD", "optimizer.learning_rate=-1"],
     "optimizer: Invalid learning rate: -1"),
    (["optimizer._target_=optax.sgd", "mode=jax"],
     "optimizer.learning_rate is an argument that optax.sgd needs; give it a value"),
    (["optimizer._target_=optax.constant_schedule", "optimizer.value=1", "mode=jax"],
     "optimizer._target_ must give an optax.GradientTransformation with mode=jax, got a function from "
     "optax.constant_schedule"),
    (["logger.a=csv"],
     "logger must be one of comet, console, csv, jsonl, tensorboard, wandb, or settings with `_target_`, got "
     "'a'"),
    (["logger.a._target_=outside.data.Turn"],
     "logger.a._target_ must give a pytorch_lightning.loggers.logger.Logger with mode=pytorch, got a "
     "Turn from outside.data.Turn"),
    (["logger._target_=outside.data.Turn", "mode=jax"],
     "logger._target_ must give a metric writer with mode=jax, got a Turn without write_scalars"),
    (["callbacks=[{_target_: outside.data.Turn}]"],
     "callbacks.0._target_ must give a sequel_core.StreamCallback or, with mode=pytorch, a "
     "pytorch_lightning.Callback, got a Turn from outside.data.Turn; a sequel_flax.hooks.Hook needs "
     "mode=jax"),
    (["callbacks.a._target_=outside.pytorch_code.Counter", "callbacks.a.path=a", "mode=jax"],
     "callbacks.a._target_ must give a sequel_core.StreamCallback or, with mode=jax, a "
     "sequel_flax.hooks.Hook, got a Counter from outside.pytorch_code.Counter; a "
     "pytorch_lightning.Callback needs mode=pytorch"),
    (["callbacks._target_=outside.data.nothing", "mode=jax"],
     "callbacks._target_ must give a sequel_core.StreamCallback or, with mode=jax, a "
     "sequel_flax.hooks.Hook, got a NoneType from outside.data.nothing; a "),
    (["callbacks._target_=sequel_flax.hooks.ImageGrid", "callbacks.every=0", "mode=jax"],
     "callbacks.every must be a number of steps >= 1, got 0"),
    (["callbacks._target_=sequel_flax.hooks.ImageGrid", "callbacks.evry=1", "mode=jax"],
     "callbacks.evry is not an argument of sequel_flax.hooks.ImageGrid; did you mean callbacks.every?"),
    (["algo=ewc", "algo.consolidate=best"],
     'consolidate="best" needs exactly one ModelCheckpoint with a monitor and save_top_k != 0, got 0; give'),
    (["algo=ewc", "algo.consolidate=best", "mode=jax"],
     'consolidate="best" needs Lightning\'s ModelCheckpoint; use consolidate="last"'),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD, ids=[" ".join(line) for line, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    line: list[str], message: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / "outside" / "broken.py").write_text("import nosuch\n")
    assert main(["run", *line, "benchmark.subset=50" if "benchmark" not in str(line) else "seed=0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sequel: {message}")
    assert error.count("\n") == 1
    assert not (package / "runs").exists()


@pytest.mark.slow
def test_a_jax_run_of_user_code_loads_no_torch(package: Path) -> None:
    program = (
        "import sys; from sequel_core.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 3 * ('torch' in sys.modules))"
    )
    line = ["run", "user.yaml", "mode=jax", "run_dir=out"]
    subprocess.run([sys.executable, "-c", program, *line], cwd=package, check=True)
    assert json.loads((package / "out" / "summary.json").read_text())["status"] == "finished"
