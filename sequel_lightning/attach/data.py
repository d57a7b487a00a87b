"""`with_replay`: the data of a task with samples of past tasks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sized
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset

from sequel_lightning.attach.loaders import ReplayLoader, replay_loader, task_dataset
from sequel_lightning.attach.replay import Replay


def with_replay(data: Any, keep: Replay, labels: Any = None, past: Iterable[Any] = ()) -> Any:
    """Return the data of a task with the replay of a callback.

    The samples of the memory are read from the datasets of the past tasks, through their own transforms and
    the loader's `collate_fn`. Nothing is copied, so the datasets have to stay as they are: the same index
    has to give the same sample.

    Args:
        data: a DataLoader of the task, or a LightningDataModule whose `train_dataloader` returns one.
        keep: the callback, for example `attach.ER`. The Trainer gets it too.
        labels: the label of each sample of the dataset `[N]`; only for a callback with `classes`.
        past: loaders or datasets of the past tasks, in order; only to resume in a new process, where the
            callback has not trained on them.

    Returns:
        An iterable of the same number of batches, or a copy of the data module with such a loader.

    Raises:
        ValueError: `data` is neither, or its dataset has no indices; a batch is larger than the memory; or
            there are not as many labels as samples.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from sequel_lightning import attach
        >>> keep = attach.ER(mem_size=20, mem_batch_size=5)
        >>> data = TensorDataset(torch.arange(8.0))
        >>> [batch[0].tolist() for batch in attach.with_replay(DataLoader(data, batch_size=4), keep)]
        [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0, 0.0, 1.0, 2.0, 3.0]]
    """
    if not isinstance(keep, Replay):
        raise ValueError(
            f"with_replay needs the callback of a replay method, such as attach.ER, got a "
            f"{type(keep).__name__}; other callbacks take the loader as it is"
        )
    if past:
        keep.datasets = [task_dataset(loader) for loader in past]
    if not isinstance(data, pl.LightningDataModule):
        check_loader(data, keep, labels)
        return replay_loader(data, keep, labels)
    module: Any = copy.copy(data)

    def train_dataloader() -> ReplayLoader:
        loader = type(module).train_dataloader(module)
        check_loader(loader, keep, labels)
        return replay_loader(loader, keep, labels)

    module.train_dataloader = train_dataloader
    return module


def check_loader(loader: Any, keep: Replay, labels: Any) -> None:
    """Raise ValueError unless a callback can replay the samples of a loader."""
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"with_replay needs a DataLoader or a LightningDataModule with one, got a "
            f"{type(loader).__name__}; the memory holds indices into the loader's dataset. Give a DataLoader "
            "of a dataset with the samples; those of a task are task.train.take(np.arange(len(task.train)))"
        )
    dataset: Any = loader.dataset
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"with_replay needs a dataset with indices, got a {name} without __getitem__; the memory holds "
            "indices. For streams of samples, use a method of sequel_lightning, which copies samples"
        )
    if loader.batch_sampler is None or not isinstance(loader.batch_sampler, Sized):
        raise ValueError(
            "with_replay needs a DataLoader that makes a known number of batches, got "
            f"{'batch_size=None' if loader.batch_sampler is None else 'a batch sampler without a length'}"
        )
    keep.check_batch_size(loader.batch_size or 1)
    if keep.labelled and (labels is None or len(labels) != len(dataset)):
        got = "none" if labels is None else f"{len(labels)}"
        raise ValueError(
            f"labels must have one label for each of the {len(dataset)} samples, because "
            f"attach.{type(keep).__name__} has classes=..., got {got}"
        )
