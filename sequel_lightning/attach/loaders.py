"""Loaders that give the samples of a memory beside those of a task: a memory is a list of indices.

The loader of a task says which rows of its dataset are in a batch. The plan of the callback says which rows
of which task's dataset the memory holds. Both go through the datasets and the `collate_fn` of the user, so
their transforms run again, and no sample is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset

from sequel_core.stream.memory import StepPlan

if TYPE_CHECKING:
    from sequel_lightning.attach.replay import Replay

Row = tuple[int, Any]
"""The task of a sample, and its index in the dataset of the task."""


class Step(NamedTuple):
    """What a training step needs beside its batch."""

    plan: StepPlan
    rows: list[Row]  # of the batch
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


class ReplayLoader(DataLoader[Any]):
    """A task's loader with the replay of a callback; `with_replay` makes it.

    It continues within an epoch if Lightning's checkpoint was written there, with the same batches.

    Attributes:
        loader: of the task.
        steps: what the callback needs for the batches that the loader has given and that are not trained yet.
    """

    def __init__(self, loader: DataLoader[Any], keep: Replay, labels: Any) -> None:
        super().__init__(
            loader.dataset,
            batch_sampler=loader.batch_sampler,
            collate_fn=loader.collate_fn,
            **{name: getattr(loader, name) for name in OPTIONS},
        )
        self.loader, self.keep = loader, keep
        self.steps: deque[Step] = deque()
        self._labels = labels
        self._planned: deque[tuple[StepPlan, list[Row]]] = deque()
        self._epoch: list[Any] = []  # the rows of each batch of this epoch
        self._trained = 0  # batches of this epoch that were trained on
        self._remaining: list[Any] | None = None  # rows of the batches that a resumed epoch begins with
        self._inner: tuple[int, DataLoader[Any]] | None = None  # number of past tasks, and the loader of rows

    def __iter__(self) -> Any:
        """Return the batches of an epoch."""
        self.steps.clear()
        self._planned.clear()
        self._epoch, self._trained = [], 0
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
        return {"remaining": self._epoch[self._trained :], "generator": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self._remaining = state_dict["remaining"] or None
        if self.generator is not None and state_dict["generator"] is not None:
            self.generator.set_state(state_dict["generator"])

    def _batches(self, parts: Iterator[list[Any]]) -> Iterator[Any]:
        for batch, *draws in parts:
            self.steps.append(Step(*self._planned.popleft(), draws))
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
        self._epoch = list(self.batch_sampler or ()) if remaining is None else remaining
        for indices in self._epoch:
            rows = [(task, index) for index in indices]
            labels = [int(self._labels[index]) for index in indices] if keep.labelled else [0] * len(rows)
            plan = planner.next(labels, [keep.planned_task()] * len(rows))
            reads = [[held[slot] for slot in slots if slot < len(held)] for slots in plan.reads]
            draws = [draw if used else [] for draw, used in zip(reads, keep.used_draws(), strict=True)]
            for slot, row in zip(plan.write, rows, strict=True):
                if slot < len(held):
                    held[slot] = row
            self._planned.append((plan, rows))
            yield [rows + draws[0]] if keep.together else [rows, *draws]


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


def _unchanged(batches: list[Any]) -> list[Any]:
    return batches


def task_loader(loader: Any) -> Any:
    """Return the loader of a task without replay."""
    return loader.loader if isinstance(loader, ReplayLoader) else loader


def task_dataset(data: Any) -> Any:
    """Return the dataset of a loader, or the dataset itself."""
    loader = task_loader(data)
    return loader.dataset if isinstance(loader, DataLoader) else loader
