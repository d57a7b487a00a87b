"""What a run shows, on a terminal that is recorded and whose clock is set by hand, and elsewhere."""

import io
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from sequel_core.objectives import Score
from sequel_core.runs.console import Display
from sequel_core.runs.learner import Learner, Progress
from sequel_core.runs.orchestrator import Shown
from sequel_core.runs.results import Result

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"


class Stream(list[Any]):
    name = "digits"


def stream(*names: str) -> Any:
    """Return all that the display needs of a benchmark."""
    return Stream(SimpleNamespace(index=i, name=name) for i, name in enumerate(names))


def learner(shows_progress: bool = False) -> Learner:
    hparams = SimpleNamespace(name="ewc")
    return cast(
        Learner,
        SimpleNamespace(shows_progress=shows_progress, score=Score(), hparams=hparams, mode="jax"),
    )


class Terminal:
    """A rich console that writes into memory, with a clock that stands still until it is set."""

    def __init__(self, width: int = 80, terminal: bool = True) -> None:
        self.now = 0.0
        self.console = Console(
            file=io.StringIO(),
            force_terminal=terminal,
            width=width,
            color_system=None,
            get_time=lambda: self.now,
            _environ={"TERM": "xterm"},
        )

    @property
    def written(self) -> str:
        return cast(io.StringIO, self.console.file).getvalue()

    @property
    def lines(self) -> list[str]:
        """What was written, frame after frame, without the control codes; the last frame is always new."""
        return [line.rstrip() for line in CONTROL.sub("", self.written).split("\n") if line]


def progress(step: int, steps: int, epoch: int = 0, accuracy: float = 0.955) -> Progress:
    return Progress(step, epoch, step, steps, 0.1234, accuracy, 0.1, {})


def row(*accuracies: float) -> Any:
    return np.array(accuracies)


