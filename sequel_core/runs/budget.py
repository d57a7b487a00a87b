"""Budgets of a comparison: the same number of steps, seconds or bytes for every run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from sequel_core.experiment.build import build_benchmark
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.hparams import ExemplarHParams, MemoryHParams
from sequel_core.runs import learner
from sequel_core.runs.learner import Mode
from sequel_core.runs.results import Result
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
"""Bytes of each unit of memory."""

Grouped = Mapping[str, Sequence[ExperimentConfig]]


class Budget(NamedTuple):
    """What every run of a comparison may use; see `parse_budget`."""

    quantity: Literal["steps", "seconds", "memory"]
    amount: float  # steps, seconds or bytes

    def __str__(self) -> str:
        """Return the budget as tables state it."""
        if self.quantity == "steps":
            return f"equal steps, {self.amount:,.0f} of training in every run"
        if self.quantity == "seconds":
            return f"equal seconds, at most {self.amount:g} s of training in whole epochs in every run"
        return f"equal memory, at most {self.amount / 10**6:g} MB kept of past tasks in every run"

    def missed(self, result: Result) -> str:
        """Return what a run used if that is not within the budget, in words; empty if it is."""
        paths = {"steps": ("steps",), "seconds": ("seconds", "train"), "memory": ("memory_bytes",)}
        used = result.number(*paths[self.quantity])
        met = used == self.amount if self.quantity == "steps" else used <= self.amount
        return "" if met else f"used {used:,.6g} {'bytes' if self.quantity == 'memory' else self.quantity}"


def parse_budget(text: str) -> Budget:
    """Return the budget that a text gives.

    Args:
        text: `steps=N`, `seconds=S` or `memory=SIZE`. SIZE is in bytes, or has a unit: kB, MB, GB, KiB, MiB
            or GiB.

    Raises:
        ValueError: the text is none of these, or the amount is not positive.

    Example:
        >>> parse_budget("memory=4MB")
        Budget(quantity='memory', amount=4000000.0)
    """
    quantity, _, amount = text.partition("=")
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([A-Za-z]*)", amount.strip())
    units = UNITS if quantity == "memory" else {"": 1}
    if quantity in ("steps", "seconds", "memory") and match and match[2] in units:
        number = float(match[1]) * units[match[2]]
        if number > 0 and (quantity == "seconds" or number.is_integer()):
            return Budget(quantity, number)  # type: ignore[arg-type]
    raise ValueError(
        "budget must be steps=N, seconds=S or memory=SIZE with a positive number, such as steps=2000, "
        f"seconds=60 or memory=4MB, got {text}"
    )


def within_budget(
    runs: Grouped, budget: Budget, say: Callable[[str], None]
) -> dict[str, list[ExperimentConfig]]:
    """Return experiments that use a budget.

    - steps: `training.epochs_per_task` is set so that every run takes exactly that number of steps.
    - seconds: `training.epochs_per_task` is set to the number of epochs that fit into the time, according to
      short runs, which are discarded.
    - memory: `algo.mem_size` is set to the largest memory that fits. Methods without such a setting are
      checked.

    Args:
        runs: experiments by label; those of a label and a framework differ in their seeds only.
        budget: what every run may use.
        say: prints a line on each label and framework.

    Raises:
        ValueError: the budget cannot be met; the error names the label and what can be.
    """
    done: dict[tuple[str, Mode], Callable[[ExperimentConfig], ExperimentConfig]] = {}
    budgeted: dict[str, list[ExperimentConfig]] = {}
    for label, group in runs.items():
        for config in group:
            key = label, config.mode
            if key not in done:
                name = f"{label}, {config.mode}"
                done[key], line = FUNCTIONS[budget.quantity](config, budget.amount, name)
                say(f"{name}: {line}")
            budgeted.setdefault(label, []).append(done[key](config))
    return budgeted


Change = tuple[Callable[[ExperimentConfig], ExperimentConfig], str]


def _with_epochs(config: ExperimentConfig, epochs: int) -> ExperimentConfig:
    return replace(config, training=replace(config.training, epochs_per_task=epochs))


def _steps(config: ExperimentConfig, steps: float, name: str) -> Change:
    """Set the number of epochs so that a run takes a number of steps."""
    if isinstance(config.algo, ExemplarHParams):
        raise ValueError(
            f"budget=steps needs methods whose number of steps is known, got {name}, which also trains on "
            "its exemplars; use seconds or memory, or leave it out"
        )
    training = config.training
    of_epoch = sum(
        plan.steps_per_epoch(len(task.train), training.batch_size, training.drop_last)
        for task in config.algo.training_tasks(build_benchmark(config), training.seed)
    )
    epochs, rest = divmod(int(steps), of_epoch)
    if rest or not epochs:
        fits = " or ".join(f"{n * of_epoch}" for n in (epochs, epochs + 1) if n)
        raise ValueError(
            f"budget=steps must be a multiple of {of_epoch}, one epoch of every task, for {name}, got "
            f"{steps:.0f}; use {fits}"
        )
    return partial(_with_epochs, epochs=epochs), f"{epochs} epochs of each task, {steps:,.0f} steps"


def _seconds(config: ExperimentConfig, seconds: float, name: str) -> Change:
    """Set the number of epochs to the largest for which a run's training takes at most some seconds."""
    epochs = epochs_in(seconds, partial(_training_seconds, config), name)
    return partial(_with_epochs, epochs=epochs), f"{epochs} epochs of each task in {seconds:g} s"


