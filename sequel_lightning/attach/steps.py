"""Calls of a user's LightningModule by a callback: its batches, its training step, gradients of samples."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from sequel_lightning._compat import attached_trainer, before_batch_transfer
from sequel_lightning.distributed import Ranks, distributed_sampler, reduce, sum_gradients
from sequel_lightning.gradients import backward
from sequel_lightning.trees import Params, zero_sum

PerSample = Callable[[Any, Any], Tensor]
"""A function of the module and of a batch, which returns one number per sample `[B]`."""

MetricCopies = Sequence[tuple[nn.Module, str, Any, Any]]
"""Of each metric of a module: its parent, its name there, the metric, and a copy of it."""


def trained(module: pl.LightningModule) -> Params:
    """Return the trained parameters of a module by name: those with `requires_grad`."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def training_loss(module: Any, batch: Any) -> Tensor:
    """Return the loss of the module's own training step on a batch, shape ().

    Raises:
        ValueError: the step returns no loss.
    """
    indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    result = module.training_step(batch, 0) if indexed else module.training_step(batch)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"training_step of {type(module).__name__} must return a loss for every batch, got "
            f"{type(result).__name__}; give nll=..., a function of the module and a batch"
        )
    return loss


def prepared(module: pl.LightningModule, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches on the device of a module, after the user's hooks for the transfer."""
    trainer = attached_trainer(module)
    for batch in batches:
        if trainer is None:
            batch = module.on_before_batch_transfer(batch, 0)
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            yield module.on_after_batch_transfer(batch, 0)
        else:
            batch = before_batch_transfer(module, trainer.precision_plugin.convert_input(batch))
            yield trainer.strategy.batch_to_device(batch)


def add_gradient(trainer: pl.Trainer, loss: Tensor, ranks: Ranks) -> None:
    """Add the gradient of the mean of a loss over processes to `.grad`, in `on_after_backward`.

    The loss is divided by the number of accumulated batches and multiplied by the factor of a gradient
    scaler, as Lightning does with the loss of the training step. While gradients are accumulated, each
    process has its own; torch's DDP averages them after the last batch.
    """
    loss = loss / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    (loss if scaler is None else scaler.scale(loss)).backward()
    model: Any = trainer.model
    if ranks.size > 1 and model.require_backward_grad_sync:
        params = [p for p in model.parameters() if p.requires_grad]
        for p, gradient in zip(params, sum_gradients([p.grad for p in params], params), strict=True):
            p.grad = None if gradient is None else gradient / ranks.size


def mean_gradients(
    module: pl.LightningModule,
    loader: Iterable[Any],
    value: PerSample,
    contribution: Callable[[Tensor], Tensor],
    samples: int | None,
    ranks: Ranks,
) -> Params:
    """Return 1/N sum_n contribution(d value(x_n) / d theta), with one backward pass per sample.

    Args:
        module: in evaluation mode.
        loader: of batches, as `training_step` takes them.
        value: of a batch of one sample.
        contribution: of a gradient array to the sum, elementwise.
        samples: N, the first so many samples; None for all. Of a loader without a DistributedSampler, each
            process takes so many.
        ranks: the processes, over which the mean is.

    Raises:
        ValueError: there are no batches, or they cannot be divided into samples.
    """
    params, sampler = trained(module), distributed_sampler(loader, ranks)
    wanted, share = sys.maxsize if samples is None else samples, Ranks()
    if sampler is not None:  # sample n of process r is sample r + size * n of all; repeated ones are the last
        wanted, share = min(wanted, len(sampler.dataset)), ranks
    total, count = {name: zero_sum(p) for name, p in params.items()}, 0
    every = (sample for batch in prepared(module, loader) for sample in single_samples(batch))
    for n, sample in enumerate(islice(every, -(-wanted // share.size))):
        with torch.enable_grad():
            gradient = backward(_of_one_sample(value, module, sample), params, module)
        if n * share.size + share.rank < wanted:
            for name, g in gradient.items():
                total[name] += contribution(g.to(total[name].dtype))
            count += 1
    if ranks.size > 1:
        counts = torch.tensor(count, device=module.device)
        reduce([*total.values(), counts])
        count = int(counts)
    if not count:
        raise ValueError(
            "the loader gave no batch for the end of the task (an iterator can be read only once)"
        )
    return {name: t / count for name, t in total.items()}


def _of_one_sample(value: PerSample, module: pl.LightningModule, sample: Any) -> Tensor:
    try:
        return value(module, sample).sum()
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"the loss of a single sample cannot be computed ({error}); a batch is divided along the first "
            "axis of its tensors, so each of them needs one row per sample: pad sequences in collate_fn, in "
            "place of flat indices with offsets"
        ) from error


def single_samples(batch: Any) -> Iterator[Any]:
    """Yield the samples of a batch as batches of one sample.

    Every tensor and list with as many rows as the batch's first tensor is split; other values are repeated.

    Args:
        batch: a tensor, or a tuple, list or mapping of batches.

    Raises:
        ValueError: there is no tensor in the batch.

    Example:
        >>> batch = {"x": torch.tensor([[1.0], [2.0]]), "names": ["a", "b"], "epoch": 3}
        >>> list(single_samples(batch))[1]
        {'x': tensor([[2.]]), 'names': ['b'], 'epoch': 3}
    """
    first = next(_tensors(batch), None)
    if first is None:
        raise ValueError(
            f"a batch must hold tensors whose first axis is the batch, got {type(batch).__name__}; the "
            "samples of a task are taken one by one"
        )
    for k in range(len(first)):
        yield _row(batch, k, len(first))


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _tensors(part)


def _row(batch: Any, k: int, count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[k : k + 1] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return type(batch)({key: _row(part, k, count) for key, part in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, (tuple, list)):
        if next(_tensors(batch), None) is None:
            return batch[k : k + 1] if len(batch) == count else batch
        parts = [_row(part, k, count) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def metric_copies(module: pl.LightningModule) -> MetricCopies:
    """Return the metrics of a module with copies of them, for `without_logging`."""
    return [
        (parent, name, child, copy.deepcopy(child))
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Metric | MetricCollection) and not isinstance(parent, MetricCollection)
    ]


@contextmanager
def without_logging(module: pl.LightningModule, metrics: MetricCopies) -> Iterator[None]:
    """Silence `log` and `log_dict` of a module, and let copies of its metrics be updated."""
    for parent, name, _, other in metrics:
        setattr(parent, name, other)
    silenced: Any = vars(module)
    silenced |= {"log": _nothing, "log_dict": _nothing}
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del silenced[name]
        for parent, name, metric, other in metrics:
            setattr(parent, name, metric)
            other.reset()


def _nothing(*args: Any, **options: Any) -> None:
    """Do nothing."""


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Restore the buffers of a module afterwards, such as running statistics."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
