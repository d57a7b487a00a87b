"""Loggers of a run: failures, tables, files; masks of secrets; who may log in to a service."""

import csv
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sequel_core.runs import services
from sequel_core.runs.formatting import markdown_table
from sequel_core.runs.loggers import (
    ConsoleTable,
    CsvTable,
    JsonLines,
    Loggers,
    LoggerWarning,
    end_summary,
    hparams_summaries,
)
from sequel_core.runs.process import event_errors_left_to_the_caller
from sequel_core.runs.services import check_service, masked, service_mode, wandb_arguments


class Calls(list[str]):
    """A logger that records its calls."""


def test_the_first_error_of_a_logger_ends_its_part_with_one_warning() -> None:
    good, bad = Calls(), Calls()
    loggers = Loggers([bad, good])

    def call(logger: Calls) -> None:
        logger.append("called")
        if logger is bad and len(bad) == 2:
            raise OSError(28, "No space left on device")

    loggers.each(call)
    with pytest.warns(LoggerWarning) as caught:
        loggers.each(call)
    assert [str(one.message) for one in caught] == [
        "Calls failed ([Errno 28] No space left on device); the run continues without it"
    ]
    loggers.each(call)
    loggers.each(call)
    assert (len(bad), len(good)) == (2, 4)
    assert list(loggers) == [good]
    assert len(loggers) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loggers.attempt(bad, call, bad)
    assert len(bad) == 2


def test_the_warning_has_the_original_error_of_a_library() -> None:
    def call(logger: Calls) -> None:
        try:
            raise OSError("the disk\nis full")
        except OSError as error:
            raise ValueError("you tried to log something strange") from error

    with pytest.warns(LoggerWarning, match=r"^Calls failed \(the disk is full\); the run continues"):
        Loggers([Calls()]).each(call)


def test_an_interruption_is_no_failure_of_a_logger() -> None:
    def interrupt(logger: Calls) -> None:
        raise KeyboardInterrupt

    loggers = Loggers([Calls()])
    with pytest.raises(KeyboardInterrupt):
        loggers.each(interrupt)
    assert len(loggers) == 1


