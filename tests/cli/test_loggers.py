"""Loggers through the command in both modes: files, read with the readers of the tools; secrets; failures."""

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sequel_core.cli import main
from sequel_core.cli.sweep import combinations
from sequel_core.experiment.compose import compose
from sequel_core.experiment.overrides import request
from sequel_core.experiment.schema import choices
from sequel_core.experiment.target import Target
from sequel_core.runs import services
from sequel_core.runs.results import Result, load_result
from tests.cli.conftest import Plugin
from tests.events import scalars

MODES = ["pytorch", "jax"]
BOTH = pytest.mark.parametrize("mode", MODES)
STEPS, TASKS, EVERY = 20, 3, 6  # steps per epoch; a task has two epochs
SMALL = (
    f"benchmark.num_tasks={TASKS}",
    "benchmark.per_task_rotation=60",
    "benchmark.subset=100",
    "training.batch_size=5",
    f"training.log_every_n_steps={EVERY}",
    "backbone.widths=[8]",
)
SECRETS = {
    "WANDB_API_KEY": "5e1f7c0de" * 4 + "wand",
    "COMET_API_KEY": "c0ffee5e1f" * 3 + "comt",
    "OWN_PASSWORD": "hunter2-hunter2",
    "argument": "typed-on-the-command-line",
    "file": "written-in-the-file",
}
LOGGER = """
from pathlib import Path
from pytorch_lightning.loggers import CSVLogger

class Logger(CSVLogger):
    def __init__(self, directory, api_key, password, comment):
        super().__init__(directory, "user", "")
"""
JAX_LOGGER = """
from sequel_flax.writers import CsvWriter

class Logger(CsvWriter):
    def __init__(self, directory, api_key, password, comment):
        super().__init__(__import__("pathlib").Path(directory) / "user")
"""
FILE = {
    "logger": {
        **{key: {} for key in ("console", "csv", "jsonl", "tensorboard")},
        "wandb": {"project": "p", "group": "g", "name": "n", "tags": ["a", "b"], "mode": "offline"},
        "comet": {"workspace": "w", "project": "p", "name": "n", "tags": ["a", "b"], "mode": "offline"},
        "mine": {
            "_target_": "user_${mode}.Logger",
            "api_key": SECRETS["file"],
            "password": "?",
            "comment": "my ${oc.env:OWN_PASSWORD}!",
        },
    }
}
PROGRAM = """
import sys
from sequel_core.cli import main
for mode in ("pytorch", "jax"):
    code = main(["run", *sys.argv[1:], f"mode={mode}", f"run_dir={mode}"])
    print("<end>", flush=True)
    if code:
        sys.exit(code)
"""


@dataclass
class Logged:
    """A run with all loggers and its output; `err` is the standard error of both runs."""

    result: Result
    out: str
    err: str

    @property
    def path(self) -> Path:
        assert self.result.run_dir is not None
        return self.result.run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Logged]:
    """Run all loggers in both modes, in a subprocess because W&B and Comet change the process."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "user_pytorch.py").write_text(LOGGER)
    (folder / "user_jax.py").write_text(JAX_LOGGER)
    (folder / "file.yaml").write_text(yaml.safe_dump(FILE))
    environment = {**os.environ, **{key: value for key, value in SECRETS.items() if key.isupper()}}
    environment["COLUMNS"] = "100"
    line = ["file.yaml", *SMALL, "evaluate_every=epoch", "training.epochs_per_task=2"]
    line.append("benchmark.validation=0.2")
    line.append(f"logger.mine.password={SECRETS['argument']}")
    command = [sys.executable, "-c", PROGRAM, *line]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("<end>\n")
    return {mode: Logged(load_result(folder / mode), texts[k], done.stderr) for k, mode in enumerate(MODES)}


Series = dict[str, list[tuple[int, float]]]


def read_tensorboard(path: Path) -> Series:
    return scalars(path / "tensorboard")


def read_rows(rows: Iterator[tuple[int, Mapping[str, Any]]]) -> Series:
    series: Series = {}
    for step, values in rows:
        for tag, value in values.items():
            if isinstance(value, int | float):
                series.setdefault(tag, []).append((step, value))
    return series


def read_csv(path: Path, name: str = "csv") -> Series:
    with (path / name / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = [(int(row.pop("step")), {k: float(v) for k, v in row.items() if v}) for row in rows]
    return read_rows(iter(pairs))


def read_jsonl(path: Path) -> Series:
    lines = (path / "jsonl" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return read_rows((r.pop("step"), r) for r in records if "step" in r)


@cache
def wandb_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of an offline run and of its resumed parts, as printed by W&B's reader."""
    lines: list[str] = []
    for file in sorted((path / "wandb").glob("offline-run-*/run-*.wandb")):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
        lines += subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def read_wandb(path: Path) -> Series:
    items = [record["history"]["item"] for record in wandb_records(path) if record["type"] == "history"]
    internal = ("_step", "_runtime", "_timestamp")
    rows = [{k: v for k, v in item.items() if k not in internal and "._type" not in k} for item in items]
    series = read_rows((row.pop("trainer/global_step"), row) for row in rows)
    return {tag: points for tag, points in series.items() if "." not in tag}


