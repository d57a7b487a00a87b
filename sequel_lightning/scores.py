"""Scores of validation and test samples, by task: as a fit or `trainer.test` logs them.

    <stage>/accuracy/task_<j>   the score of the samples of task j; <stage>/loss/task_<j> is the mean loss
    <stage>/accuracy            the mean over the tasks that occur, with equal weights

The score has the name that the objective gives it; `accuracy` is that of class labels.
A user's metric is `<stage>/<name>` over all samples, and `<stage>/<name>/task_<j>` over the samples of
task j.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import leaves, tree_map
from sequel_lightning.batches import inputs_of
from sequel_lightning.objectives import (
    Model,
    Objective,
    map_outputs,
    metric_outputs,
    sample_losses,
    scores_of,
)


def check_metrics(metrics: MetricCollection | None, score: str) -> None:
    """Raise ValueError unless metrics are a MetricCollection or None, without a name that the module uses.

    Args:
        metrics: the user's.
        score: the name of the objective's score.
    """
    ours = ("loss", score, "penalty")
    if metrics is None:
        return
    if not isinstance(metrics, MetricCollection):
        raise ValueError(
            f"metrics must be a torchmetrics.MetricCollection, got a {type(metrics).__name__}; pass "
            "MetricCollection({'name': metric})"
        )
    taken = {f"train/{name}" for name in ours}
    names = {str(name) for name in metrics.keys(keep_base=False)}
    used = sorted((names & taken) | {str(k) for k in metrics.keys(keep_base=True) if str(k) in ours})
    if used:
        raise ValueError(
            f"metrics must not be called {' or '.join(ours)}, as the module logs these itself, got "
            f"{', '.join(used)}; give it another name"
        )


class ScoreSums:
    """Sums over samples, for their mean loss and their score.

    Args:
        objective: gives the score.
        like: a tensor of the device and the dtype of the sums.
    """

    def __init__(self, objective: Objective, like: Tensor) -> None:
        self._sums = like.new_zeros(4)
        self._metric = None if objective.metric is None else objective.metric().to(like.device)

    def add(self, sums: Tensor, outputs: Any, y: Any) -> None:
        """Add samples.

        Args:
            sums: of `sums_of` over the samples, `[4]`.
            outputs: what the network returned for them.
            y: their targets.
        """
        self._sums += sums
        if self._metric is not None:
            self._metric.update(metric_outputs(outputs), y)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the mean loss and the score, shape () each."""
        loss, weight, score, score_weight = self._sums
        return loss / weight, score / score_weight if self._metric is None else self._metric.compute()


def sums_of(objective: Objective, model: Model, batch: Batch) -> Tensor:
    """Return loss, weight of the loss, score and weight of the score of each sample, `[4, B]`."""
    losses = sample_losses(objective, model, batch)
    weights = torch.ones_like(losses) if objective.weight is None else objective.weight(batch)
    if objective.metric is None:
        values, score_weights = scores_of(objective, model, batch)
    else:
        values, score_weights = torch.zeros_like(losses), torch.ones_like(losses)
    return torch.stack([a.to(losses) for a in (losses, weights, values * score_weights, score_weights)])


def rows_of(a: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of an array `[B, ...]` for which `rows`, bool `[B]`, is True; others as they are."""
    return a[rows] if a.shape[:1] == rows.shape else a


class TaskScores:
    """Sums over the samples of each task that have been evaluated.

    Args:
        stage: `val` or `test`, the first part of every name.
        objective: gives the losses and the score.
        metrics: copied for each task and for all tasks together, or None.
    """

    def __init__(self, stage: str, objective: Objective, metrics: MetricCollection | None) -> None:
        self._stage = stage
        self._objective = objective
        self._metrics = metrics
        self._sums: dict[int, ScoreSums] = {}  # of each task
        self._user_metrics: dict[str, MetricCollection] = {}  # by what their names end with

    def update(self, outputs: Any, model: Model, batch: Batch) -> None:
        """Add a batch, with what the network returned for it."""
        values = sums_of(self._objective, model, batch).float()
        for j in batch.t.unique().tolist():
            here = batch.t == j
            rows = map_outputs(partial(rows_of, rows=here), outputs)
            y = tree_map(partial(rows_of, rows=here), batch.y)
            if j not in self._sums:
                self._sums[j] = ScoreSums(self._objective, values)
            self._sums[j].add(values[:, here].sum(1), rows, y)
            self._update_metrics(f"/task_{j}", rows, y, values.device)
        self._update_metrics("", outputs, batch.y, values.device)

    def compute(self) -> dict[str, Any]:
        """Return the scores by name; none if no sample was evaluated."""
        scores: dict[str, Any] = {}
        results = {j: self._sums[j].compute() for j in sorted(self._sums)}
        for k, name in enumerate(("loss", self._objective.score.key)):
            means = {j: result[k] for j, result in results.items()}
            if means:
                scores[f"{self._stage}/{name}"] = torch.stack(list(means.values())).mean()
            scores |= {f"{self._stage}/{name}/task_{j}": mean for j, mean in means.items()}
        for collection in self._user_metrics.values():
            scores |= collection.compute()
        return scores

    def _update_metrics(self, ending: str, outputs: Any, y: Any, device: torch.device) -> None:
        if self._metrics is None:
            return
        if ending not in self._user_metrics:
            metrics = self._metrics.clone(prefix=f"{self._stage}/", postfix=ending or None).to(device)
            metrics.reset()
            self._user_metrics[ending] = metrics
        self._user_metrics[ending].update(metric_outputs(outputs), y)


def with_loaders_task(batch: Any, loader: int, spec: StreamSpec | None, target: str) -> Any:
    """Return a batch of the loader with that index: one without task indices gets the index as its task.

    Args:
        batch: of the loader.
        loader: its index.
        spec: of the stream.
        target: the key of y in a batch that is a dict.

    Raises:
        ValueError: the stream has no such task, or the task does not have these labels.
    """
    if isinstance(batch, Mapping):
        if "t" in batch or target not in batch:
            return batch
        x, y = inputs_of(batch, target), batch[target]
    elif isinstance(batch, Batch) or len(batch) > 2:
        return batch
    else:
        x, y = batch
    advice = f"give batches (x, y, t) if loader {loader} is not of task {loader}"
    if spec is not None and loader >= spec.num_tasks:
        raise ValueError(f"evaluation loaders belong to the {spec.num_tasks} tasks in order; {advice}")
    if spec is not None and spec.labelled:
        labels = y.unique().cpu()
        inside = (labels >= 0) & (labels < spec.num_classes)
        known = torch.from_numpy(spec.mask[loader])[labels.clamp(0, spec.num_classes - 1)] & inside
        if not known.all():
            raise ValueError(
                f"loader {loader} has labels {labels[~known][:5].tolist()}, which are not classes of task "
                f"{loader}; {advice}"
            )
    first = leaves(y)[0]
    return Batch(x, y, torch.full((len(first),), loader, device=first.device))
