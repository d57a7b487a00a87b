"""Replay of samples from a memory: the shared part of A-GEM, ER, DER and DER++.

    L = loss(batch, draws), with draws from the memory before the step; then the batch is written to it

The plan of a batch says to which slots it is written and which slots the step reads (`Batch.plan`, from
`sequel_core.stream.memory`). A new replay method defines only its loss.

Mirror: sequel_flax/replay.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sequel_core.hparams import MemoryHParams
from sequel_core.stream.augmentation import method_plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.memory import MemoryPlanner, StepPlan
from sequel_core.stream.task import Batch, Samples
from sequel_lightning.augmentation import cropped, cropped_draw
from sequel_lightning.module import ContinualModule
from sequel_lightning.trees import StateTree

Slots = NDArray[np.integer[Any]]


class Memory(NamedTuple):
    """Copies of samples; M slots."""

    x: Tensor  # images [M, C, H, W], in the dtype that they come in
    y: Tensor  # labels, int32 [M]
    t: Tensor  # task indices, int32 [M]; -1 for an empty slot
    logits: Tensor | None  # [M, num_classes], as the network gave them when it was trained on the sample


class ReplayBatch(NamedTuple):
    """Samples of a step: its batch, or a draw from the memory."""

    x: Tensor  # images [N, C, H, W]
    y: Tensor  # labels [N]
    t: Tensor  # task indices [N]
    stored: Any  # logits that the memory holds [N, num_classes]; None where it holds none
    count: Any  # number of samples that count; the samples after them are padding


class Outputs(NamedTuple):
    """The outputs of the network for samples."""

    logits: Tensor  # of all classes [N, num_classes]
    masked: Tensor  # the same, masked to the task of each sample in the task scenario
    y: Tensor  # labels [N]
    stored: Any  # logits that the memory holds [N, num_classes]; None where it holds none
    count: Any  # number of samples that count, the first ones


def empty_memory(spec: StreamSpec, slots: int, dtype: torch.dtype | None) -> Memory:
    """Return a memory of empty slots; `dtype` is that of the logits, None for a memory without logits."""
    images = torch.zeros((slots, *spec.image_shape), dtype=getattr(torch, spec.x.dtype))
    return Memory(
        x=images.movedim(-1, 1),  # in memory as they come, colours last
        y=torch.zeros(slots, dtype=torch.int32),
        t=torch.full((slots,), -1, dtype=torch.int32),
        logits=None if dtype is None else torch.zeros((slots, spec.num_classes), dtype=dtype),
    )


def read(memory: Memory, slots: Slots) -> ReplayBatch:
    """Return the samples in these slots `[N]`; a slot beyond the last one is padding and does not count."""
    index = torch.from_numpy(slots[slots < len(memory.y)]).to(memory.y.device, torch.int64)
    x, y, t = (a[index] for a in memory[:3])
    stored = None if memory.logits is None else memory.logits[index]
    return ReplayBatch(x, y.long(), t.long(), stored, len(index))


def write(memory: Memory, slots: Slots, batch: Batch, logits: Tensor) -> Memory:
    """Return the memory with the batch in these slots `[B]`, without samples for slots beyond the last."""
    rows = np.flatnonzero(slots < len(memory.y))
    source, index = (torch.from_numpy(a).to(memory.y.device, torch.int64) for a in (rows, slots[rows]))
    for a, b in zip(memory, (batch.x, batch.y, batch.t, logits.detach()), strict=True):
        if a is not None:
            a[index] = b[source].to(a.dtype)  # in place
    return memory


def stored_samples(memory: Memory) -> Samples:
    """Return copies of the samples that the memory holds, in the order of slots, images `[n, H, W, C]`."""
    filled_slots = memory.t >= 0
    x, y, t = (a[filled_slots].cpu().numpy() for a in memory[:3])
    return Samples(np.moveaxis(x, 1, -1).copy(), y.astype(np.int64), t.astype(np.int64))


def mean_cross_entropy(*outputs: Outputs) -> Tensor:
    """Return the mean cross-entropy of all samples that count, 0 without any, shape ()."""
    losses = [F.cross_entropy(s.masked, s.y, reduction="none") for s in outputs]
    total = sum_of_first(losses[0], outputs[0].count)
    for values, s in zip(losses[1:], outputs[1:], strict=True):
        total = total + sum_of_first(values, s.count)
    mean: Tensor = total / max(sum(s.count for s in outputs), 1)
    return mean


def sum_of_first(values: Tensor, count: Any) -> Tensor:
    """Return the sum of the first `count` of the values `[N]`, shape ()."""
    return values[:count].sum()


def forward(module: ContinualModule, samples: Sequence[ReplayBatch], together: bool) -> list[Outputs]:
    """Return the outputs of the network for samples in training mode, which updates running statistics.

    With `together`, all samples go through the network in one pass; otherwise the first batch has a pass, and
    the others together have another.
    """
    logits: list[Tensor] = []
    for part in [samples] if together else [samples[:1], samples[1:]]:
        sizes = [len(s.y) for s in part]
        if sum(sizes):  # there is no pass for an empty draw
            out = module.network(torch.cat([s.x for s in part]))
            logits += out.split(sizes)
        else:
            logits += [logits[0][:0] for _ in part]
    return [
        Outputs(out, module.masked(out, s.t), s.y, s.stored, s.count)
        for out, s in zip(logits, samples, strict=True)
    ]


def planned(memory: Memory, batch: Batch, plan_type: type[Any] = StepPlan) -> Any:
    """Return the plan of a batch.

    Raises:
        ValueError: the batch has no plan, or its images have another dtype than the memory.
    """
    plan = method_plan(batch)
    if not isinstance(plan, plan_type):
        raise ValueError(
            "the batch has no plan, which says what to write to the memory and what to read; give "
            "Batch(x, y, t, planner.next(y, t))"
        )
    if batch.x.dtype != memory.x.dtype:
        name, expected = (str(a.dtype).removeprefix("torch.") for a in (batch.x, memory.x))
        raise ValueError(
            f"the memory holds {expected} images, the batch has {name}; "
            f"give a spec with LeafSpec(..., '{name}')"
        )
    return plan


def draws(memory: Memory, batch: Batch) -> list[ReplayBatch]:
    """Return the batch, then each draw of its plan from the memory, augmented; see `planned`."""
    reads = planned(memory, batch).reads
    current = ReplayBatch(cropped(batch).x, batch.y, batch.t, None, len(batch.y))
    return [current, *(drawn(memory, batch, reads[k], k) for k in range(len(reads)))]


def drawn(memory: Memory, batch: Batch, slots: Slots, k: Any) -> ReplayBatch:
    """Return draw k of a batch's plan, the samples in these slots `[R]`, augmented."""
    samples = read(memory, slots)
    return samples._replace(x=cropped_draw(samples.x, batch, k))


