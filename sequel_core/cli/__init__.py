"""The `sequel` command: `main` for use in-process, `entry_point` for the shell."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import TextIO

from sequel_core.runs.checkpoints import CheckpointWarning
from sequel_core.runs.learner import DivergenceError, LostProcessError
from sequel_core.runs.loggers import LoggerWarning
from sequel_core.runs.signals import InterruptedRunError
from sequel_core.settings import nearest

COMMANDS = {
    "run": "run an experiment, or a sweep with -m",
    "compare": "run experiments and compare them: both frameworks, several algorithms, seeds",
    "reproduce": "run an experiment with several seeds and compare it with the published number",
    "report": "write an HTML report of runs: matrices, curves, tables; also PNG and Markdown",
    "data": "download and check data sets",
    "list": "list algorithms, benchmarks, backbones, optimizers, loggers and experiments with their settings",
    "schema": "print the JSON schema of experiment files, for editors",
    "demo": "naive finetuning against EWC in both frameworks, on bundled data",
}
USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130

HELP = """usage: sequel COMMAND [ARGUMENTS]

Continual learning in PyTorch Lightning and in JAX/Flax: every method in both, the same computation.

commands:
{commands}

options:
  -h, --help     show this, or a command's own help: sequel run --help
  --version      show the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments without the program name; None for `sys.argv`.

    Returns:
        The exit code: 0 for success, 1 for a failed run, 2 for invalid input (standard error has one line
        with the reason), and 128 plus the number of the signal that ended the run: 130 for Ctrl-C, 143 for
        SIGTERM.

    Example:
        >>> main(["--help"])  # doctest: +ELLIPSIS
        usage: sequel COMMAND [ARGUMENTS]
        ...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _warnings_on_one_line():
            return _dispatch(arguments)
    except (DivergenceError, LostProcessError) as error:
        return _say(FAILED, str(error))
    except InterruptedRunError as error:
        return _say(error.exit_code, str(error))
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        return _say(USER_ERROR, f"{path}{error.strerror or error}")
    except ValueError as error:
        return _say(USER_ERROR, str(error))
    except KeyboardInterrupt as stop:
        if isinstance(stop.__cause__, InterruptedRunError):  # in a sweep
            return _say(stop.__cause__.exit_code, str(stop.__cause__))
        return _say(INTERRUPTED, "interrupted")
    except SystemExit as stop:  # argparse, after its help
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        if not _out_of_memory(error):
            raise
        remedy = "make the network, the batches or the algorithm's memory smaller"
        return _say(FAILED, f"out of memory: {error}; {remedy}")


def entry_point() -> None:
    """Run the command line of the process and exit."""
    sys.exit(main())


def _dispatch(arguments: list[str]) -> int:
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0
    if command == "--version":
        print(f"sequel {metadata.version('sequel-cl')}")
        return 0
    if command not in COMMANDS:
        raise ValueError(
            f"command must be one of {', '.join(COMMANDS)}, got {command!r}{nearest(command, list(COMMANDS))}"
        )
    module = {"list": "catalogue"}.get(command, command)
    run: Callable[[list[str]], int] = import_module(f"sequel_core.cli.{module}").main
    return run(rest)


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Print warnings of the run in the format of the command's other messages."""
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, LoggerWarning | CheckpointWarning):
                _say(0, str(message))
            else:
                before(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _out_of_memory(error: Exception) -> bool:
    """Return whether the host or the accelerator ran out of memory, judged by the frameworks' messages."""
    words = ("out of memory", "can't allocate memory", "resource_exhausted")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in words)


def _say(code: int, message: str) -> int:
    print(f"sequel: {' '.join(message.split())}", file=sys.stderr)
    return code
