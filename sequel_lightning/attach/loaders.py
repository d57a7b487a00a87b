"""Loaders that give the samples of a memory beside those of a task: a memory is a list of indices.

The loader of a task says which rows of its dataset are in a batch. The plan of the callback says which rows
of which task's dataset the memory holds. Both go through the datasets and the `collate_fn` of the user, so
their transforms run again, and no sample is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, Dataset

from sequel_core.stream.memory import StepPlan
from sequel_lightning.distributed import Ranks, distributed_sampler

if TYPE_CHECKING:
    from sequel_lightning.attach.replay import Replay

Row = tuple[int, Any]
"""The task of a sample, and its index in the dataset of the task."""


class Step(NamedTuple):
    """What a training step needs beside its batch."""

    plan: StepPlan
    rows: list[Row]  # of the batch, in all processes
    ranks: Ranks  # the processes among which the batch and the draws are divided
    reads: list[NDArray[np.integer[Any]]]  # slots of the samples of each draw in this process
    weights: list[float]  # of the mean loss of each draw, in a mean over the processes
    draws: list[Any]  # a batch for each draw that is not in the batch; None for an empty one


class Rows(Dataset[Any]):
    """The datasets of several tasks; an item is a list of batches.

    Args:
        datasets: of each task.
        collate: makes a batch of a list of samples.
    """

    def __init__(self, datasets: Sequence[Any], collate: Callable[[list[Any]], Any]) -> None:
        self._datasets, self._collate = datasets, collate

    def __getitem__(self, parts: list[list[Row]]) -> list[Any]:
        """Return a batch for each list of rows; None for an empty one."""
        return [self._collate(self._samples(rows)) if rows else None for rows in parts]

    def _samples(self, rows: list[Row]) -> list[Any]:
        samples: list[Any] = []
        for task, group in groupby(rows, key=itemgetter(0)):
            dataset, indices = self._datasets[task], [index for _, index in group]
            if hasattr(dataset, "__getitems__"):
                samples += dataset.__getitems__(indices)
            else:
                samples += [dataset[index] for index in indices]
        return samples


class Sampler:
    """An iterable that calls a function for its items."""

    def __init__(self, items: Callable[[], Iterator[Any]]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        """Return new items."""
        return self._items()


class Epoch(NamedTuple):
    """The indices of batches, of all processes."""

    batches: list[list[Any]]  # indices of each batch; row r + size * k is row k of process r, if divided
    divided: bool  # whether each process has other rows
    repeated: int  # number of indices at the end that a DistributedSampler has repeated


class ReplayLoader(DataLoader[Any]):
    """A task's loader with the replay of a callback; `with_replay` makes it, with the options of the loader.

    It continues within an epoch if Lightning's checkpoint was written there, with the same batches.
    Lightning may make it again, with a DistributedSampler. Then each process has some rows of a batch and of
    the draws. All processes make the plan of the whole batch.

    Attributes:
        keep: the callback.
        labels: of each sample of the dataset, or None.
        steps: what the callback needs for the batches that the loader has given and that are not trained yet.
    """

    def __init__(self, dataset: Any, keep: Replay, labels: Any, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.keep, self.labels = keep, labels
        self.steps: deque[Step] = deque()
        self._planned: deque[Step] = deque()  # without draws
        self._epoch = Epoch([], False, 0)
        self._trained = 0  # batches of this epoch that were trained on
        self._remaining: Epoch | None = None  # the batches that a resumed epoch begins with
        self._inner: tuple[int, DataLoader[Any]] | None = None  # number of past tasks, and the loader of rows

    @property
    def loader(self) -> DataLoader[Any]:
        """The loader of the task without replay."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return DataLoader(
            self.dataset, batch_sampler=self.batch_sampler, collate_fn=self.collate_fn, **options
        )

    def __iter__(self) -> Any:
        """Return the batches of an epoch."""
        self.steps.clear()
        self._planned.clear()
        self._epoch, self._trained = Epoch([], False, 0), 0
        with self._same_generators(self._remaining is not None):
            batches = iter(self._rows_loader())
        return self._batches(batches)

    def finish_step(self) -> None:
        """Count a batch that was trained on."""
        self._trained += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the rows of the batches that are left in this epoch."""
        generator = self.generator
        state = None if generator is None else generator.get_state()
        remaining = self._epoch._replace(batches=self._epoch.batches[self._trained :])
        return {"remaining": remaining._asdict(), "generator": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        remaining = Epoch(**state_dict["remaining"])
        self._remaining = remaining if remaining.batches else None
        if self.generator is not None and state_dict["generator"] is not None:
            self.generator.set_state(state_dict["generator"])

    def _batches(self, parts: Iterator[list[Any]]) -> Iterator[Any]:
        for batch, *draws in parts:
            self.steps.append(self._planned.popleft()._replace(draws=draws))
            yield batch

    @contextmanager
    def _same_generators(self, same: bool) -> Iterator[None]:
        """Restore the random generators afterwards, if `same`: a resumed epoch has begun already."""
        if not same:
            yield
            return
        generator = self.generator
        state = None if generator is None else generator.get_state()
        with isolate_rng():
            yield
        if generator is not None and state is not None:
            generator.set_state(state)

    def _rows_loader(self) -> DataLoader[Any]:
        """Return a loader of batches and draws, with the workers of the user's loader."""
        past = self.keep.past_datasets()
        if self._inner is None or self._inner[0] != len(past):
            inner: DataLoader[Any] = DataLoader(
                Rows([*past, self.dataset], self.collate_fn),
                batch_size=None,
                sampler=Sampler(self._plan),
                collate_fn=_unchanged,
                **{name: getattr(self, name) for name in OPTIONS},
            )
            self._inner = len(past), inner
        return self._inner[1]

    def _plan(self) -> Iterator[list[list[Row]]]:
        """Yield the rows of each batch and of its draws, from the state that the callback has now."""
        keep, task = self.keep, self.keep.tasks
        planner, held = keep.planner(), list(keep.rows)
        remaining, self._remaining = self._remaining, None
        self._epoch = self._new_epoch() if remaining is None else remaining
        batches, divided, repeated = self._epoch
        ranks = keep.ranks if divided else Ranks()
        for k, indices in enumerate(batches, 1):
            every = [(task, index) for index in indices]
            rows = every[: len(every) - repeated] if k == len(batches) else every
            labels = [int(self.labels[index]) for _, index in rows] if keep.labelled else [0] * len(rows)
            plan = planner.next(labels, [keep.planned_task()] * len(rows))
            reads, weights = self._divide(plan, ranks, len(every))
            draws = [[held[slot] for slot in slots] for slots in reads]
            for slot, row in zip(plan.write, rows, strict=True):
                if slot < len(held):
                    held[slot] = row
            self._planned.append(Step(plan, rows, ranks, reads, weights, []))
            batch = every[ranks.rank :: ranks.size]
            yield [batch + draws[0]] if keep.together else [batch, *draws]

    def _divide(self, plan: StepPlan, ranks: Ranks, num_rows: int) -> tuple[list[Any], list[float]]:
        """Return the slots of this process of each draw, and the weights of its mean losses."""
        keep = self.keep
        draws = [
            held_slots(slots if used else [], len(keep.rows))
            for slots, used in zip(plan.reads, keep.used_draws(), strict=True)
        ]
        parts = [slots[ranks.rank :: ranks.size] for slots in draws]
        if keep.together:
            return parts, [ranks.weight(num_rows + len(slots)) for slots in draws]
        weights = [ranks.weight(len(slots)) for slots in draws]
        # Every process takes a pass, perhaps with a sample of weight 0.
        return [a if len(a) else slots[-1:] for a, slots in zip(parts, draws, strict=True)], weights

    def _new_epoch(self) -> Epoch:
        """Return the batches of an epoch, in all processes.

        Raises:
            ValueError: the batches of the processes differ in size, or do not fit into the memory.
        """
        ranks, sampler = self.keep.ranks, distributed_sampler(self, self.keep.ranks)
        batches = [list(indices) for indices in self.batch_sampler or ()]
        processes = ranks.gather_objects(batches)
        divided = sampler is not None or any(other != batches for other in processes)
        if divided:
            batches = joined_batches(processes)
        self.keep.check_batch_size(max(map(len, batches), default=1))
        repeated = 0 if sampler is None else max(0, sum(map(len, batches)) - len(sampler.dataset))
        return Epoch(batches, divided, repeated)