class ReplayModule(ContinualModule):
    """A module that trains on `replay_loss(batch, draws)`, which subclasses define.

    Raises:
        ValueError: no spec, or a memory that does not fit the stream.
    """

    algorithm_hparams: MemoryHParams
    num_draws = 1  # independent draws of a step
    past_only = False  # whether draws are from past tasks only
    together = False  # whether the batch and the draws have one pass; see `forward`
    keep_logits = False  # whether the memory holds the logits of its samples
    draws_in_loss = True  # whether `replay_loss` gets the draws
    samples: Sequence[ReplayBatch] = ()  # the latest batch, then its draws

    def init_memory(self) -> None:
        """Make the empty memory."""
        super().init_memory()
        spec = self.needed_spec()
        dtype = next(self.net.parameters()).dtype if self.keep_logits else None
        memory = empty_memory(spec, self.algorithm_hparams.slots(spec.num_tasks), dtype)
        self.memory = StateTree({k: a for k, a in memory._asdict().items() if a is not None})

    def make_planner(self, spec: StreamSpec) -> Any:
        """Return the planner."""
        return MemoryPlanner(self.algorithm_hparams, spec, self.seed, self.num_draws, self.past_only)

    def replay_loss(self, batch: Outputs, draws: Sequence[Outputs]) -> Tensor:
        """Return the training loss, shape ()."""
        raise TypeError(f"{type(self).__name__} has to override replay_loss(batch, draws)")

    @property
    def state(self) -> Any:
        """What the method keeps: the memory, for most."""
        return self.contents

    @property
    def contents(self) -> Memory:
        """The memory."""
        tensors = self.memory.get()
        return Memory(tensors["x"], tensors["y"], tensors["t"], tensors.get("logits"))

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of the batch and the draws, and the batch's logits; then write the batch."""
        batch = self.planned(batch)
        self.samples = draws(self.contents, batch)
        current, *past = forward(
            self, self.samples if self.draws_in_loss else self.samples[:1], self.together
        )
        loss = self.replay_loss(current, past)
        if self.has_penalty:
            with torch.no_grad():
                self.added(loss - mean_cross_entropy(current))
        self.write_batch(batch, current)
        return loss, current.masked

    def write_batch(self, batch: Batch, outputs: Outputs) -> None:
        """Write the batch to the memory."""
        if self.lifecycle.fitting:
            write(self.contents, method_plan(batch).write, batch, outputs.logits)
