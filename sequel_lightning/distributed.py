"""Data-parallel training: each process computes some rows of every pass through the network.

Every process has the whole batch, and the same plan, memory and weights. A pass through the network is
divided: process r of P computes the rows r, r + P, r + 2P, ... The outputs are gathered, so that each process
has those of all rows, and computes the same loss. In the backward pass, each process computes the gradient of
its rows, and these are added up. To a method, the network is that of a single process, with the same outputs
and the same gradients, up to rounding.

A batch that cannot be divided evenly is padded with copies of its last row, whose outputs are discarded and
whose gradient is 0. The processes therefore draw the same number of random numbers. Batch normalisation is
over the rows of a process; the running statistics are means over the processes.

Lightning's DDPStrategy starts the processes. Its wrapper `DistributedDataParallel` is not used.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DistributedSampler

from sequel_core.runs.learner import LostProcessError
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import leaves, tree_map
from sequel_lightning.objectives import map_outputs, named_outputs

T = TypeVar("T")
Call = Callable[[Any, Tensor | None], Any]


class Ranks:
    """The processes that train a module, and the rank of this one among them.

    Attributes:
        rank: of this process, 0 <= rank < size.
        size: number of processes.
        dividing: whether passes through the network are divided among the processes.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.dividing = 0, 1, False

    def follow(self, trainer: pl.Trainer) -> None:
        """Follow the processes of a Trainer.

        Raises:
            ValueError: the Trainer's strategy is not supported.
        """
        check_strategy(trainer.strategy)
        if trainer.strategy.launcher is not None and not starts_scripts(trainer.strategy):
            raise spawned_processes()
        self.rank, self.size = trainer.global_rank, trainer.world_size

    @contextmanager
    def divided(self, divide: bool = True) -> Iterator[None]:
        """Divide passes through the network among the processes, or not, within the context.

        All processes must make the same passes there.
        """
        before, self.dividing = self.dividing, divide and self.size > 1
        try:
            yield
        finally:
            self.dividing = before

    # -- a pass through the network

    def call(self, call: Call, net: nn.Module, x: Any, t: Tensor | None) -> Any:
        """Return what `call(x, t)` returns, a pass through a network; this process computes some of the rows.

        The gradient is that of the network's trained parameters.

        Raises:
            ValueError: an output has no row for each sample.
        """
        num_rows = len(leaves(x)[0])
        indices = self.own_rows(num_rows, leaves(x)[0].device)
        structure: list[Any] = []

        def compute() -> list[Tensor]:
            outputs = call(tree_map(itemgetter(indices), x), None if t is None else t[indices])
            structure.append(outputs)
            check_rows(outputs, len(indices))
            average(running_statistics(net), self.size)
            return [a for _, a in named_outputs(outputs)]

        params = [p for p in net.parameters() if p.requires_grad]
        gathered = iter(DividedPass.apply(self, compute, num_rows, torch.is_grad_enabled(), *params))  # type: ignore[no-untyped-call]
        return map_outputs(lambda a: next(gathered), structure[0])

    def own_rows(self, num_rows: int, device: Any) -> Tensor:
        """Return the indices of the rows of this process; the last row replaces missing ones."""
        rows = torch.arange(self.rank, self.padded(num_rows), self.size, device=device)
        return rows.clamp(max=num_rows - 1)

    def padded(self, num_rows: int) -> int:
        """Return the number of rows of all processes with the padding."""
        return -(-num_rows // self.size) * self.size

    def weight(self, num_rows: int) -> float:
        """Return the factor of a mean over the rows of this process, in a mean over the processes.

        The mean over the processes is then that of all rows.
        """
        return len(range(self.rank, num_rows, self.size)) * self.size / max(num_rows, 1)

    def gather(self, rows: Tensor, num_rows: int | None = None) -> Tensor:
        """Return the rows of all processes `[num_rows, ...]`, from those of this one `[n, ...]`.

        Row k of process r is row r + size * k of the result. `num_rows` is size * n if it is None.
        """
        if self.size == 1:
            return rows[:num_rows]
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with lost_process_named():
            distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)[:num_rows]

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all processes, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with lost_process_named():
            distributed.all_gather_object(values, value)
        return values

    def whole(self, batch: Batch, loader: Any, batch_idx: int) -> Batch:
        """Return a batch of all processes, from the rows of it that a DistributedSampler gave to each.

        The samples that the sampler repeats, so that each process has the same number, are left out. They are
        the last ones of the last batch.

        Args:
            batch: of this process.
            loader: that it is from; a batch of a loader without a DistributedSampler is returned as it is.
            batch_idx: its index within the loader.

        Raises:
            ValueError: the loader does not say how many samples its batches have.
        """
        sampler = distributed_sampler(loader, self)
        if self.size == 1 or sampler is None:
            return batch
        batch_size = getattr(loader.batch_sampler, "batch_size", None)
        if batch_size is None:
            name = type(loader.batch_sampler).__name__
            raise ValueError(
                "the batch sampler of a loader with a DistributedSampler needs batch_size, which says which "
                f"samples are repeated, got a {name} without it; give the loader batch_size, or no "
                "DistributedSampler and the same batches in every process"
            )
        count = len(batch.t) * self.size
        if batch_idx * batch_size + len(batch.t) == len(sampler):
            count -= max(0, sampler.total_size - len(sampler.dataset))
        return Batch(*(tree_map(lambda rows: self.gather(rows, count), tree) for tree in batch[:3]))

    def check_same(self, batch: Batch) -> None:
        """Raise ValueError in every process if the processes have different batches."""
        if self.size == 1:
            return
        code = 0
        for array in chain(leaves(batch.x), leaves(batch.y), [batch.t]):
            flat = array.detach().cpu().contiguous().view(-1)
            code = zlib.crc32(flat.view(torch.uint8).numpy(), code)
        highest = torch.tensor([code, -code], device=batch.t.device)
        with lost_process_named():
            distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        if highest.sum() != 0:
            raise ValueError(
                "batches must be the same in every process, or their loader must have a DistributedSampler; "
                "got different ones; shuffle with the same seed in every process, or leave the Trainer's "
                "use_distributed_sampler=True"
            )

    # -- the state of a module

    def copy_from_first(self, module: nn.Module) -> None:
        """Give the parameters and buffers on the device of the processes the values of the first process."""
        if self.size == 1:
            return
        device = next(module.parameters()).device
        with lost_process_named(), torch.no_grad():
            for tensor in chain(module.parameters(), module.buffers()):
                if tensor.device == device:
                    values = tensor.detach().contiguous()
                    distributed.broadcast(values, 0)
                    tensor.copy_(values)