def run(
    terminal: Terminal, tasks: int = 2, shown: Shown = True, names: tuple[str, str] = ("odd", "even")
) -> None:
    """Run two tasks of two epochs of 100 steps, 1,000 steps a second, evaluated for one second each."""
    benchmark = stream(*names)
    with Display(benchmark, learner(), shown, terminal.console) as display:
        for task in benchmark[:tasks]:
            display.start(task, epochs=2)
            for step in range(20, 201, 20):
                terminal.now += 0.02
                display.update(task, progress(step, 200, epoch=(step - 1) // 100))
            terminal.now += 1
            display.finish(task, row(0.8, np.nan) if task.index == 0 else row(0.6, 0.9))


def words(line: str) -> str:
    """Return a line with its bar as `=`."""
    return re.sub("[━╸╺]+", "=", re.sub(" +", " ", line))


def test_a_line_per_task_where_there_is_no_terminal() -> None:
    terminal = Terminal(width=20, terminal=False)  # a file has no width, so nothing is wrapped
    run(terminal)
    assert terminal.written == (
        "task 1/2 odd: accuracy 80.00 %, average 80.00 % over 1 seen\n"
        "task 2/2 even: accuracy 90.00 %, average 75.00 % over 2 seen\n"
    )


@pytest.mark.parametrize(("resumed", "start"), [(False, ""), (True, "resuming ")])
def test_a_line_before_the_first_task(
    resumed: bool, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, text in ((tmp_path / "runs" / "[1]", "runs/[1]"), (Path("/elsewhere"), "/elsewhere")):
        terminal = Terminal(width=20, terminal=False)
        Display(stream("odd", "even"), learner(), True, terminal.console).announce(folder, resumed)
        assert terminal.written == f"{start}ewc on digits, jax, 2 tasks; results in {text}\n"


def test_bars_on_a_terminal() -> None:
    terminal = Terminal()
    run(terminal, tasks=1)
    assert "task 1/2 odd: accuracy 80.00 %, average 80.00 % over 1 seen" in terminal.lines
    *_, whole, task, text = terminal.lines
    # From the first report, at 0.02 s, to the last, at 0.2 s, the stream came on by 0.9 of a task; it has one
    # left: 0.2 s, rounded up.
    assert words(whole) == "stream = task 1/2 0:00:01"
    assert words(task) == "odd = 200/200 steps 0:00:00"
    assert [len(re.sub("[^━╸]", "", bar)) for bar in (whole, task)] == [14, 28]
    assert text == "epoch 2/2, 1,000 steps/s, loss 0.1234, accuracy 95.50 %, average 80.00 %"
    assert all(cell_len(line) <= 80 for line in terminal.lines)
    assert terminal.written.count(HIDE_CURSOR) == terminal.written.count(SHOW_CURSOR) == 1
    assert terminal.written.endswith(ERASE_LINE)  # of the last frame nothing is left


def test_the_time_left_counts_what_evaluations_take() -> None:
    terminal = Terminal(width=100)
    benchmark = stream(*"abcd")
    with Display(benchmark, learner(), True, terminal.console) as display:
        for task in benchmark[:2]:
            display.start(task, epochs=1)
            for step in (50, 100):
                terminal.now += 10
                display.update(task, progress(step, 100))
            terminal.now += 40
            display.finish(task, row(0.5, 0.5, np.nan, np.nan))
    # 1.5 tasks in the 70 s from the first report to the last; the 2 that are left take 93.3 s.
    assert words(terminal.lines[-3]) == "stream = task 2/4 0:01:34"


def test_what_others_print_stays_whole_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    benchmark = stream("a")
    handler, logger = logging.StreamHandler(), logging.getLogger("tests.console")  # takes sys.stderr as it is
    monkeypatch.setattr(logger, "handlers", [handler])
    with Display(benchmark, learner(), True, terminal.console) as display:
        display.start(benchmark[0], epochs=1)
        display.update(benchmark[0], progress(50, 100))
        print("a line of the user's")
        print("a user's warning", file=sys.stderr)
        logger.warning("a user's record")
        display.finish(benchmark[0], row(1.0))
    assert {"a line of the user's", "a user's warning", "a user's record"} <= set(terminal.lines)
    assert handler.stream is sys.stderr
    assert terminal.lines[-1] == "loss 0.1234, accuracy 95.50 %, average 100.00 %"


@pytest.mark.parametrize("width", [30, 40, 60])
def test_a_narrow_terminal(width: int) -> None:
    terminal = Terminal(width)
    run(terminal, 2, "bars", ("classes 0, 1, 2, 3, 4", "classes 5, 6, 7, 8, 9"))
    assert all(cell_len(line) <= width for line in terminal.lines)
    text = " ".join(line.strip() for line in terminal.lines)
    for part in ("200/200 steps", "1,000 steps/s", "loss 0.1234", "accuracy 95.50 %", "average 75.00 %"):
        assert part in text


def test_bars_alone_leave_nothing() -> None:
    terminal, file = Terminal(), Terminal(terminal=False)
    run(terminal, shown="bars")
    assert not any(line.startswith("task ") for line in terminal.lines)
    assert "stream" in terminal.written
    run(file, shown="bars")
    assert file.written == ""


def test_nothing_at_all() -> None:
    terminal = Terminal()
    run(terminal, shown=False)
    assert terminal.written == ""


def test_no_bars_beside_those_of_the_learner_or_on_a_dumb_terminal() -> None:
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    for console, shows_progress in ((Terminal().console, True), (dumb, False)):
        benchmark = stream("a")
        with Display(benchmark, learner(shows_progress), True, console) as display:
            display.start(benchmark[0], epochs=1)
            display.update(benchmark[0], progress(100, 100))
            display.finish(benchmark[0], row(1.0))
        written = cast(io.StringIO, console.file).getvalue()
        assert written == "task 1/1 a: accuracy 100.00 %, average 100.00 % over 1 seen\n"


@pytest.mark.parametrize(("epochs", "end"), [(1, "stopped early"), (5, "stopped early in epoch 2/5")])
def test_a_task_that_was_stopped_early(epochs: int, end: str) -> None:
    terminal = Terminal(width=100)
    benchmark = stream("a", "b")
    with Display(benchmark, learner(), True, terminal.console) as display:
        display.start(benchmark[0], epochs)
        display.update(benchmark[0], progress(40, 100, epoch=1))
        display.finish(benchmark[0], row(0.5, np.nan))
        display.start(benchmark[1], epochs)
    assert f"task 1/2 a: accuracy 50.00 %, average 50.00 % over 1 seen, {end}" in terminal.lines
    *_, whole, task, text = terminal.lines  # of the next task, which has not yet reported
    assert words(whole).startswith("stream = task 2/2 ")
    assert words(task) == "b ="
    assert text == "average 50.00 %"


def test_evaluations_within_a_task_move_the_average() -> None:
    terminal = Terminal()
    benchmark = stream("a", "b")
    with Display(benchmark, learner(), "bars", terminal.console) as display:
        display.start(benchmark[1], epochs=1)
        display.update(benchmark[1], progress(40, 100, accuracy=np.nan))
        display.evaluated(1, row(0.25, 0.5))
    assert "loss 0.1234, average 37.50 %" in terminal.lines


def test_an_error_leaves_a_clean_terminal() -> None:
    terminal = Terminal()
    benchmark = stream("a")
    with pytest.raises(OSError, match="no space"), Display(benchmark, learner(), True, terminal.console):
        raise OSError("no space")
    assert terminal.written.count(HIDE_CURSOR) == terminal.written.count(SHOW_CURSOR) == 1
    assert terminal.written.endswith(ERASE_LINE)


def test_names_are_text_and_no_markup() -> None:
    name = "[red]x[/nope]"
    terminal = Terminal(width=120)
    benchmark = stream(name)
    benchmark.name = name
    display = Display(benchmark, learner(), True, terminal.console)
    with display:
        display.start(benchmark[0], epochs=1)
        display.finish(benchmark[0], row(1.0))
    summary = {
        "mode": "jax",
        "split": "test",
        "average_accuracy": 0.5,
        "forgetting": None,
        "steps": 7,
        "seconds": {"total": 3.0, "train": 2.0, "evaluate": 1.0},
    }
    display.summarise(Result(Path(name), {}, np.ones((1, 1)), summary))
    assert f"task 1/1 {name}: accuracy 100.00 %, average 100.00 % over 1 seen" in terminal.lines
    text = "\n".join(terminal.lines)
    assert f"{name}, jax, test accuracy" in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in terminal.lines if "│" in line]
    assert cells == [
        ["average accuracy", "50.00 %"],
        ["steps", "7"],
        ["seconds", "3.0 (train 2.0, evaluate 1.0)"],
        ["results", name],
    ]