def test_a_dead_process_of_wandb_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class WandbThing:
        """Stands for a logger of W&B."""

    def lose(logger: Any) -> None:
        raise ConnectionResetError("Connection lost")

    abandoned = []
    monkeypatch.setattr("sequel_core.runs.loggers.abandon_wandb", lambda: abandoned.append(1))
    with pytest.warns(LoggerWarning, match="Connection lost"):
        Loggers([Calls(), WandbThing()]).each(lose)
    assert abandoned == [1]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_table_grows_to_the_right_and_is_cut_back(tmp_path: Path) -> None:
    table = CsvTable(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    table.write_numbers(1, {"b": 0.1, "z": 3})
    assert table.path.read_bytes() == b"b,step,z\r\n0.1,1,3\r\n"
    table.write_numbers(2, {"b": np.float32(0.5)})
    table.write_numbers(2, {"a": 7})
    table.write_numbers(3, {"z": float("nan")})
    assert table.path.read_bytes() == b"a,b,step,z\r\n,0.1,1,3\r\n,0.5,2,\r\n7,,2,\r\n,,3,nan\r\n"
    again = CsvTable(tmp_path / "made")
    again.resume(2)
    again.write_numbers(4, {"a": 1})
    assert [row["step"] for row in rows(table.path)] == ["1", "2", "2", "4"]
    again.write_numbers(5, {"c": 1})
    assert rows(table.path)[0] == {"a": "", "b": "0.1", "c": "", "step": "1", "z": "3"}
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["metrics.csv"]
    fresh = CsvTable(tmp_path / "made")
    fresh.write_numbers(1, {"a": 1})
    assert rows(table.path) == [{"a": "1", "step": "1"}]
    empty = CsvTable(tmp_path / "none")
    empty.resume(3)
    empty.write_numbers(4, {"a": 1})
    assert rows(empty.path) == [{"a": "1", "step": "4"}]


def test_json_lines_hold_finite_numbers_and_are_cut_back(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "made")
    lines.write({"hparams": {"lr": 0.1}})
    lines.write_numbers(1, {"a": np.float64(0.1), "b": float("inf"), "self": 2})
    lines.write_table(2, "t", ["x"], [[None], [1.5]])
    lines.write_numbers(3, {"a": 1})
    path = tmp_path / "made" / "metrics.jsonl"
    expected: list[dict[str, Any]] = [
        {"hparams": {"lr": 0.1}},
        {"step": 1, "a": 0.1, "b": None, "self": 2},
        {"step": 2, "t": {"columns": ["x"], "rows": [[None], [1.5]]}},
        {"step": 3, "a": 1},
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    JsonLines(tmp_path / "made").resume(2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected[:3]
    JsonLines(tmp_path / "none").resume(2)
    JsonLines(tmp_path / "made").write({"a": 1})
    assert path.read_text() == '{"a": 1}\n'


def test_the_console_prints_after_evaluations_only(capsys: pytest.CaptureFixture[str]) -> None:
    table = ConsoleTable()
    table.write(10, {"train/loss": 0.25, "train/samples_per_second": 123456.7, "own [x]": 1e-7})
    assert capsys.readouterr().out == ""
    table.write(20, {"train/loss": 0.125})
    accuracies = {f"test/accuracy/task_{j}": j / 16 for j in range(12)}
    table.write(20, {**accuracies, "memory_bytes": 2**30})
    lines = [line.strip("│ ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["step", "20"] in lines
    assert ["train/loss", "│", "0.1250"] in lines
    assert ["train/samples_per_second", "│", "123457"] in lines
    assert ["own", "[x]", "│", "1e-07"] in lines
    assert ["memory_bytes", "│", "1073741824"] in lines
    folded = [word for line in lines for word in line if word.replace(".", "").isdigit() and "." in word]
    assert [value for value in (f"{j / 16:.4f}" for j in range(12)) if value not in folded] == []
    assert sum("test/accuracy/task_*" in line for line in lines) == 1


def test_hyper_parameters_for_tensorboard() -> None:
    config = {
        "algo": {"name": "ewc", "on": True, "n": 3},
        "list": [1, 2],
        "none": None,
        "evaluate_on": "validation",
    }
    experiment, start = (
        HParamsPluginData.FromString(summary.value[0].metadata.plugin_data.content)
        for summary in hparams_summaries(config)
    )
    infos = {info.name: info.type for info in experiment.experiment.hparam_infos}
    assert infos == {"algo.name": 1, "algo.on": 2, "algo.n": 3, "list": 1, "none": 1, "evaluate_on": 1}
    tags = [info.name.tag for info in experiment.experiment.metric_infos]
    assert tags == ["validation/average_accuracy", "validation/forgetting"]
    values = start.session_start_info.hparams
    assert values["algo.name"].string_value == "ewc"
    assert values["algo.on"].bool_value is True
    assert values["algo.n"].number_value == 3
    assert values["list"].string_value == "[1, 2]"
    ends = [end_summary(failed).value[0].metadata.plugin_data.content for failed in (False, True)]
    assert [HParamsPluginData.FromString(end).session_end_info.status for end in ends] == [1, 2]


def test_only_errors_of_tensorboards_thread_are_left_to_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = []

    def hook(args: threading.ExceptHookArgs) -> None:
        reported.append(str(args.exc_value))

    monkeypatch.setattr(threading, "excepthook", hook)

    def fail() -> None:
        raise ValueError("mine")

    class Events(threading.Thread):
        """A thread as TensorBoard's."""

    Events.__module__ = "tensorboard.summary.writer.event_file_writer"
    with event_errors_left_to_the_caller(), event_errors_left_to_the_caller():
        for thread_type in (threading.Thread, Events):
            thread = thread_type(target=fail)
            thread.start()
            thread.join()
    assert reported == ["mine"]
    assert threading.excepthook is hook


def test_markdown_tables() -> None:
    text = "| a | b |\n| --- | --- |\n| 1 | 0.5000 |\n|  | x |"
    assert markdown_table(["a", "b"], [[1, 0.5], [None, "x"]]) == text


SECRET = "s3cr3t-of-the-environment"


KEYS = {
    "***": (
        "api_key",
        "apiKey",
        "API-KEY",
        "hf_token",
        "password",
        "db_passwd",
        "client_secret",
        "accessKey",
    ),
    "x": ("max_tokens", "tokenizer", "key", "secretary", "bypass", "monkey"),
}


@pytest.mark.parametrize(("expected", "key"), [(text, key) for text, keys in KEYS.items() for key in keys])
def test_what_its_key_calls_a_secret_is_masked(expected: str, key: str) -> None:
    assert masked({key: "x"}) == {key: expected}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"credentials": {"user": "u", "all": ["a"]}}, {"credentials": {"user": "***", "all": ["***"]}}),
        ({"token": None, "use_token": True}, {"token": None, "use_token": True}),
        ({"token_rate": 0.5}, {"token_rate": 0.5}),
        ({"url": "https://me:pw@host/x?a@b"}, {"url": "https://***@host/x?a@b"}),
        ({"text": [f"use {SECRET}!"]}, {"text": ["use ***!"]}),
        ({"a": 1, "b": [0.5, None, True]}, {"a": 1, "b": [0.5, None, True]}),
    ],
)  # fmt: skip
def test_what_may_be_a_secret_is_masked(value: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_ACCESS_TOKEN", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "use")
    assert masked(value) == expected


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove all credentials of this machine; return the path from which a netrc file would be read."""
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_PROJECT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_the_mode_of_a_service_follows_the_credentials(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert service_mode("wandb", {}) == "offline"
    with pytest.raises(ValueError, match=r"logger\.wandb\.mode=online needs credentials"):
        check_service("wandb", {"mode": "online"})
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match=r"logger\.wandb\.mode=online needs credentials"):
        check_service("wandb", {"mode": None})
    check_service("wandb", {"mode": "offline"})
    monkeypatch.delenv("WANDB_MODE")
    nobody.write_text("machine other.host login user password x\n")
    assert service_mode("wandb", {}) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.host:8080")
    assert service_mode("wandb", {}) == "online"
    check_service("wandb", {"mode": "online"})
    assert service_mode("wandb", {"mode": "disabled"}) == "disabled"
    monkeypatch.setenv("COMET_API_KEY", "k")
    assert service_mode("comet", {}) == "online"


def test_wandb_is_told_what_is_set_and_no_more(
    nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"entity": "e", "project": None, "group": None, "name": "n", "tags": ["a"], "mode": None}
    arguments = wandb_arguments(given, tmp_path)
    private = arguments.pop("settings")
    expected = {"entity": "e", "name": "n", "tags": ["a"], "mode": "offline"}
    assert arguments == {"dir": str(tmp_path), "project": "uncategorized", **expected}
    assert (private.console, private.disable_git, private.save_code, private.x_disable_meta) == (
        "off",
        True,
        False,
        True,
    )
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert wandb_arguments(given, tmp_path)["project"] == "mine"
    (tmp_path / "wandb" / "offline-run-20260101_000000-abc123").mkdir(parents=True)
    again = wandb_arguments(given, tmp_path)
    assert (again["id"], again["resume"]) == ("abc123", "allow")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package comet_ml, .* pip install 'sequel-cl\[comet\]'"):
        check_service("comet", {"mode": "offline"})