OPTIONS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)
"""Arguments of a DataLoader that a loader of rows takes over."""


def replay_loader(loader: DataLoader[Any], keep: Replay, labels: Any) -> ReplayLoader:
    """Return a loader with the options of a task's loader, and the replay of a callback."""
    options = {name: getattr(loader, name) for name in ("collate_fn", *OPTIONS)}
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler:  # Lightning replaces its sampler
        options |= {name: getattr(batches, name) for name in ("batch_size", "sampler", "drop_last")}
    else:
        options["batch_sampler"] = batches
    return ReplayLoader(loader.dataset, keep, labels, **options)


def joined_batches(processes: list[list[list[Any]]]) -> list[list[Any]]:
    """Return the indices of the batches of all processes, from the batches of each.

    Raises:
        ValueError: the batches of the processes differ in size.
    """
    for k, parts in enumerate(zip_longest(*processes, fillvalue=[])):
        sizes = [len(indices) for indices in parts]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"with_replay needs batches of the same size in every process, got {sizes} samples in batch "
                f"{k}; use a DistributedSampler, or drop_last=True"
            )
    return [
        [index for row in zip(*parts, strict=True) for index in row] for parts in zip(*processes, strict=True)
    ]


def held_slots(slots: Any, size: int) -> Any:
    """Return the slots of a plan that are slots of a memory, without padding."""
    return np.asarray(slots)[np.asarray(slots) < size]


def _unchanged(batches: list[Any]) -> list[Any]:
    return batches


def task_loader(loader: Any) -> Any:
    """Return the loader of a task without replay."""
    return loader.loader if isinstance(loader, ReplayLoader) else loader


def task_dataset(data: Any) -> Any:
    """Return the dataset of a loader, or the dataset itself."""
    loader = task_loader(data)
    return loader.dataset if isinstance(loader, DataLoader) else loader
