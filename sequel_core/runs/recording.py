"""Recording: what a run measures goes to its directory and to the learner's loggers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np

from sequel_core.objectives import ACCURACY, Score
from sequel_core.runs import metrics
from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.learner import EvaluateOn, Evaluation, Learner, Progress
from sequel_core.runs.memory import peak_memory_bytes
from sequel_core.runs.results import SCORE
from sequel_core.runs.state import RunState
from sequel_core.runs.versions import commit, loaded_versions, machine
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Task


def training_numbers(
    progress: Progress, samples_per_second: float, score: Score = ACCURACY
) -> dict[str, float]:
    """Return what the loggers receive of a learner's progress report, by tag."""
    scores = {"loss": progress.loss}
    for name, value in {score.key: progress.score, "learning_rate": progress.learning_rate}.items():
        if not math.isnan(value):
            scores[name] = value
    scores["samples_per_second"] = samples_per_second
    return {**{f"train/{name}": value for name, value in scores.items()}, **progress.extra}


class Recorder:
    """Records training progress, evaluations and the summary of one run.

    Args:
        learner: whose loggers receive the numbers.
        benchmark: the stream.
        directory: of the run.
        split: that the matrix is measured on.
        state: of the run; evaluations are entered into it.
    """

    def __init__(
        self,
        learner: Learner,
        benchmark: Benchmark,
        directory: RunDirectory,
        split: EvaluateOn,
        state: RunState,
    ) -> None:
        self._learner, self._benchmark, self._directory = learner, benchmark, directory
        self._split, self._state, self._score = split, state, learner.score
        self._average = self._score.of("average_score")
        self.restart_rate()

    def restart_rate(self) -> None:
        """Measure samples per second from now on."""
        self._rate_start = (time.perf_counter(), self._learner.step)

    def progress(self, task: Task, progress: Progress) -> None:
        """Record loss, score and speed of the training batches since the last report."""
        now, (start, step) = time.perf_counter(), self._rate_start
        self._rate_start = (now, progress.step)
        rate = (progress.step - step) * self._learner.training.batch_size / max(now - start, 1e-9)
        record = {self._score.key if k == "score" else k: v for k, v in progress._asdict().items()}
        extra = record.pop("extra")
        self._directory.append_metrics(
            {"kind": "train", "task": task.index, **record, "samples_per_second": rate, **extra}
        )
        self._learner.log(training_numbers(progress, rate, self._score))

    def evaluations(
        self, evaluations: Mapping[int, Evaluation], after: int | None, within_task: bool
    ) -> FloatArray:
        """Record evaluations on the split of the matrix.

        Args:
            evaluations: by the index of the evaluated task.
            after: index of the task trained on last; None before the first.
            within_task: whether the training on that task is still in progress.

        Returns:
            The scores `[T]`; nan for tasks that were not evaluated.
        """
        row = np.full(len(self._benchmark), np.nan)
        for j, evaluation in evaluations.items():
            row[j] = evaluation.score
            self._append(evaluation, after, within_task, j, self._split)
        self._state.extra.update(self._further_averages(list(evaluations.values())))
        scores = {f"{self._score.key}/task_{j}": e.score for j, e in evaluations.items()}
        scores[self._average] = float(np.nanmean(row))
        end_of_task = after is not None and not within_task
        if after is not None and end_of_task:
            scores |= self._end_of_task(after, row)
        named = {f"{self._split}/{name}": value for name, value in scores.items()}
        self._learner.log({**named, "memory_bytes": self._learner.memory_bytes()})
        if self._learner.logs and end_of_task:
            self._log_matrix()
        self.restart_rate()
        return row

    def other_split(self, evaluations: Sequence[Evaluation], split: EvaluateOn) -> None:
        """Record the final evaluation of all tasks on the split that the matrix is not measured on."""
        for j, evaluation in enumerate(evaluations):
            self._append(evaluation, len(self._benchmark) - 1, False, j, split)
        average, name = float(np.mean([evaluation.score for evaluation in evaluations])), self._average
        self._state.extra[f"{split}_{name}"] = average
        self._learner.log({f"{split}/{name}": average})

    def summary(self, status: str, checkpoint_bytes: int) -> None:
        """Write the matrix and `summary.json`.

        Args:
            status: how the run ended: finished, interrupted, diverged or failed.
            checkpoint_bytes: disk space of the checkpoints.
        """
        learner, benchmark, state = self._learner, self._benchmark, self._state
        total = state.stopwatch.total()
        spent = {part: state.stopwatch.seconds[part] for part in ("train", "evaluate", "checkpoint")}
        samples = [len(task.split(self._split)) for task in benchmark.tasks]
        scores = metrics.summarise(state.matrix, state.baseline, samples, self._score)
        self._directory.write_matrix(state.matrix, self._score)
        self._directory.write_summary(
            {
                "status": status,
                "mode": learner.mode,
                "scenario": benchmark.scenario,
                "task_given": learner.hparams.knows_task(benchmark.spec),
                "split": self._split,
                SCORE: self._score._asdict(),
                "samples": samples,
                **scores,
                f"{self._split}_{self._average}": scores[self._average],
                **state.extra,
                "steps": learner.step,
                "seconds": {**spent, "other": total - sum(spent.values()), "total": total},
                "memory_bytes": learner.memory_bytes(),
                "checkpoint_bytes": checkpoint_bytes,
                "peak_memory_bytes": peak_memory_bytes(),
                "threads": learner.threads(),
                "num_devices": learner.num_devices,
                "versions": loaded_versions(),
                "machine": machine(),
                "commit": commit(),
            }
        )

    def _end_of_task(self, after: int, row: FloatArray) -> dict[str, float]:
        """Enter a row into the matrix; return the metrics that can now be computed."""
        matrix = self._state.matrix
        matrix[after] = row
        self._directory.write_matrix(matrix, self._score)
        forgetting = metrics.forgetting(matrix[: after + 1, : after + 1], self._score)
        return {} if math.isnan(forgetting) else {"forgetting": forgetting}

    def _further_averages(self, evaluations: Sequence[Evaluation]) -> dict[str, float]:
        """Return mean scores of masked and alternative predictions, if there are any."""
        further = [self._further_scores(evaluation) for evaluation in evaluations]
        return {f"{name}_{self._average}": float(np.mean([s[name] for s in further])) for name in further[0]}

    def _further_scores(self, evaluation: Evaluation) -> dict[str, float]:
        """Return the scores of masked and alternative predictions, if there are any."""
        masks = self._benchmark.scenario == "class" and not math.isnan(evaluation.masked_score)
        masked = {"masked": evaluation.masked_score} if masks else {}
        return {**masked, **evaluation.alternatives}

    def _append(
        self, evaluation: Evaluation, after: int | None, within_task: bool, task: int, split: EvaluateOn
    ) -> None:
        """Append one evaluation to `metrics.jsonl`."""
        key = self._score.key
        further = {f"{name}_{key}": score for name, score in self._further_scores(evaluation).items()}
        values = {key: evaluation.score, "loss": evaluation.loss, **further}
        place = {"after_task": after, "within_task": within_task, "task": task, "split": split}
        self._directory.append_metrics({"kind": "evaluation", "step": self._learner.step, **place, **values})

    def _log_matrix(self) -> None:
        """Send the matrix to the loggers, as an image and as a table."""
        from sequel_core.report.figures import matrix_picture  # loads matplotlib

        name, matrix = f"{self._split}/{self._score.key}_matrix", self._state.matrix
        title = f"{self._benchmark.name}: {self._split} {self._score.name}"
        self._learner.log_image(name, matrix_picture(matrix, title, self._score))
        rows = [[i, *(None if math.isnan(v) else v for v in row)] for i, row in enumerate(matrix.tolist())]
        columns = ["after_task", *(f"task_{j}" for j in range(len(self._benchmark)))]
        self._learner.log_table(f"{name}_table", columns, rows)
