"""Reports: loss and score of the training steps, counted on the device, and scores of evaluations."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from sequel_core.hparams import PhaseHParams
from sequel_core.stream.task import Batch, Task
from sequel_lightning._compat import attached_trainer, logging_step
from sequel_lightning.batches import check_batch, check_tasks, first_wrong, wrong_label
from sequel_lightning.objectives import Objective, given, metric_outputs, scores_of
from sequel_lightning.scores import TaskScores

if TYPE_CHECKING:
    from sequel_lightning.algorithm import Algorithm

HELD = 1 << 16
"""Numbers of outputs that may wait to be counted; counting several steps at once saves time."""
STEP = 1 << 8
"""Numbers that a waiting step counts as, in addition to its outputs."""
NEVER = 1 << 62


class Report(NamedTuple):
    """Means of the training batches since the last report."""

    loss: float
    score: float
    penalty: float  # the part of the loss that the method adds to the task's own
    first_bad_step: int | None  # how many steps before the end of the report the loss was first not finite
    extra: dict[str, float]  # the user's own metrics


class Counts(NamedTuple):
    """Sums over the steps that are counted, on the device."""

    steps: Tensor  # int64 ()
    weight: Tensor  # sum of the weights of the scores, float64 () if the device has it
    loss: Tensor  # sum of the steps' losses, likewise
    score: Tensor  # weighted sum of the scores, likewise
    bad_step: Tensor  # the first whose loss is not finite, from 0, else NEVER; int64 ()
    wrong: Tensor  # 1, label and task of the first label that is not of its task, else 0s; int64 [3]


class RunningMetrics:
    """The number of steps, and the sums of losses and scores since the last report.

    It is a plain object, because a module's attributes are slow. Several steps are counted at once, because
    counting each would be slow. At most `HELD` numbers and one batch wait for that: logits and labels or, for
    other targets, sums of scores.

    Args:
        objective: gives the score.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        plain = objective.metric is None and objective.score_weight is None and objective.values is not None
        self.defers = (
            objective.classification and plain
        )  # whether scores are computed for several steps at once
        self.steps_done = 0  # since the start of the stream
        self.task_start = 0  # steps done when the task began
        # loss, logits, labels, tasks; sums of the scores and of their weights [2] in place of other outputs
        self.waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.numbers = 0  # that wait
        self.allowed_labels: Tensor | None = None  # as in check_batch; None if labels are not checked
        self.counts: Counts | None = None  # of the steps that no longer wait
        self.penalties: list[Tensor] = []  # that methods added to the losses since the last report
        self.report: Report | None = None  # of the latest step, if it made one

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningMetrics:
        """Copy the numbers of steps only: a copy of the module, made by weight averaging, is not trained."""
        new = RunningMetrics(self.objective)
        new.steps_done, new.task_start = self.steps_done, self.task_start
        return new

    def clear(self) -> None:
        """Forget the steps that were not reported."""
        self.waiting.clear()
        self.penalties.clear()
        self.numbers, self.counts = 0, None

    def add(self, loss: Tensor, outputs: Any, batch: Batch) -> None:
        """Add a step: its loss (), and what the network returned for its batch."""
        y, scored = batch.y, outputs
        if not (self.defers and isinstance(outputs, Tensor)):
            scored = self.score_sums(outputs, batch).to(loss.device)
            if not isinstance(y, Tensor) or y.ndim != 1:
                y = batch.t  # no labels, so it is not used
        self.waiting.append((loss, scored, y, batch.t))
        self.steps_done += 1
        self.report = None
        self.numbers += scored.numel() + STEP
        if self.numbers > HELD:
            self.count()

    def score_sums(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the weighted sum of the scores of a batch, and the sum of the weights, `[2]`."""
        if self.objective.metric is not None:
            return torch.zeros(2)
        with torch.no_grad():
            values, weights = scores_of(self.objective, lambda x: outputs, batch)
            return torch.stack([(values * weights).sum(), weights.sum().to(values)])

    def count(self) -> Counts:
        """Count the steps that wait, and return the sums, without a synchronisation with the device."""
        counts, waiting = self.counts, self.waiting
        if counts is not None and not waiting:
            return counts
        losses = torch.stack([step[0] for step in waiting])
        y = torch.cat([step[2] for step in waiting])
        exact = torch.float32 if losses.device.type == "mps" else torch.float64  # it has no float64
        if counts is None:
            zero = torch.zeros((), dtype=torch.int64, device=losses.device)
            none = zero.to(exact)
            counts = Counts(zero, none, none, none, zero + NEVER, zero.repeat(3))
        if waiting[0][1].ndim == 1:
            score, weight = torch.stack([step[1] for step in waiting]).sum(0, dtype=exact)
        else:
            logits = torch.cat([step[1] for step in waiting])
            values, weights = scores_of(self.objective, lambda x: logits, Batch((), y, y))
            score, weight = values.sum(dtype=exact), weights.sum(dtype=exact)
        step = torch.arange(len(losses), device=losses.device) + counts.steps
        wrong = counts.wrong
        if self.allowed_labels is not None:
            t = torch.cat([step[3] for step in waiting])
            wrong = wrong.where(wrong[0] > 0, first_wrong(y, t, self.allowed_labels))
        counts = Counts(
            counts.steps + len(losses),
            counts.weight + weight,
            counts.loss + losses.sum(dtype=exact),
            counts.score + score,
            torch.minimum(counts.bad_step, step.where(~losses.isfinite(), NEVER).min()),
            wrong,
        )
        penalties = [torch.stack([p.to(exact) for p in self.penalties]).sum()] if self.penalties else []
        self.clear()
        self.counts, self.penalties = counts, penalties
        return counts

    def make_report(self, extra: dict[str, float]) -> Report:
        """Return the means since the last report, and start the next.

        Raises:
            ValueError: a sample had a label that its task does not have.
        """
        steps, weight, loss, score, bad_step, wrong = self.count()
        flagged, label, task = wrong.tolist()
        if flagged and self.allowed_labels is not None:
            raise wrong_label(label, task, self.allowed_labels)
        report = Report(
            loss=float(loss) / int(steps),
            score=float(score / weight),
            penalty=sum(map(float, self.penalties)) / int(steps),
            first_bad_step=int(steps - bad_step) if bad_step < NEVER else None,
            extra=extra,
        )
        self.clear()
        self.report = report
        return report

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain values and tensors on the CPU."""
        return {
            "steps_done": self.steps_done,
            "task_start": self.task_start,
            "waiting": [tensor.cpu() for step in self.waiting for tensor in step],
            "penalties": [penalty.cpu() for penalty in self.penalties],
            "counts": [] if self.counts is None else [tensor.cpu() for tensor in self.counts],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.clear()
        self.steps_done, self.task_start = state["steps_done"], state["task_start"]
        tensors = state["waiting"]
        self.waiting = list(zip(tensors[::4], tensors[1::4], tensors[2::4], tensors[3::4], strict=True))
        self.numbers = sum(step[1].numel() + STEP for step in self.waiting)
        self.penalties = list(state.get("penalties", []))
        self.counts = Counts(*state["counts"]) if state["counts"] else None

    def move(self, device: torch.device) -> None:
        """Move the steps that were not reported to a device."""
        self.waiting = [
            (a.to(device), b.to(device), c.to(device), d.to(device)) for a, b, c, d in self.waiting
        ]
        self.penalties = [penalty.to(device) for penalty in self.penalties]
        if self.counts is not None:
            self.counts = Counts(*(tensor.to(device) for tensor in self.counts))


class PhasePosition(NamedTuple):
    """The position within a second phase after one of its steps."""

    before: int  # steps of the task before the phase
    done: int  # steps of the phase
    total: int  # steps of the phase
    epochs: int  # of the phase
    learning_rate: float  # of the step

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of an epoch of the phase."""
        return self.total // self.epochs

    @property
    def epoch_end(self) -> bool:
        """Whether the step was the last of its epoch."""
        return self.done % self.steps_per_epoch == 0


class FitObserver(Protocol):
    """Observes a fit: `LightningLearner` sets one as `module.reporting.observer` for the time of a task.

    An observed module logs no training scores itself, and does not warn if the loss is not finite.
    """

    @property
    def task(self) -> Task:
        """The task of this fit, if the Trainer has loaders instead of a TaskDataModule."""

    def after_step(self, trainer: pl.Trainer, batch_idx: int, report: Report | None) -> None:
        """Called after each optimizer step, with the report that the step made, if it made one."""

    def after_phase_step(self, position: PhasePosition, report: Report | None) -> None:
        """Called after each step of a second phase, with the report that the step made, if it made one."""


class Reporting:
    """The scores that a module computes and logs during a fit or an evaluation.

    Args:
        module: whose steps are reported.
        objective: of the module.
    """

    def __init__(self, module: Algorithm, objective: Objective) -> None:
        self.module = module
        self.objective = objective
        self.observer: FitObserver | None = None
        self.checks_labels = False  # whether the tasks and labels of this fit are checked
        self.unchecked = True  # whether the labels of this fit's first batch are not checked yet
        self.warned = False  # whether this fit has warned that the loss is not finite
        self.scores = TaskScores("val", objective, None)
        self.metric = (
            None if objective.metric is None else objective.metric()
        )  # of the training samples since the last report

    def __deepcopy__(self, memo: dict[int, Any]) -> Reporting:
        """Return the reporting of a copy of the module, which nobody observes."""
        return Reporting(copy.deepcopy(self.module, memo), self.objective)

    # -- training

    def start_fit(self) -> None:
        """Start with the checks of a fit; labels of a TaskDataModule need none."""
        module = self.module
        self.unchecked, self.warned = True, False
        self.checks_labels = module.lifecycle.next_task() is None
        checked = self.checks_labels and module.preprocessing.labelled
        module.running_metrics.allowed_labels = module.preprocessing.allowed_labels if checked else None
        if module.metrics is not None:
            module.metrics.reset()
        if self.metric is not None:
            self.metric.reset()

    def check_first_batch(self, batch: Batch) -> None:
        """Raise ValueError for labels that the stream does not have, or a task that has not started.

        Also raise it for batches that differ between the processes of data-parallel training.
        """
        self.module.lifecycle.check_started()
        self.module.ranks.check_same(batch)
        preprocessing = self.module.preprocessing
        known = preprocessing.allowed_labels if self.checks_labels else None
        check_batch(batch, known, preprocessing.labelled)
        self.unchecked = False

    def add_step(self, loss: Tensor, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Add a step to the running metrics, and make a report at the Trainer's log interval."""
        module = self.module
        if module.metrics is not None:
            module.metrics.update(metric_outputs(outputs), batch.y)
        if self.metric is not None:
            self.metric.to(loss.device).update(metric_outputs(outputs), batch.y)
        module.running_metrics.add(loss, outputs, batch)
        trainer: Any = module.trainer
        done, interval = trainer.fit_loop.total_batch_idx + 1, trainer.log_every_n_steps  # of the whole task
        if (interval and done % interval == 0) or batch_idx + 1 == trainer.num_training_batches:
            self.make_report()

    def after_step(self, batch_idx: int) -> None:
        """Pass the step to the observer, unless it is a tuner's."""
        if self.observer is not None and self.module.lifecycle.fitting:
            self.observer.after_step(self.module.trainer, batch_idx, self.module.running_metrics.report)

    def after_phase_step(self, done: int, count: int, learning_rate: float) -> None:
        """Report a step of a second phase, at the log interval and at the end of an epoch.

        Args:
            done: steps of the phase, with this one.
            count: steps of the phase in total.
            learning_rate: of the step.
        """
        module, running, trainer = self.module, self.module.running_metrics, attached_trainer(self.module)
        before = running.steps_done - running.task_start - done
        epochs = cast(PhaseHParams, module.algorithm_hparams).phase_epochs
        position = PhasePosition(before, done, count, epochs, learning_rate)
        interval = 0 if trainer is None else trainer.log_every_n_steps
        report = None
        if position.epoch_end or (interval and (before + done) % interval == 0):
            report = running.make_report({})
        if self.observer is not None:
            self.observer.after_phase_step(position, report)
        elif report is not None:
            self.warn(report)
            scores = {"train/loss": report.loss, f"train/{self.objective.score.key}": report.score}
            for logger in module.loggers:
                logger.log_metrics(scores, step=running.steps_done)

    def make_report(self) -> None:
        """Log the means since the last report; an observer logs them itself."""
        module = self.module
        metrics = module.metrics
        extra = {} if metrics is None else {k: float(v) for k, v in metrics.compute().items()}
        report = module.running_metrics.make_report(extra)
        if metrics is not None:
            metrics.reset()
        if self.metric is not None:
            report = report._replace(score=float(self.metric.compute()))
            module.running_metrics.report = report
            self.metric.reset()
        scores = {"train/loss": report.loss, f"train/{self.objective.score.key}": report.score, **extra}
        if module.has_penalty:
            scores["train/penalty"] = report.penalty
        trainer: Any = module.trainer
        if trainer.callbacks:  # for the progress bar; Lightning then processes each value at every step
            module.log_dict(scores, prog_bar=True, logger=False)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scores.items()})
        if self.observer is None:
            self.warn(report)
            for logger in module.loggers:
                logger.log_metrics(scores, step=logging_step(trainer))

    def warn(self, report: Report) -> None:
        """Warn once in a fit if the loss is not finite."""
        module = self.module
        if report.first_bad_step is None or self.warned or not module.lifecycle.fitting:
            return
        self.warned = True
        running = module.running_metrics
        step = running.steps_done - running.task_start - report.first_bad_step
        warnings.warn(
            f"the training loss is no longer finite at task {int(module.task_index)}, step {step}; lower the "
            "learning rate or clip gradients",
            stacklevel=2,
        )

    def check_labels(self) -> None:
        """Raise ValueError if a step since the last report had a label that its task does not have."""
        running = self.module.running_metrics
        if running.waiting or running.counts is not None:
            running.make_report({})

    # -- evaluation

    def start_scores(self, stage: str) -> None:
        """Start the scores of the samples of a stage, `val` or `test`."""
        self.scores = TaskScores(stage, self.objective, self.module.metrics)

    def add_scores(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the scores of its tasks, after the first is checked."""
        preprocessing = self.module.preprocessing
        if batch_idx == 0:
            check_tasks(batch.t, preprocessing.allowed_labels)
            if preprocessing.mask is not None:  # the loss of a masked class would be huge
                check_batch(batch, preprocessing.allowed_labels)
        module = self.module
        outputs = module.predict(batch.x, batch.t)
        model = given(outputs, batch.x, lambda x: module.predict(x, batch.t))
        self.scores.update(outputs, model, batch)

    def log_scores(self) -> None:
        """Log the scores of all tasks; the progress bar shows those over all tasks only."""
        for name, value in self.scores.compute().items():
            self.module.log(name, value, prog_bar="/task_" not in name)
