"""Callbacks of an unchanged module on 2 and 3 processes end with the numbers of one process."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from sequel_lightning import attach
from sequel_lightning.attach.replay import Replay
from tests.lightning.processes import Group, groups_of_a_file
from tests.lightning.test_attach import CLIPPED, PAIRS
from tests.lightning.user_modules import (
    TASKS,
    Classifier,
    Items,
    Resumable,
    adam,
    loader,
    outputs,
    trainer,
    with_loader,
)
from tests.quick import some

groups = groups_of_a_file()
BATCH = 6
"""Samples of a batch in all processes."""


def several(size: int) -> dict[str, Any]:
    return {"devices": size, "strategy": "ddp"} if size > 1 else {}


def samples(task: int, count: int) -> Items:
    dataset: Any = loader(task).dataset
    return Items(dataset.x[:count], dataset.y[:count], 0.0)


def state_of(module: pl.LightningModule, keep: attach.Attached) -> dict[str, Any]:
    """Return the weights and buffers, and what the callback keeps, as arrays by name."""
    flat: dict[str, Any] = {name: value.numpy() for name, value in module.state_dict().items()}
    for name, value in keep.memory().items():
        parts = value if isinstance(value, dict) else {"": value}
        if name == "rows":
            parts = {"": np.fromiter(value, object)}
        flat |= {f"{name}.{key}": np.asarray(part) for key, part in parts.items()}
    return flat


def fitted(name: str, size: int, epochs: int, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train on three tasks; Lightning adds a DistributedSampler that shuffles, as one process has here."""
    module, keep = Classifier(adam), PAIRS[name][2]()
    for task in range(TASKS):
        data = samples(task, count)
        sampler: Any = DistributedSampler(data, 1, 0) if size == 1 else None
        batches: Any = DataLoader(data, BATCH // size, sampler=sampler)
        new = trainer([keep], max_epochs=epochs, **several(size), **options)
        new.fit(module, with_loader(batches, [keep], bare=True))
    return state_of(module, keep)


one_process = cache(
    lambda name, epochs, count, clipped: fitted(name, 1, epochs, count, CLIPPED if clipped else {})
)


def check(group: Group, size: int, name: str, epochs: int, count: int, clipped: bool) -> None:
    expected = one_process(name, epochs, count, clipped)
    results = group.do(fitted, name, size, epochs, count, CLIPPED if clipped else {})
    for actual in results:
        assert actual.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(actual[key], results[0][key], err_msg=key)
            if "rows" in key:
                assert actual[key].tolist() == array.tolist()
            elif "accuracy" not in key:  # sums of a metric, of the rows of a process
                np.testing.assert_allclose(actual[key], array, rtol=0, atol=1e-10, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "clipped"), [(2, True), (3, False)], ids=["2 processes, clipped", "3 processes"]
)
@pytest.mark.parametrize("name", PAIRS)
def test_an_attached_method_ends_as_with_one_process(
    groups: Any, name: str, size: int, clipped: bool
) -> None:
    """The draws have 5 samples, which neither 2 nor 3 divide. The loaders shuffle."""
    check(groups(size), size, name, 2, 204, clipped)


@pytest.mark.parametrize("name", ["ewc", "si", "lfl", "er", "derpp", "agem"])
def test_two_processes_end_as_one(groups: Any, name: str) -> None:
    check(groups(2), 2, name, 1, 36, False)


class Frozen(Classifier):
    """A module whose weights stay the same, because its learning rate is 0."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.0))


KEPT: dict[str, Any] = {
    "ewc": lambda: attach.EWC(1.0, samples=None),
    "the first samples": lambda: attach.EWC(1.0, samples=9),
    "er": lambda: attach.ER(mem_size=50, mem_batch_size=3),
    "der": lambda: attach.DER(outputs, mem_size=50, mem_batch_size=3),
}


def kept(name: str, size: int, own_sampler: bool) -> dict[str, Any]:
    """Train on an odd number of samples, in their order, with a learning rate of 0."""
    module, keep = Frozen(), KEPT[name]()
    data = samples(0, 17)
    sampler: Any = DistributedSampler(data, shuffle=False) if own_sampler else None
    batches: Any = DataLoader(data, BATCH // size if own_sampler else BATCH, sampler=sampler)
    new = trainer([keep], use_distributed_sampler=False, **several(size))
    new.fit(module, with_loader(batches, [keep], bare=True))
    return state_of(module, keep)


@pytest.mark.parametrize(("size", "own_sampler"), [(2, True), (2, False), (3, True)])
def test_samples_that_a_sampler_repeats_are_left_out(groups: Any, size: int, own_sampler: bool) -> None:
    """Of memories and importances; without a sampler, all processes have the same batches."""
    for name in KEPT:
        expected = kept(name, 1, False)
        for actual in groups(size).do(kept, name, size, own_sampler):
            for key in expected.keys() - {"accuracy.tp", "accuracy.fp", "accuracy.tn", "accuracy.fn"}:
                if key == "rows.":
                    assert actual[key].tolist() == [(0, k) for k in range(17)] + [None] * 33
                else:
                    np.testing.assert_allclose(actual[key], expected[key], rtol=0, atol=1e-14, err_msg=key)


class Normalised(Classifier):
    """A module with batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__(adam, dropout=0.2)
        self.net.body.append(torch.nn.BatchNorm1d(16, dtype=torch.float64))