class DividedPass(torch.autograd.Function):
    """A pass through a network whose rows are divided among processes; see `Ranks.call`.

    Arguments of `apply`: the processes; a function that computes the outputs of the rows of this process; the
    number of rows of all processes; whether gradients are wanted; the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
        compute: Callable[[], list[Tensor]],
        num_rows: int,
        grad: bool,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the outputs of all rows."""
        with torch.set_grad_enabled(grad):
            outputs = compute()
        ctx.ranks, ctx.outputs, ctx.params, ctx.num_rows = ranks, outputs, params, num_rows
        gathered = tuple(ranks.gather(a.detach(), num_rows) for a in outputs)
        constant = (a for a, b in zip(gathered, outputs, strict=True) if not b.requires_grad)
        ctx.mark_non_differentiable(*constant)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients by the parameters, of all rows; None for a parameter that no process uses."""
        ranks, params = ctx.ranks, ctx.params
        indices = ranks.own_rows(ctx.num_rows, gradients[0].device)
        real = torch.arange(len(indices), device=indices.device) * ranks.size + ranks.rank < ctx.num_rows
        outputs, given = [], []
        for output, gradient in zip(ctx.outputs, gradients, strict=True):
            if output.requires_grad:
                rows = gradient[indices]
                rows[~real] = 0
                outputs.append(output)
                given.append(rows)
        local = torch.autograd.grad(outputs, params, given, allow_unused=True)
        return None, None, None, None, *sum_gradients(local, params)


def sum_gradients(local: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the sums of gradients over the processes; None for a parameter that no process uses."""
    used = torch.tensor([g is not None for g in local], dtype=params[0].dtype, device=params[0].device)
    sums = [torch.zeros_like(p) if g is None else g for p, g in zip(params, local, strict=True)]
    reduce([*sums, used])
    everywhere = all(g is not None for g in local)  # then `used` is not read, which would take time
    numbers = [1] * len(params) if everywhere else used.tolist()
    return [g if n else None for g, n in zip(sums, numbers, strict=True)]


