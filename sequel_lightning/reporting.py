"""Loss and accuracy of the training steps between two reports, counted on the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from sequel_core.stream.task import Task
from sequel_lightning.batches import first_wrong, wrong_label

HELD = 1 << 16
"""Numbers of logits that wait to be counted; more are counted at once, which costs a step some time."""
STEP = 1 << 8
"""What a waiting step counts as beside its logits."""
NEVER = 1 << 62


class Report(NamedTuple):
    """Means of the training batches since the last report."""

    loss: float
    accuracy: float
    penalty: float  # the part of the loss that the method adds to the task's own
    first_bad_step: int | None  # how many steps before the end of the report the loss was first not finite
    extra: dict[str, float]  # the user's own metrics


class Counts(NamedTuple):
    """Sums over the steps that are counted, on the device."""

    steps: Tensor  # int64 ()
    samples: Tensor  # int64 ()
    loss: Tensor  # sum of the steps' losses, float64 () if the device has it
    correct: Tensor  # int64 ()
    bad_step: Tensor  # the first whose loss is not finite, from 0, else NEVER; int64 ()
    wrong: Tensor  # 1, label and task of the first label that is not of its task, else 0s; int64 [3]


class RunningMetrics:
    """Counts of steps, and of what they gave since the last report.

    It is a plain object, because a module's attributes are slow. Single steps are cheap because several are
    counted together; what waits for that is at most `HELD` numbers and one batch.
    """

    def __init__(self) -> None:
        self.steps_done = 0  # since the start of the stream
        self.task_start = 0  # steps done when the task began
        self.begun_at: int | None = None  # the same, if the task began in this process
        self.unchecked = True  # whether the labels of this fit's first batch are still to be looked at
        self.warned = False  # whether this fit has said that the loss is not finite
        self.waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # loss, logits, labels, tasks
        self.numbers = 0  # that wait
        self.known: Tensor | None = None  # as in check_batch, for a user's loader
        self.counts: Counts | None = None  # of what no longer waits
        self.penalties: list[Tensor] = []  # what methods added to the losses since the last report
        self.report: Report | None = None  # made by the latest step, if it made one
        self.next_task: Task | None = None  # the learner's, while it fits; else the data module tells
        self.after_step: Callable[[pl.Trainer, int], None] | None = None  # the learner's, while it fits

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningMetrics:
        """Copy the counts of steps: a copy of the module, as weight averaging makes one, is not fitted."""
        new = RunningMetrics()
        new.steps_done, new.task_start = self.steps_done, self.task_start
        return new

    def clear(self) -> None:
        """Forget what was not reported."""
        self.waiting.clear()
        self.penalties.clear()
        self.numbers, self.counts = 0, None

    def add(self, loss: Tensor, logits: Tensor, y: Tensor, t: Tensor) -> None:
        """Note a step: its loss (), logits `[B, num_classes]`, labels and tasks `[B]`."""
        self.waiting.append((loss, logits, y, t))
        self.steps_done += 1
        self.report = None
        self.numbers += logits.numel() + STEP
        if self.numbers > HELD:
            self.count()

    def count(self) -> Counts:
        """Count the steps that wait, and return the sums; nothing waits for the device."""
        counts, waiting = self.counts, self.waiting
        if counts is not None and not waiting:
            return counts
        losses = torch.stack([step[0] for step in waiting])
        logits, y = (torch.cat([step[k] for step in waiting]) for k in (1, 2))
        exact = torch.float32 if losses.device.type == "mps" else torch.float64  # it has no float64
        if counts is None:
            zero = torch.zeros((), dtype=torch.int64, device=losses.device)
            counts = Counts(zero, zero, zero.to(exact), zero, zero + NEVER, zero.repeat(3))
        step = torch.arange(len(losses), device=losses.device) + counts.steps
        wrong = counts.wrong
        if self.known is not None:
            t = torch.cat([step[3] for step in waiting])
            wrong = wrong.where(wrong[0] > 0, first_wrong(y, t, self.known))
        counts = Counts(
            counts.steps + len(losses),
            counts.samples + y.numel(),
            counts.loss + losses.sum(dtype=exact),
            counts.correct + (logits.argmax(-1) == y).sum(),
            torch.minimum(counts.bad_step, step.where(~losses.isfinite(), NEVER).min()),
            wrong,
        )
        penalties = [torch.stack([p.to(exact) for p in self.penalties]).sum()] if self.penalties else []
        self.clear()
        self.counts, self.penalties = counts, penalties
        return counts

    def make_report(self, extra: dict[str, float]) -> Report:
        """Return the means since the last report, and begin the next.

        Raises:
            ValueError: a sample had a label that its task does not have.
        """
        steps, samples, loss, correct, bad_step, wrong = self.count()
        flagged, label, task = wrong.tolist()
        if flagged and self.known is not None:
            raise wrong_label(label, task, self.known)
        report = Report(
            loss=float(loss) / int(steps),
            accuracy=int(correct) / int(samples),
            penalty=sum(map(float, self.penalties)) / int(steps),
            first_bad_step=int(steps - bad_step) if bad_step < NEVER else None,
            extra=extra,
        )
        self.clear()
        self.report = report
        return report

    def warn(self, task: int) -> None:
        """Warn once in a fit of a loss that is not finite, unless a learner looks at the reports."""
        report = self.report
        if report is None or report.first_bad_step is None or self.warned or self.after_step is not None:
            return
        self.warned = True
        step = self.steps_done - self.task_start - report.first_bad_step
        warnings.warn(
            f"the training loss is no longer finite at task {task}, step {step}; lower the learning rate or "
            "clip gradients",
            stacklevel=2,
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as plain values and tensors on the CPU."""
        return {
            "steps_done": self.steps_done,
            "task_start": self.task_start,
            "waiting": [tensor.cpu() for step in self.waiting for tensor in step],
            "penalties": [penalty.cpu() for penalty in self.penalties],
            "counts": [] if self.counts is None else [tensor.cpu() for tensor in self.counts],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Read back what `state` gave."""
        self.clear()
        self.steps_done, self.task_start, self.begun_at = state["steps_done"], state["task_start"], None
        found = state["waiting"]
        self.waiting = list(zip(found[::4], found[1::4], found[2::4], found[3::4], strict=True))
        self.numbers = sum(step[1].numel() + STEP for step in self.waiting)
        self.penalties = list(state.get("penalties", []))
        self.counts = Counts(*state["counts"]) if state["counts"] else None

    def move(self, device: torch.device) -> None:
        """Move what is not reported to a device."""
        self.waiting = [
            (a.to(device), b.to(device), c.to(device), d.to(device)) for a, b, c, d in self.waiting
        ]
        self.penalties = [penalty.to(device) for penalty in self.penalties]
        if self.counts is not None:
            self.counts = Counts(*(tensor.to(device) for tensor in self.counts))


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of labels `[B]` that have the greatest logit `[B, num_classes]`, shape ()."""
    return (logits.argmax(-1) == labels).float().mean()