def _training_seconds(config: ExperimentConfig, epochs: int) -> float:
    """Return the seconds of training of a run that is not kept."""
    from sequel_core.cli.run import execute

    short = replace(_with_epochs(config, epochs), evaluate_every="end", logger={}, callbacks=())
    with TemporaryDirectory() as folder:
        return execute(short, Path(folder) / "run", progress=False).number("seconds", "train")


def epochs_in(seconds: float, train: Callable[[int], float], name: str) -> int:
    """Return the number of epochs that take at most some seconds, as far as shorter runs tell.

    The epochs are doubled until they take a quarter of the time. What one more epoch takes follows from the
    first and the last of these runs, so that compilation, which is the same for all, does not count twice.

    Args:
        seconds: the time.
        train: returns the seconds of a number of epochs.
        name: of the run, for errors.

    Raises:
        ValueError: one epoch takes longer.
    """
    epochs, first = 1, train(1)
    if first > seconds:
        raise ValueError(
            f"budget=seconds must be enough for one epoch of every task, which took {first:.1f} s for "
            f"{name}, got {seconds:g}; raise it"
        )
    last = first
    while last < seconds / 4:
        epochs *= 2
        last = train(epochs)
    per_epoch = first if epochs == 1 else max(last - first, 1e-9) / (epochs - 1)
    return 1 + int((seconds - first) / per_epoch)


def _memory(config: ExperimentConfig, size: float, name: str) -> Change:
    """Set the size of the memory to the largest that fits."""
    hparams, benchmark = config.algo, build_benchmark(config)
    memory_of = partial(_memory_bytes, config, benchmark)
    if not hasattr(hparams, "mem_size"):
        kept = memory_of()
        if kept > size:
            raise ValueError(
                f"budget=memory must be at least {kept} bytes, which {name} keeps whatever its settings, got "
                f"{size:.0f}; raise it or leave {name} out"
            )
        return lambda config: config, f"keeps {kept:,} bytes"
    spec = benchmark.spec
    unit = hparams.parts(spec) if isinstance(hparams, MemoryHParams) else 1
    sets = int(spec.mask.sum()) if isinstance(hparams, ExemplarHParams) else 1
    samples = max(config.training.batch_size, getattr(hparams, "mem_batch_size", 1), sets)
    least = -(-samples // unit) * unit
    kept, more = memory_of(least), memory_of(least + unit)
    if kept > size:
        raise ValueError(
            f"budget=memory must be at least {kept} bytes, {least} samples of {name}, got {size:.0f}; "
            f"raise it or leave {name} out"
        )
    mem_size = least + int((size - kept) // (more - kept)) * unit
    return partial(
        _with_memory, mem_size=mem_size
    ), f"mem_size={mem_size} keeps {memory_of(mem_size):,} bytes"


def _with_memory(config: ExperimentConfig, mem_size: int) -> ExperimentConfig:
    sizes: dict[str, Any] = {"mem_size": mem_size}
    if isinstance(config.algo, MemoryHParams):
        sizes["per_task_memory_samples"] = None
    return replace(config, algo=replace(config.algo, **sizes))


def _memory_bytes(config: ExperimentConfig, benchmark: Benchmark, mem_size: int | None = None) -> int:
    """Return the bytes that a learner keeps of past tasks, before its first step."""
    from sequel_core.cli.run import build

    sized = config if mem_size is None else _with_memory(config, mem_size)
    with learner.plugin(config.mode).process_settings(config), TemporaryDirectory() as folder:
        made = build(replace(sized, logger={}, callbacks=()), benchmark, Path(folder))[0]
        kept: int = made.memory_bytes()
        made.close()
    return kept


FUNCTIONS: dict[str, Callable[[ExperimentConfig, float, str], Change]] = {
    "steps": _steps,
    "seconds": _seconds,
    "memory": _memory,
}