def resumed(name: str, folder: Path, step: int | None) -> dict[str, Any]:
    """Train on three tasks, perhaps resumed within the second one; random numbers depend on the process."""
    rank, keep = int(os.environ["LOCAL_RANK"]), PAIRS[name][2]()
    module, saver = Normalised(), ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    for task in range(1 if step else 0, TASKS):
        data, resumes = samples(task, 40), task == 1 and step is not None
        if isinstance(keep, Replay):
            past = [samples(0, 40)] if resumes else []
            batches: Any = with_loader(DataLoader(data, 3), [keep], past=past)
        else:
            batches = Resumable(DataLoader(data, 3, sampler=DistributedSampler(data, 2, rank)))
        torch.manual_seed(10 * task + rank)
        file = folder / f"step={step}.ckpt" if resumes else None
        callbacks, more = ([keep, saver], {"enable_checkpointing": True}) if task == 1 else ([keep], {})
        new = trainer(callbacks, max_epochs=2, **several(2), **more)
        new.fit(module, batches, ckpt_path=file, weights_only=True)
    return state_of(module, keep)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", some(["ewc", "si", "lfl", "er", "derpp", "agem"], ["derpp"]))
def test_a_fit_of_two_processes_resumes_within_a_task(groups: Any, name: str, tmp_path: Path) -> None:
    straight = groups(2).do(resumed, name, tmp_path, None)
    for step in (5, 10):
        for a, b, first in zip(
            groups(2).do(resumed, name, tmp_path, step), straight, straight[:1] * 2, strict=True
        ):
            for key, array in b.items():
                np.testing.assert_array_equal(a[key], array, err_msg=key)
                if "accuracy" not in key:
                    np.testing.assert_array_equal(a[key], first[key], err_msg=key)


class Data(pl.LightningDataModule):
    """A user's data module with a batch sampler, whose sampler Lightning replaces."""

    def train_dataloader(self) -> Any:
        data = samples(0, 17)
        return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 3, drop_last=False))


def with_data_module(hook: bool) -> list[Any]:
    """Return the memory after a fit with a data module, or with the loader that it returns."""
    module, keep = Classifier(adam), attach.ER(mem_size=50, mem_batch_size=3)
    data = attach.with_replay(Data() if hook else Data().train_dataloader(), keep)
    trainer([keep], **several(2)).fit(module, data)
    return keep.rows


@pytest.mark.parametrize("hook", [True, False])
def test_a_data_module_and_its_loader(groups: Any, hook: bool) -> None:
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))  # of a DistributedSampler
    assert groups(2).do(with_data_module, hook) == [[(0, int(k)) for k in order] + [None] * 33] * 2


def wrong(name: str) -> str:
    """Return the message of the ValueError that a fit raises."""
    rank = int(os.environ["LOCAL_RANK"])
    made: dict[str, attach.ER] = {
        "settings": attach.ER(seed=rank),
        "memory": attach.ER(mem_size=BATCH, mem_batch_size=2),
        "sizes": attach.ER(),
    }
    keep = made[name]
    sizes = {"settings": 3, "memory": 4, "sizes": 3 + rank}
    more = {"use_distributed_sampler": False} if name == "sizes" else {}
    data = with_loader(DataLoader(samples(0, 36), sizes[name]), [keep])
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        trainer([keep], **several(2), **more).fit(Classifier(adam), data)
    return str(caught.value)


def test_errors_before_the_first_step(groups: Any) -> None:
    for name, message in {
        "settings": "settings must be the same in every process, got attach.ER.seed=0 and 1 in processes",
        "memory": "at least batch_size=8 slots",
        "sizes": "with_replay needs batches of the same size in every process, got [3, 4] samples in batch 0",
    }.items():
        assert all(message in text for text in groups(2).do(wrong, name)), name
    for strategy in ("ddp_spawn", "ddp_fork"):
        spawned = trainer([], devices=2, strategy=strategy)
        with pytest.raises(ValueError, match=r"must be ddp, .* got ddp_spawn.* not what a method keeps; set"):
            attach.EWC(1.0).setup(spawned, Classifier(adam), "fit")