def comet_messages(path: Path) -> list[dict[str, Any]]:
    lines: list[str] = []
    for archive in sorted((path / "comet").glob("*.zip"), key=lambda file: file.stat().st_mtime_ns):
        with zipfile.ZipFile(archive) as files:
            lines += files.read("messages.json").decode().splitlines()
    return [json.loads(line) for line in lines]


def read_comet(path: Path) -> Series:
    metrics = [m["payload"]["metric"] for m in comet_messages(path) if m["type"] == "metric_msg"]
    rows = ((m["step"], {m["metricName"]: float(m["metricValue"])}) for m in metrics)
    return {
        tag: points for tag, points in read_rows(rows).items() if tag != "process duration"
    }  # logged by Comet


READERS = {
    "tensorboard": read_tensorboard,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "wandb": read_wandb,
    "comet": read_comet,
}
EVALUATED = [STEPS * k for k in range(1, 2 * TASKS + 1)]  # after each of the two epochs per task
REPORTED = sorted(
    {e + s for e in range(0, 2 * STEPS * TASKS, 2 * STEPS) for s in range(EVERY, 2 * STEPS, EVERY)}
    | {*EVALUATED}
)
EXPECTED = {
    **dict.fromkeys(
        ("train/loss", "train/accuracy", "train/learning_rate", "train/samples_per_second"), REPORTED
    ),
    **{f"test/accuracy/task_{j}": EVALUATED[2 * j :] for j in range(TASKS)},
    "test/average_accuracy": EVALUATED,
    "test/forgetting": [4 * STEPS, 6 * STEPS],
    "memory_bytes": EVALUATED,
    "validation/average_accuracy": EVALUATED[-1:],
}


@BOTH
@pytest.mark.parametrize("name", READERS)
def test_tags_and_steps_are_the_same_in_both_modes_and_increase(
    runs: dict[str, Logged], mode: str, name: str
) -> None:
    series = READERS[name](runs[mode].path)
    assert {tag: [step for step, _ in points] for tag, points in series.items()} == EXPECTED


@BOTH
@pytest.mark.parametrize("name", READERS)
def test_the_last_values_equal_the_summary(runs: dict[str, Logged], mode: str, name: str) -> None:
    result, exact = runs[mode].result, name != "tensorboard"  # TensorBoard stores float32
    last = {tag: points[-1][1] for tag, points in READERS[name](runs[mode].path).items()}
    expected = {f"test/{key}": result.summary[key] for key in ("average_accuracy", "forgetting")}
    expected |= {f"test/accuracy/task_{j}": result.matrix[-1, j] for j in range(TASKS)}
    for tag, key in (("memory_bytes", "memory_bytes"), ("validation/average_accuracy",) * 2):
        expected[tag] = result.summary[key.replace("/", "_")]
    for tag, value in expected.items():
        assert last[tag] == (value if exact else np.float32(value)), tag


