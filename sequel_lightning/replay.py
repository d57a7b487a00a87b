"""Replay of samples from a memory: the shared part of A-GEM, ER, DER and DER++.

    L = loss(batch, draws), with draws from the memory before the step; then the batch is written to it

The plan of a batch says to which slots it is written and which slots the step reads (`Batch.plan`, from
`sequel_core.stream.memory`). A new replay method defines only its loss.

Mirror: sequel_flax/replay.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sequel_core.hparams import MemoryHParams
from sequel_core.stream.augmentation import method_plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.memory import MemoryPlanner, StepPlan
from sequel_core.stream.task import Batch, Samples
from sequel_core.stream.trees import LeafSpec, Tree, leaves, tree_map
from sequel_lightning.augmentation import cropped, cropped_draw
from sequel_lightning.batches import joined, widened
from sequel_lightning.data import are_images
from sequel_lightning.module import ContinualModule
from sequel_lightning.objectives import given, map_outputs, output_leaf, sample_losses
from sequel_lightning.placement import MemoryTree, to_device
from sequel_lightning.preprocessing import mask_outputs
from sequel_lightning.trees import named_tensors, tree_of

Slots = NDArray[np.integer[Any]]


class Memory(NamedTuple):
    """Copies of samples; M slots."""

    x: Tree  # inputs [M, ...], in the dtype of the stream, or floats in mem_dtype
    y: Tree  # targets [M, ...]; labels are int32
    t: Tensor  # task indices, int32 [M]; -1 for an empty slot
    outputs: Tensor | None  # [M, ...], of the network when it was trained on the sample


class ReplayBatch(NamedTuple):
    """Samples of a step: its batch, or a draw from the memory."""

    x: Tree  # inputs [N, ...]
    y: Tree  # targets [N, ...]
    t: Tensor  # task indices [N]
    stored: Any  # outputs that the memory holds [N, ...]; None if it holds none
    count: Any  # number of samples that count; the samples after them are padding
    classes: Any = None  # classes whose logits the loss is over, bool [num_classes]; None for all


class Outputs(NamedTuple):
    """The outputs of the network for samples, and their losses."""

    outputs: Any  # what the network returns [N, ...]; logits are those of all classes
    masked: Any  # the same; logits are masked to the task of each sample in the task scenario
    losses: Tensor  # of the objective [N]
    weights: Any  # of the losses in a mean [N]; None for 1
    stored: Any  # outputs that the memory holds [N, ...]; None if it holds none
    count: Any  # number of samples that count, the first ones


def empty_memory(
    spec: StreamSpec, slots: int, output: Tensor | None = None, hparams: MemoryHParams | None = None
) -> Memory:
    """Return a memory of empty slots, for outputs like `output` `[1, ...]`; None to keep no outputs.

    The settings give the dtype of inputs and outputs that are floats, and the device.
    """

    def empty(leaf: LeafSpec) -> Tensor:
        return torch.zeros((slots, *leaf.shape), dtype=getattr(torch, leaf.dtype))

    def stored(leaf: LeafSpec) -> Tensor:
        zeros = torch.zeros((slots, *leaf.shape), dtype=memory_dtype(getattr(torch, leaf.dtype), hparams))
        return _colours_first(zeros) if spec.images else zeros  # images are stored colours last

    def kept(output: Tensor) -> Tensor:
        dtype = memory_dtype(output.dtype, hparams)
        return torch.zeros((slots, *output.shape[1:]), dtype=dtype, device=output.device)

    return Memory(
        x=tree_map(stored, spec.x),
        y=torch.zeros(slots, dtype=torch.int32) if spec.labelled else tree_map(empty, spec.y),
        t=torch.full((slots,), -1, dtype=torch.int32),
        outputs=None if output is None else kept(output),
    )


def _colours_first(a: Tensor) -> Tensor:
    """Return images `[N, H, W, C]` as `[N, C, H, W]`; of one colour with strides that torch can broadcast."""
    return a[..., 0].unsqueeze(1) if a.shape[-1] == 1 else a.movedim(-1, 1)


def memory_dtype(dtype: Any, hparams: MemoryHParams | None) -> Any:
    """Return the dtype in which a memory holds inputs or outputs of a dtype; integers keep theirs."""
    if hparams is None or hparams.mem_dtype == "auto" or not dtype.is_floating_point:
        return dtype
    return getattr(torch, hparams.mem_dtype)


def read(memory: Memory, slots: Slots) -> ReplayBatch:
    """Return the samples in these slots `[N]`; a slot beyond the last one is padding and does not count."""
    index = torch.from_numpy(slots[slots < len(memory.t)]).to(memory.t.device, torch.int64)
    x, y, t = (tree_map(partial(_select_rows, index=index), tree) for tree in memory[:3])
    stored = None if memory.outputs is None else _select_rows(memory.outputs, index)
    return ReplayBatch(x, widened(y), t.long(), stored, len(index))


def _select_rows(a: Tensor, index: Tensor) -> Tensor:
    """Return `a[index]`, images with the strides of a view of `[N, H, W, C]`, in half of the time."""
    if _channels_last(a):
        return a.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return a.index_select(0, index)


def _channels_last(a: Tensor) -> bool:
    """Return whether a tensor `[N, C, H, W]` is a view of images `[N, H, W, C]`, or can be."""
    return a.ndim == 4 and 1 in (a.stride(1), a.shape[1])


def write(memory: Memory, slots: Slots, batch: Batch, outputs: Any) -> Memory:
    """Return the memory with the batch in these slots `[B]`, without samples for slots beyond the last."""
    kept = np.flatnonzero(slots < len(memory.t))
    if not len(kept):
        return memory
    every = len(kept) == len(slots)
    places = ((kept, batch.t.device), (slots[kept], memory.t.device))
    source, index = (torch.from_numpy(rows).to(device, torch.int64) for rows, device in places)

    def copy_rows(a: Tensor, b: Tensor) -> None:
        rows = (b.detach() if every else _select_rows(b.detach(), source)).to(a.device, a.dtype)
        if _channels_last(a):
            a, rows = a.permute(0, 2, 3, 1), rows.permute(0, 2, 3, 1)
        a.index_copy_(0, index, rows)  # in place

    for tree, new in zip(memory, (batch.x, batch.y, batch.t, outputs), strict=True):
        if tree is not None:
            tree_map(copy_rows, tree, new)
    return memory


def stored_samples(memory: Memory) -> Samples:
    """Return copies of the samples that the memory holds, in the order of slots; images `[n, H, W, C]`.

    Floats of 16 bits are returned as float32.
    """
    filled_slots = memory.t >= 0

    def stored(a: Tensor) -> NDArray[Any]:
        rows = a[filled_slots].cpu()
        half = rows.dtype in (torch.float16, torch.bfloat16)
        array: NDArray[Any] = (rows.float() if half else rows).numpy()
        return array

    x, y, t = (tree_map(stored, tree) for tree in memory[:3])
    if are_images(memory.x):
        x = np.moveaxis(x, 1, -1).copy()
    labels = y.astype(np.int64) if isinstance(y, np.ndarray) and y.ndim == 1 and y.dtype.kind == "i" else y
    return Samples(x, labels, t.astype(np.int64))


def mean_loss(*outputs: Outputs) -> Tensor:
    """Return the mean loss of all samples that count, 0 without any, shape ()."""
    total = sum_of_first(outputs[0].losses, outputs[0].count)
    for s in outputs[1:]:
        total = total + sum_of_first(s.losses, s.count)
    if outputs[0].weights is None:
        mean: Tensor = total / max(sum(s.count for s in outputs), 1)
        return mean
    weight = torch.stack([sum_of_first(s.weights, s.count) for s in outputs]).sum()
    return total / torch.where(weight > 0, weight, 1).to(total)


def sum_of_first(values: Tensor, count: Any) -> Tensor:
    """Return the sum of the first `count` of the values `[N]`, shape ()."""
    counted = values if count == len(values) else values[:count]  # a slice costs as much as a sum
    return counted.sum()


def forward(module: ContinualModule, samples: Sequence[ReplayBatch], together: bool) -> list[Outputs]:
    """Return outputs and losses of samples in training mode, which updates running statistics.

    With `together`, all samples go through the network in one pass; otherwise the first batch has a pass, and
    the others together have another.
    """
    results: list[Outputs] = []
    for part in [samples] if together else [samples[:1], samples[1:]]:
        if sum(len(s.t) for s in part):  # there is no pass for an empty draw
            results += one_pass(module, part, module.network)
        else:
            empty = map_outputs(itemgetter(slice(0)), results[0])
            results += [empty._replace(stored=s.stored, count=0) for s in part]
    return results


def one_pass(
    module: ContinualModule, samples: Sequence[ReplayBatch], network: Callable[[Any, Tensor], Any]
) -> list[Outputs]:
    """Return outputs and losses of samples, at least one, that go through the network in one pass."""
    batch = joined(samples) if len(samples) > 1 else Batch(*samples[0][:3])
    outputs = network(batch.x, batch.t)
    masked = module.masked(outputs, batch.t)
    model = given(masked, batch.x, lambda x: module.masked(network(x, batch.t), batch.t))
    losses = sample_losses(module.objective, over_classes(model, samples[0].classes), batch)
    weights = None if module.objective.weight is None else module.objective.weight(batch)
    sizes = [len(s.t) for s in samples]
    parts = _split_rows(outputs, sizes)
    shown = parts if masked is outputs else _split_rows(masked, sizes)
    split = zip(parts, shown, _split_rows(losses, sizes), _split_rows(weights, sizes), samples, strict=True)
    return [Outputs(out, seen, values, scale, s.stored, s.count) for out, seen, values, scale, s in split]


def over_classes(model: Callable[[Any], Any], classes: Any) -> Callable[[Any], Any]:
    """Return a model whose logits are masked to some classes, bool `[num_classes]`; None for all classes."""
    return model if classes is None else lambda x: mask_outputs(model(x), classes[None])


def _split_rows(outputs: Any, sizes: Sequence[int]) -> list[Any]:
    """Return the rows of each part of arrays `[sum(sizes), ...]`; arrays without such rows are repeated."""
    if outputs is None or len(sizes) == 1:
        return [outputs] * len(sizes)
    if isinstance(outputs, Tensor):
        return (
            list(outputs.split(list(sizes))) if outputs.shape[:1] == (sum(sizes),) else [outputs] * len(sizes)
        )
    return [
        map_outputs(lambda a, k=k: _split_rows(a, sizes)[k], outputs)  # type: ignore[misc]
        for k in range(len(sizes))
    ]


def planned(memory: Memory, batch: Batch, plan_type: type[Any] = StepPlan) -> Any:
    """Return the plan of a batch.

    Raises:
        ValueError: the batch has no plan, or its inputs have another dtype than the memory, unless both are
            floats.
    """
    plan = method_plan(batch)
    if not isinstance(plan, plan_type):
        raise ValueError(
            "the batch has no plan, which says what to write to the memory and what to read; give "
            "Batch(x, y, t, planner.next(y, t))"
        )
    for a, b in zip(leaves(batch.x), leaves(memory.x), strict=True):
        if a.dtype != b.dtype and not (a.is_floating_point() and b.is_floating_point()):
            name, expected = (str(tensor.dtype).removeprefix("torch.") for tensor in (a, b))
            what = "images" if are_images(memory.x) else "inputs"
            raise ValueError(
                f"the memory holds {expected} {what}, the batch has {name}; "
                f"give a spec with LeafSpec(..., '{name}')"
            )
    return plan


def draws(memory: Memory, batch: Batch) -> list[ReplayBatch]:
    """Return the batch, then each draw of its plan from the memory, augmented; see `planned`."""
    reads = planned(memory, batch).reads
    current = ReplayBatch(cropped(batch).x, batch.y, batch.t, None, len(batch.t))
    return [current, *(drawn(memory, batch, reads[k], k) for k in range(len(reads)))]


def drawn(memory: Memory, batch: Batch, slots: Slots, k: Any) -> ReplayBatch:
    """Return draw k of a batch's plan, the samples in these slots `[R]`, augmented."""
    samples: ReplayBatch = to_device(read(memory, slots), batch.t.device)
    x = tree_map(lambda a, b: a.to(b.dtype), samples.x, batch.x)
    return samples._replace(x=cropped_draw(x, batch, k))


