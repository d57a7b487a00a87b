"""Scores of validation and test samples, by task: as a fit or `trainer.test` logs them.

    <stage>/accuracy/task_<j>   the mean over the samples of task j; <stage>/loss/task_<j> likewise
    <stage>/accuracy            the mean over the tasks that occur, with equal weights

A user's metric is `<stage>/<name>` over all samples, and `<stage>/<name>/task_<j>` over the samples of
task j.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection

from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch

OURS = ("loss", "accuracy", "penalty")


def check_metrics(metrics: MetricCollection | None) -> None:
    """Raise ValueError unless metrics are a MetricCollection or None, without a name that the module uses."""
    if metrics is None:
        return
    if not isinstance(metrics, MetricCollection):
        raise ValueError(
            f"metrics must be a torchmetrics.MetricCollection, got a {type(metrics).__name__}; pass "
            "MetricCollection({'name': metric})"
        )
    taken = {f"train/{name}" for name in OURS}
    names = {str(name) for name in metrics.keys(keep_base=False)}
    used = sorted((names & taken) | {str(k) for k in metrics.keys(keep_base=True) if str(k) in OURS})
    if used:
        raise ValueError(
            f"metrics must not be called {' or '.join(OURS)}, as the module logs these itself, got "
            f"{', '.join(used)}; give it another name"
        )


class TaskScores:
    """Sums over the samples of each task that have been evaluated.

    Args:
        stage: `val` or `test`, the first part of every name.
        metrics: copied for each task and for all tasks together, or None.
    """

    def __init__(self, stage: str, metrics: MetricCollection | None) -> None:
        self._stage = stage
        self._metrics = metrics
        self._sums: dict[int, Tensor] = {}  # of each task: loss, correct predictions, samples
        self._user_metrics: dict[str, MetricCollection] = {}  # by what their names end with

    def update(self, logits: Tensor, y: Tensor, t: Tensor) -> None:
        """Add the logits `[B, num_classes]`, labels `[B]` and task indices `[B]` of a batch."""
        loss = F.cross_entropy(logits, y, reduction="none").float()
        values = torch.stack([loss, (logits.argmax(-1) == y).float(), torch.ones_like(loss)])
        for j in t.unique().tolist():
            here = t == j
            sums = values[:, here].sum(1)
            self._sums[j] = self._sums[j] + sums if j in self._sums else sums
            self._update_metrics(f"/task_{j}", logits[here], y[here])
        self._update_metrics("", logits, y)

    def compute(self) -> dict[str, Any]:
        """Return the scores by name; none if no sample was evaluated."""
        scores: dict[str, Any] = {}
        for k, name in enumerate(("loss", "accuracy")):
            means = {j: self._sums[j][k] / self._sums[j][2] for j in sorted(self._sums)}
            if means:
                scores[f"{self._stage}/{name}"] = torch.stack(list(means.values())).mean()
            scores |= {f"{self._stage}/{name}/task_{j}": mean for j, mean in means.items()}
        for collection in self._user_metrics.values():
            scores |= collection.compute()
        return scores

    def _update_metrics(self, ending: str, logits: Tensor, y: Tensor) -> None:
        if self._metrics is None:
            return
        if ending not in self._user_metrics:
            metrics = self._metrics.clone(prefix=f"{self._stage}/", postfix=ending or None).to(logits.device)
            metrics.reset()
            self._user_metrics[ending] = metrics
        self._user_metrics[ending].update(logits, y)


def with_loaders_task(batch: Any, loader: int, spec: StreamSpec | None) -> Any:
    """Return a batch of the loader with that index: `(x, y)` gets the index as its task.

    Raises:
        ValueError: the stream has no such task, or the task does not have these labels.
    """
    if isinstance(batch, Batch) or len(batch) > 2:
        return batch
    x, y = batch
    advice = f"give batches (x, y, t) if loader {loader} is not of task {loader}"
    if spec is not None and loader >= spec.num_tasks:
        raise ValueError(f"evaluation loaders belong to the {spec.num_tasks} tasks in order; {advice}")
    if spec is not None:
        labels = y.unique().cpu()
        inside = (labels >= 0) & (labels < spec.num_classes)
        known = torch.from_numpy(spec.mask[loader])[labels.clamp(0, spec.num_classes - 1)] & inside
        if not known.all():
            raise ValueError(
                f"loader {loader} has labels {labels[~known][:5].tolist()}, which are not classes of task "
                f"{loader}; {advice}"
            )
    return Batch(x, y, torch.full_like(y, loader))
