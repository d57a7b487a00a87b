"""The main command: help, version, `sequel list`, `sequel data`, and which packages it loads."""

import subprocess
import sys
from importlib import metadata

import pytest

from sequel_core.cli import COMMANDS, main
from sequel_core.experiment.aliases import SECTIONS
from sequel_core.experiment.overrides import experiments
from sequel_core.experiment.schema import choices


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ([], ["--help"], ["-h"]):
        assert main(line) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", ["run", "data", "list"])
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: sequel {command}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sequel {metadata.version('sequel-cl')}\n"


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rum"]) == 2
    assert capsys.readouterr().err == (
        "sequel: command must be one of run, compare, reproduce, report, data, list, schema, demo, got "
        "'rum'; did you mean run?\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 74.5 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nto allocate 9 bytes"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 40000000000 bytes."),
    ],
    ids=["NumPy", "torch", "torch on a GPU", "XLA"],
)
def test_out_of_memory_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("sequel_core.cli.catalogue.main", fail)
    assert main(["list"]) == 1
    message = " ".join(str(error).split())
    assert capsys.readouterr().err == (
        f"sequel: out of memory: {message}; make the network, the batches or the algorithm's memory smaller\n"
    )


def test_an_internal_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise RuntimeError("a tensor has the wrong shape")

    monkeypatch.setattr("sequel_core.cli.catalogue.main", fail)
    with pytest.raises(RuntimeError, match="wrong shape"):
        main(["list"])


def test_list_shows_every_choice_and_its_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for section in SECTIONS:
        assert all(f"{section}={name}  " in out for name in choices(section))
    assert all(name in out for name in experiments())
    line = next(line for line in out.splitlines() if "algo.ewc_lambda" in line)
    assert [cell.strip() for cell in line.split("│")[1:4]] == ["algo.ewc_lambda", "1.0", ">= 0"]


def test_list_of_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "algos"]) == 0
    assert "benchmark" not in capsys.readouterr().out
    assert main(["list", "benchmrk"]) == 2
    assert capsys.readouterr().err == (
        "sequel: section must be one of algo, benchmark, backbone, optimizer, logger, training, checkpoint, "
        "jax, experiment, or a name in one of them, got 'benchmrk'; did you mean benchmark?\n"
    )


def test_list_of_one_choice(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list", "algo", "ewc"]) == 0
    out = capsys.readouterr().out
    assert main(["list", "ewc"]) == 0
    assert capsys.readouterr().out == out
    assert "algo.ewc_lambda" in out
    assert "https://arxiv.org/abs/1612.00796" in out
    assert "si_lambda" not in out
    assert main(["list", "experiment", "ewc_rotatedmnist"]) == 0
    assert "naive_rotatedmnist" not in capsys.readouterr().out
    for line in (["ewcc"], ["algo", "ewcc"]):
        assert main(["list", *line]) == 2
        assert capsys.readouterr().err.endswith("got 'ewcc'; did you mean ewc?\n")
    assert main(["list", "training", "ewc"]) == 2
    assert (
        "section must be one of algo, benchmark, backbone, optimizer, logger, experiment, got 'training'"
        in (capsys.readouterr().err)
    )


def test_data_checks_the_bundled_digits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["data", "digits", "diabetes"]) == 0
    out = capsys.readouterr().out
    assert "bundled with scikit-learn" in out
    assert "8 x 8 x 1" in out
    assert "354 │   88 │ 10 " in out
    assert "as published" in out
    assert main(["data", "digit"]) == 2
    assert "did you mean digits?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code"),
    [(["--help"], 0), (["run", "--help"], 0), (["run", "algo=ewcc"], 2), (["run", "algo=ewc", "--cfg"], 0)],
)
def test_help_and_errors_load_no_framework(line: list[str], code: int) -> None:
    heavy = ("torch", "jax", "sklearn", "pytorch_lightning", "flax")
    program = (
        "import sys; from sequel_core.cli import main; code = main(sys.argv[1:]);"
        f" sys.exit(99 if any(name in sys.modules for name in {heavy}) else code)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program, *line], capture_output=True, check=False).returncode
        == code
    )