class ReplayModule(ContinualModule):
    """A module that trains on `replay_loss(batch, draws)`, which subclasses define.

    Raises:
        ValueError: no spec, or a memory that does not fit the stream.
    """

    algorithm_hparams: MemoryHParams
    objective_elsewhere = "samples of the memory"
    num_draws = 1  # independent draws of a step
    past_only = False  # whether draws are from past tasks only
    together = False  # whether the batch and the draws have one pass; see `forward`
    keep_outputs = False  # whether the memory holds the outputs for its samples; see the setting `output`
    draws_in_loss = True  # whether `replay_loss` gets the draws
    samples: Sequence[ReplayBatch] = ()  # the latest batch, then its draws

    def init_memory(self) -> None:
        """Make the empty memory."""
        super().init_memory()
        spec = self.needed_spec()
        output = self.blank_output(self.output) if self.keep_outputs else None
        hparams = self.algorithm_hparams
        memory = empty_memory(spec, hparams.slots(spec.num_tasks), output, hparams)
        follows = ("outputs",) if hparams.mem_dtype == "auto" else ()
        self.memory = MemoryTree(named_tensors(memory._asdict()), hparams.mem_device == "cpu", follows)

    @property
    def output(self) -> str | None:
        """The name of the array that the memory keeps of what the network returns; see `output_leaf`."""
        name: str | None = getattr(self.algorithm_hparams, "output", None)
        return name

    def make_planner(self, spec: StreamSpec) -> Any:
        """Return the planner."""
        return MemoryPlanner(self.algorithm_hparams, spec, self.seed, self.num_draws, self.past_only)

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        raise TypeError(f"{type(self).__name__} has to override replay_loss(batch, draws)")

    def chosen(self, samples: list[ReplayBatch]) -> list[ReplayBatch]:
        """Return what a step trains on, from its batch and its draws; the network has not been called yet."""
        return samples

    @property
    def state(self) -> Any:
        """What the method keeps: the memory, for most."""
        return self.contents

    @property
    def contents(self) -> Memory:
        """The memory."""
        tensors, spec = self.memory.get(), self.needed_spec()
        x, y = tree_of(tensors, spec.x, "x"), tree_of(tensors, spec.y, "y")
        return Memory(x, y, tensors["t"], tensors.get("outputs"))

    def training_loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the loss of the batch and the draws, and the batch's outputs; then write the batch."""
        batch = self.planned(batch)
        self.samples = self.chosen(draws(self.contents, batch))
        current, *past = forward(
            self, self.samples if self.draws_in_loss else self.samples[:1], self.together
        )
        loss = self.replay_loss(current, past)
        if self.has_penalty:
            with torch.no_grad():
                self.added(loss - mean_loss(current))
        self.write_batch(batch, current.outputs)
        return loss, current.masked

    def write_batch(self, batch: Batch, outputs: Any) -> None:
        """Write the batch to the memory, with what the network returned for it."""
        if self.lifecycle.fitting:
            kept = output_leaf(outputs, self.output) if self.keep_outputs else None
            write(self.contents, method_plan(batch).write, batch, kept)
