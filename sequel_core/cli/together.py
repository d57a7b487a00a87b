"""Many runs at once, by the plug-in for JAX: the launcher `vmap`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sequel_core.cli.run import build, print_notes, ranked_by, record_failure
from sequel_core.experiment.build import build_benchmark
from sequel_core.experiment.compose import compose
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.runs import learner
from sequel_core.runs.orchestrator import Resume
from sequel_core.runs.results import Result
from sequel_core.stream.benchmark import Benchmark

Outcome = Result | Exception


def run_jobs(
    jobs: Sequence[tuple[list[str], Path]], width: int | None, *, quiet: bool, resume: Resume
) -> list[float]:
    """Run the jobs of a sweep at once.

    Args:
        jobs: the overrides and the directory of each job.
        width: see `sequel_flax.run_together`.
        quiet: print nothing but errors.
        resume: see `sequel_core.run`.

    Returns:
        The score of each job, see `ranked_by`; nan if it failed. Its directory then contains the reason.

    Raises:
        ValueError: a job is not for JAX; nothing was trained.
    """
    composed = [compose(overrides) for overrides, _ in jobs]
    print_notes(Console(quiet=quiet), [note for item in composed for note in item.notes])
    directories = [directory for _, directory in jobs]
    outcomes = execute_together([item.config for item in composed], directories, width, not quiet, resume)
    for outcome, directory in zip(outcomes, directories, strict=True):
        if isinstance(outcome, Exception):
            directory.mkdir(parents=True, exist_ok=True)
            record_failure(outcome, directory)
    return [math.nan if isinstance(outcome, Exception) else ranked_by(outcome) for outcome in outcomes]


def execute_together(
    configs: Sequence[ExperimentConfig],
    run_dirs: Sequence[Path],
    width: int | None = None,
    progress: bool = True,
    resume: Resume = False,
) -> list[Outcome]:
    """Run experiments at once; `sequel_core.cli.run.execute` runs one.

    Args:
        configs: checked configurations.
        run_dirs: the directory of each run.
        width: see `sequel_flax.run_together`.
        progress: whether to print a line at the end of each run.
        resume: see `sequel_core.run`.

    Returns:
        For each run its result, or the exception that ended it.

    Raises:
        ValueError: a configuration is not for JAX, or their dtypes differ; nothing was trained.
    """
    check_together(configs)
    plugin = learner.plugin("jax")
    outcomes: dict[int, Any] = {}
    streams: dict[str, Benchmark] = {}
    with plugin.process_settings(configs[0]):
        made, benchmarks, arguments = {}, {}, {}
        for k, config in enumerate(configs):
            try:
                stream = _shared(config, streams)
                made[k], callbacks = build(config, stream, run_dirs[k])
            except Exception as error:  # the others run
                outcomes[k] = error
                continue
            benchmarks[k], arguments[k] = stream, _arguments(config, callbacks)
        if made:
            results = plugin.run_together(
                [*made.values()],
                [*benchmarks.values()],
                [run_dirs[k] for k in made],
                width=width,
                progress=progress,
                resume=resume,
                each=[*arguments.values()],
            )
            outcomes |= dict(zip(made, results, strict=True))
    return [outcomes[k] for k in range(len(configs))]


def check_together(configs: Sequence[ExperimentConfig]) -> None:
    """Raise ValueError if runs cannot be started at once."""
    for config in configs:
        if config.mode != "jax":
            raise ValueError(f"hydra/launcher=vmap needs mode=jax, got mode={config.mode}; set mode=jax")
    dtypes = sorted({config.training.dtype for config in configs})
    if len(dtypes) > 1:
        raise ValueError(
            f"runs at once need the same training.dtype, got {' and '.join(dtypes)}; start the runs of each "
            "dtype separately"
        )


def _shared(config: ExperimentConfig, streams: dict[str, Benchmark]) -> Benchmark:
    """Return the benchmark of an experiment; the same object for equal settings, to hold the data once."""
    training = config.training
    key = repr((config.benchmark, training.batch_size, training.eval_batch_size, config.evaluate_on))
    if "benchmark" in config.user_code or key not in streams:
        streams[key] = build_benchmark(config)
    return streams[key]


def _arguments(config: ExperimentConfig, callbacks: Sequence[Any]) -> Mapping[str, Any]:
    """Return the arguments of `sequel_core.run` that an experiment has."""
    return {
        "evaluate_every": config.evaluate_every,
        "evaluate_on": config.evaluate_on,
        "evaluate_future": config.evaluate_future,
        "config": config.plain(),
        "callbacks": callbacks,
        "checkpoint": config.checkpoint,
    }