def check_rows(outputs: Any, num_rows: int) -> None:
    """Raise ValueError for an output of a network without a row for each of its samples."""
    for name, array in named_outputs(outputs):
        if array.shape[:1] != (num_rows,):
            raise ValueError(
                f"data-parallel training needs outputs with a row for each sample, got {name or 'an output'} "
                f"of shape {list(array.shape)} for {num_rows} samples; return it from the network without "
                "reducing it, or use devices=1"
            )


def running_statistics(net: nn.Module) -> list[Tensor]:
    """Return the running statistics that a pass through a network has updated.

    They are changed before the backward pass, which does not use them. Autograd does not watch `data`.
    """
    training: list[Any] = [m for m in net.modules() if m.training]
    modules = [m for m in training if getattr(m, "running_mean", None) is not None]
    return [buffer.data for module in modules for buffer in (module.running_mean, module.running_var)]


def average(tensors: Sequence[Tensor], size: int) -> None:
    """Replace tensors by their means over the processes."""
    if tensors:
        reduce(tensors)
        for tensor in tensors:
            tensor /= size


@torch.no_grad()
def reduce(tensors: Sequence[Tensor]) -> None:
    """Add up each tensor over the processes, in place; tensors of the same dtype are sent together."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        with lost_process_named():
            distributed.all_reduce(flat)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view(tensor.shape))


@contextmanager
def lost_process_named() -> Iterator[None]:
    """Raise LostProcessError if the processes cannot communicate, because one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        line = str(error).strip().split("\n")[0]
        reason = re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0]  # without the line of the C++ code
        raise LostProcessError(reason) from error


def check_batch_norm(net: nn.Module, device: torch.device) -> None:
    """Raise ValueError for synchronised batch normalisation on a CPU, which PyTorch does not have."""
    if device.type == "cpu" and any(isinstance(module, nn.SyncBatchNorm) for module in net.modules()):
        raise ValueError(
            "synchronised batch normalisation needs a GPU, got accelerator=cpu; set sync_batchnorm=False of "
            "the Trainer, which normalises the rows of each process"
        )


def without_wrapper(trainer: pl.Trainer) -> None:
    """Let a Trainer train a module without torch's wrapper for data parallelism."""
    if isinstance(trainer.strategy, DDPStrategy):
        strategy: Any = trainer.strategy
        strategy.configure_ddp = lambda: None


def distributed_sampler(loader: Any, ranks: Ranks) -> Any:
    """Return the DistributedSampler of a loader or of its batch sampler, for these processes, or None."""
    for part in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(part, "sampler", None)
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas == ranks.size:
            return sampler
    return None


def starts_scripts(strategy: Any) -> bool:
    """Return whether the further processes of a strategy run the script again, as those of `ddp` do."""
    return hasattr(strategy.launcher, "cluster_environment")


def spawned_processes() -> ValueError:
    """Return the error for processes whose module would not come back: only its weights do."""
    return ValueError(
        "the Trainer's strategy must be ddp, which runs the script in every process, got ddp_spawn, ddp_fork "
        "or ddp_notebook, whose processes return the weights, but not what a method keeps; set strategy=ddp"
    )


def check_strategy(strategy: Any) -> None:
    """Raise ValueError for a strategy, or the name of a strategy, that is not supported."""
    if isinstance(strategy, str):
        name, supported = strategy, strategy == "auto" or strategy.startswith(("ddp", "single"))
    else:
        name = type(strategy).__name__
        supported = type(strategy) is DDPStrategy or isinstance(strategy, SingleDeviceStrategy)
    if not supported:
        raise ValueError(
            f"the Trainer's strategy must be auto, ddp, ddp_spawn or one for a single device, got {name}; "
            "set strategy=ddp"
        )