@BOTH
def test_training_metrics_equal_the_run_directory(runs: dict[str, Logged], mode: str) -> None:
    lines = map(json.loads, (runs[mode].path / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if record["kind"] == "train"]
    series = read_jsonl(runs[mode].path)
    for name in ("loss", "accuracy", "learning_rate", "samples_per_second"):
        assert series[f"train/{name}"] == [(record["step"], record[name]) for record in records]


def test_both_modes_write_the_same_files_with_the_same_numbers(runs: dict[str, Logged]) -> None:
    torch, flax = (read_csv(runs[mode].path) for mode in MODES)
    for tag in EXPECTED.keys() - {"train/samples_per_second"}:
        np.testing.assert_allclose(
            [value for _, value in torch[tag]], [value for _, value in flax[tag]], rtol=1e-3, atol=0.02
        )
    headers = [(runs[mode].path / "csv" / "metrics.csv").read_bytes().partition(b"\r\n")[0] for mode in MODES]
    assert headers[0] == headers[1] == ",".join(sorted([*EXPECTED, "step"])).encode()
    for mode in MODES:
        assert read_csv(runs[mode].path, "user") == read_csv(runs[mode].path)
        assert {path.name for path in (runs[mode].path / "csv").iterdir()} == {"metrics.csv", "hparams.yaml"}
        assert (
            yaml.safe_load((runs[mode].path / "csv" / "hparams.yaml").read_text()) == runs[mode].result.config
        )


PICTURES = {f"samples/task_{i}": [0] for i in range(TASKS)} | {"test/accuracy_matrix": EVALUATED[1::2]}


@BOTH
def test_pictures_and_tables_in_tensorboard(runs: dict[str, Logged], mode: str) -> None:
    events = EventAccumulator(str(runs[mode].path / "tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    assert {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]} == PICTURES
    for tag in PICTURES:
        event = events.Images(tag)[-1]
        picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert picture.shape == (event.height, event.width, 3)
        if tag.startswith("samples"):
            assert picture.shape == (44, 44, 3)  # 25 digits of 8 x 8 pixels, one pixel apart
    *_, table = events.Tensors("test/accuracy_matrix_table/text_summary")
    (text,) = table.tensor_proto.string_val
    rows = [line.strip("| ").split(" | ") for line in text.decode().splitlines()]
    assert rows[0] == ["after_task", "task_0", "task_1", "task_2"]
    matrix = runs[mode].result.matrix
    assert rows[4] == ["2", *(f"{value:.4f}" for value in matrix[2])]


@BOTH
def test_hyper_parameters_in_tensorboard(runs: dict[str, Logged], mode: str) -> None:
    events = EventAccumulator(str(runs[mode].path / "tensorboard"))
    events.Reload()
    assert "hp_metric" not in events.Tags()["scalars"]
    contents = {}
    for tag, content in events.PluginTagToContent("hparams").items():
        contents[tag.rpartition("/")[2]] = HParamsPluginData.FromString(content)
    settings = contents["session_start_info"].session_start_info.hparams
    assert settings["training.batch_size"].number_value == 5
    assert settings["algo.name"].string_value == "naive"
    assert settings["algo.reset_optimizer"].bool_value is True
    assert settings["mode"].string_value == mode
    experiment = contents["experiment"].experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"test/average_accuracy", "test/forgetting"}
    assert {info.name for info in experiment.hparam_infos} == set(settings)
    assert contents["session_end_info"].session_end_info.status == 1  # STATUS_SUCCESS


@BOTH
def test_settings_pictures_and_tables_in_wandb(runs: dict[str, Logged], mode: str) -> None:
    path = runs[mode].path
    records = wandb_records(path)
    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert (run["project"], run["run_group"], run["display_name"], run["tags"]) == ("p", "g", "n", ["a", "b"])
    (config,) = (record["config"]["update"] for record in records if record["type"] == "config")
    assert config["algo"]["name"] == "naive"
    assert config["training"]["batch_size"] == 5
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    (folder,) = (path / "wandb").glob("offline-run-*/files")
    for tag, steps in PICTURES.items():
        rows = [item for item in history if f"{tag}.filenames" in item]
        assert [item["trainer/global_step"] for item in rows] == steps
        height, width, _ = np.asarray(Image.open(folder / rows[-1][f"{tag}.filenames"][0])).shape
        assert (rows[-1][f"{tag}.height"], rows[-1][f"{tag}.width"]) == (height, width)
    tables = sorted(folder.rglob("*.table.json"), key=lambda file: file.stat().st_mtime_ns)
    table = json.loads(tables[-1].read_text())
    assert table["columns"] == ["after_task", "task_0", "task_1", "task_2"]
    assert table["data"][2] == [2, *runs[mode].result.matrix[2]]
    (last,) = (record["exit"] for record in records if record["type"] == "exit")
    assert last.get("exit_code", 0) == 0


@BOTH
def test_settings_pictures_and_tables_in_comet(runs: dict[str, Logged], mode: str) -> None:
    path = runs[mode].path
    messages = comet_messages(path)
    parameters = {}
    for message in messages:
        if message["type"] == "parameter_msg":
            payload = message["payload"].get("param") or message["payload"]["params"]
            parameters[payload["paramName"]] = payload["paramValue"]
    assert (parameters["algo|name"], parameters["training|batch_size"]) == ("naive", 5)
    others = {m["payload"]["key"]: m["payload"]["value"] for m in messages if m["type"] == "log_other"}
    assert others["Name"] == "n"
    assets = [m["payload"] for m in messages if m["type"] == "file_upload"]
    pictures = [asset for asset in assets if asset["upload_type"] == "visualization"]
    steps: dict[str, list[int]] = {}
    for asset in pictures:
        steps.setdefault(asset["additional_params"]["figName"], []).append(asset["additional_params"]["step"])
    assert steps == PICTURES
    (archive,) = (path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        about = json.loads(files.read("experiment.json"))
        assert (about["workspace"], about["project_name"], sorted(about["tags"])) == ("w", "p", ["a", "b"])
        last = [asset for asset in assets if asset not in pictures][-1]
        rows = list(csv.reader(files.read(Path(last["file_path"]).name).decode().splitlines()))
    assert rows[0] == ["after_task", "task_0", "task_1", "task_2"]
    assert [float(cell) for cell in rows[3]] == [2, *runs[mode].result.matrix[2]]


@BOTH
def test_the_table_in_jsonl_and_on_the_console(runs: dict[str, Logged], mode: str) -> None:
    matrix = runs[mode].result.matrix
    lines = [json.loads(t) for t in (runs[mode].path / "jsonl" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"hparams": runs[mode].result.config}
    table = [line["test/accuracy_matrix_table"] for line in lines if "test/accuracy_matrix_table" in line][-1]
    assert table["columns"] == ["after_task", "task_0", "task_1", "task_2"]
    assert table["rows"] == [[i, *(None if np.isnan(v) else v for v in matrix[i])] for i in range(TASKS)]
    out = runs[mode].out
    assert [f"step {step}" in out for step in EVALUATED] == [True] * len(EVALUATED)
    assert " ".join(f"{value:.4f}" for value in matrix[2]) in out


@BOTH
def test_no_secret_is_written_anywhere(runs: dict[str, Logged], mode: str) -> None:
    contents = []
    for path in runs[mode].path.rglob("*"):
        if path.is_file():
            contents.append((path, path.read_bytes()))
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as files:
                    contents += [(path / name, files.read(name)) for name in files.namelist()]
    assert len(contents) > 20
    for path, content in contents:
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, (path, name)
    config = runs[mode].result.config["logger"]["mine"]
    assert config == {
        "_target_": f"user_{mode}.Logger",
        "api_key": "***",
        "password": "***",
        "comment": "my ***!",
    }
    assert not any(secret in runs[mode].out + runs[mode].err for secret in SECRETS.values())


def test_a_masked_configuration_runs_if_the_secrets_are_given(
    runs: dict[str, Logged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs["jax"].path.parent)
    with pytest.raises(ValueError, match=r"logger\.mine\.api_key was masked when the run was recorded"):
        compose(["jax/config.yaml"])
    line = ["jax/config.yaml", "logger.mine.api_key=a", "logger.mine.password=b"]
    config = compose(line).config
    assert config.logger.keys() == FILE["logger"].keys()
    mine = config.logger["mine"]
    assert isinstance(mine, Target)
    assert (mine.arguments["api_key"], mine.arguments["password"]) == ("a", "b")
    assert {**config.plain(), "written_by": metadata.version("sequel-cl")} == runs["jax"].result.config


# -- a run that is interrupted and resumed

STOPPED_AT = 2 * STEPS + EVERY  # the first report of the second task
STOP = f"""
    def {{}}
        import os, signal
        super().{{}}
        if step == {STOPPED_AT}:
            os.kill(os.getpid(), signal.SIGTERM)
"""
STOPPING = {
    "pytorch": LOGGER + STOP.format("log_metrics(self, metrics, step=None):", "log_metrics(metrics, step)"),
    "jax": JAX_LOGGER + STOP.format("write_scalars(self, step, scalars):", "write_scalars(step, scalars)"),
}


@pytest.mark.slow
@BOTH
def test_an_interrupted_and_resumed_run_is_one_series(tmp_path: Path, mode: str) -> None:
    (tmp_path / "stopping.py").write_text(STOPPING[mode])
    user_logger = {"_target_": "stopping.Logger", "api_key": "a", "password": "b", "comment": "c"}
    settings = {"logger": {**FILE["logger"], "mine": user_logger}}
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(settings))
    program = "import sys; from sequel_core.cli import main; sys.exit(main(sys.argv[1:]))"
    line = ["file.yaml", *SMALL, f"mode={mode}", "run_dir=run", "evaluate_every=epoch"]
    line += ["training.epochs_per_task=2", "benchmark.validation=0.2"]
    secrets = ["logger.mine.api_key=a", "logger.mine.password=b"]  # the run does not store them
    for arguments, code in ((line, 143), (["resume=run", *secrets], 0)):
        command = [sys.executable, "-c", program, "run", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert (load_result(tmp_path / "run").summary["status"] == "finished") == (code == 0)
    for name, read in READERS.items():
        series = read(tmp_path / "run")
        assert {tag: [step for step, _ in points] for tag, points in series.items()} == EXPECTED, name
    assert (
        len(
            {record["run"]["run_id"] for record in wandb_records(tmp_path / "run") if record["type"] == "run"}
        )
        == 1
    )


# -- the choice of loggers


def chosen(*line: str) -> dict[str, Any]:
    """Return the loggers of a command line of `sequel run`."""
    asked = request(line, sweep=False)
    loggers: dict[str, Any] = compose(asked.overrides).config.plain()["logger"]
    return {name: {k: v for k, v in group.items() if v is not None} for name, group in loggers.items()}


CSV = "pytorch_lightning.loggers.CSVLogger"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], {}),
        (["logger=csv"], {"csv": {}}),
        (["logger=[csv,tensorboard]"], {"csv": {}, "tensorboard": {}}),
        (["logger=[]"], {}),
        (["logger=null"], {}),
        (["logger.wandb.project=x"], {"wandb": {"project": "x"}}),
        (["wandb.project=x"], {"wandb": {"project": "x"}}),
        (["logger=wandb", "logger.wandb.tags=[a,b]"], {"wandb": {"tags": ["a", "b"]}}),
        (["logger.wandb.project=x", "logger=[csv,wandb]"], {"csv": {}, "wandb": {"project": "x"}}),
        (["logger=csv", "wandb.project=x"], {"csv": {}, "wandb": {"project": "x"}}),
        ([f"logger=[csv,{{_target_: {CSV}}}]"], {"csv": {}, "1": {"_target_": CSV}}),
        ([f"logger={{_target_: {CSV}, name: q}}"], {"0": {"_target_": CSV, "name": "q"}}),
        ([f"logger.mine._target_={CSV}", "logger.jsonl={}"], {"jsonl": {}, "mine": {"_target_": CSV}}),
        ([f"logger.wandb._target_={CSV}"], {"wandb": {"_target_": CSV}}),
    ],
)
def test_loggers_on_the_command_line(line: list[str], expected: dict[str, Any]) -> None:
    assert chosen(*line) == expected


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("logger: tensorboard", [], {"tensorboard": {}}),
        ("logger: tensorboard", ["logger=csv"], {"csv": {}}),
        ("logger: tensorboard", ["logger.csv={}"], {"csv": {}, "tensorboard": {}}),
        ("logger: {wandb: {project: x}, csv: {}}", [], {"csv": {}, "wandb": {"project": "x"}}),
        ("logger: {wandb: {project: x}, csv: {}}", ["logger=wandb"], {"wandb": {"project": "x"}}),
        ("logger: {wandb: {project: x}, csv: {}}", ["logger.wandb=null"], {"csv": {}}),
        ("logger: {wandb: {project: x}}", ["logger.wandb.project=y"], {"wandb": {"project": "y"}}),
        ("logger: {wandb: {project: x}}", ["logger=null"], {}),
        ("wandb: {project: x}", [], {"wandb": {"project": "x"}}),
        ("wandb: {project: x}", ["wandb=null"], {}),
        ("wandb: {project: x}", ["logger=csv"], {"csv": {}}),
        ("wandb: {project: x}\nlogger: csv", [], {"csv": {}, "wandb": {"project": "x"}}),
        ("wandb: {project: x}\nlogger: {wandb: {project: x}}", [], {"wandb": {"project": "x"}}),
        (f"logger: [csv, {{_target_: {CSV}}}]", [], {"csv": {}, "1": {"_target_": CSV}}),
        (f"logger: {{_target_: {CSV}}}", ["logger.name=q"], {"0": {"_target_": CSV, "name": "q"}}),
        (f"logger: {{_target_: {CSV}}}", ["logger=csv"], {"csv": {}}),
        ("logger: csv", [f"logger={{_target_: {CSV}}}"], {"0": {"_target_": CSV}}),
    ],
)
def test_loggers_in_a_file(text: str, line: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    assert chosen(str(file), *line) == expected


def test_a_note_names_the_loggers_of_the_file_that_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("wandb: {project: x}\nlogger: csv")
    assert compose([str(file), "logger=[csv,jsonl]"]).notes == ["logger=csv,jsonl in place of csv,wandb"]


def test_sweeps_over_loggers(numpy_plugin: Plugin) -> None:
    user_logger = "{_target_: sequel_flax.writers.SilentWriter}"
    asked = request([f"logger=[csv,{user_logger}],[csv],null", "mode=jax"], sweep=True)
    assert [list(item.config.logger) for item in combinations(asked.overrides)] == [["csv", "1"], ["csv"], []]
    line = ["logger=[csv],[csv,tensorboard],null", "benchmark.subset=50", "benchmark.num_tasks=2"]
    assert main(["run", "-m", *line, "run_dir=sweep"]) == 0
    assert [list(config.logger) for config in numpy_plugin.built] == [["csv"], ["csv", "tensorboard"], []]


def test_list_describes_every_logger(capsys: pytest.CaptureFixture[str]) -> None:
    assert choices("logger") == ["comet", "console", "csv", "jsonl", "tensorboard", "wandb"]
    assert main(["list", "logger"]) == 0
    out = capsys.readouterr().out
    for text in ("logger=csv", "logger.wandb.entity", "logger.comet.workspace", "sequel-cl[wandb]"):
        assert text in out


BAD = [
    (["logger=tensorbord"], "logger must be one of comet, console, csv, jsonl, tensorboard, wandb, got "
     "'tensorbord'; did you mean tensorboard?"),
    (["logger={tensorbord: {}}"], "logger must be one of comet, console, csv, jsonl, tensorboard, wandb, or "
     "settings with `_target_`, got 'tensorbord'; did you mean tensorboard?"),
    (["logger.wandb.projekt=a"],
     "logger.wandb.projekt is not a setting of wandb; did you mean logger.wandb.project?"),
    (["logger.comet.entity=a"], "logger.comet.entity is not a setting of comet; it belongs to wandb"),
    (["logger.csv.path=a"], "logger.csv.path is not a setting of csv; its settings are none"),
    (["logger.comet.mode=disabled"], "logger.comet.mode must be online or offline, got 'disabled'"),
    (["logger.wandb.tags=a"], "logger.wandb.tags must be a list of text such as [a,b], got 'a'"),
    (["logger.wandb.name=3"], "logger.wandb.name must be text, a number in quotes, got 3"),
    (["wandb=3"], "wandb must be a group of settings, got 3"),
    (["logger=3"], "logger must be one of comet, console, csv, jsonl, tensorboard, wandb, got 3"),
    (["logger=csv,jsonl"], "logger=csv,jsonl has several values; use `sequel run -m` to sweep over them"),
    (["wandb.mode=online"], "logger.wandb.mode=online needs credentials, got none; set WANDB_API_KEY or run "
     "`wandb login`, or set logger.wandb.mode=offline"),
    (["logger.comet.mode=online"], "logger.comet.mode=online needs credentials, got none; set COMET_API_KEY "
     "or run `comet login`, or set logger.comet.mode=offline"),
]  # fmt: skip


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide all credentials of this machine."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "COMET_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("no_credentials")
@pytest.mark.parametrize(("line", "message"), BAD, ids=[" ".join(line) for line, _ in BAD])
def test_bad_choices_raise_before_anything_is_written(
    line: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", *line]) == 2
    assert capsys.readouterr().err == f"sequel: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_settings_given_both_ways_must_agree(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("wandb: {project: x}\nlogger: {wandb: {project: y}}")
    with pytest.raises(ValueError, match=r"logger\.wandb\.project and wandb\.project differ: 'y' and 'x'"):
        compose([str(file)])


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_logger_without_its_package_raises(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "find_spec", lambda asked: None if asked == package else find_spec(asked))
    with pytest.raises(
        ValueError, match=rf"^logger={name} needs the package {package}, .*'sequel-cl\[{name}\]'$"
    ):
        compose([f"logger={name}"])


# -- loggers that fail

FAILING = """
class Failing(Parent):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.calls = 0

    def method(self, *args, **kwargs):
        self.calls += 1
        if self.calls > 3:
            raise OSError(28, "No space left on device")

    log_metrics = write_scalars = method
"""


@BOTH
@pytest.mark.filterwarnings("default::sequel_core.runs.loggers.LoggerWarning")
def test_a_failing_logger_prints_one_line_and_the_run_continues(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = {
        "pytorch": "sequel_lightning.loggers import ConsoleLogger",
        "jax": "sequel_flax.writers import SilentWriter",
    }
    (tmp_path / f"failing_{mode}.py").write_text(f"from {parent[mode]} as Parent\n{FAILING}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    line = [*SMALL, f"mode={mode}", "benchmark.num_tasks=2"]
    loggers = f"logger={{a: {{_target_: failing_{mode}.Failing}}, jsonl: {{}}}}"
    assert main(["run", *line, loggers, "run_dir=watched"]) == 0
    assert capsys.readouterr().err == (
        "sequel: Failing failed ([Errno 28] No space left on device); the run continues without it\n"
    )
    assert main(["run", *line, "run_dir=unwatched"]) == 0
    watched, unwatched = load_result("watched"), load_result("unwatched")
    np.testing.assert_array_equal(watched.matrix, unwatched.matrix)
    steps = [step for step, _ in read_jsonl(tmp_path / "watched")["train/loss"]]
    assert steps == [6, 12, 18, 20, 26, 32, 38, 40]
