"""Replay as a sampler of indices: which rows are read, by whose code, what is logged, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from sequel_core.stream.plan import uniform
from sequel_lightning import attach
from tests.lightning.user_modules import Classifier, adam, fit, outputs, trainer


class Recorder(pl.callbacks.Callback):
    """Keeps the batches that the module trains on."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append({name: part.clone() for name, part in batch.items()})


class Numbered(Dataset[Any]):
    """Row k of task t is t and k, and a new random number each time."""

    def __init__(self, task: int, count: int) -> None:
        self.task, self.count = task, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> dict[str, Any]:
        x = torch.rand(6, dtype=torch.float64)
        return {"x": x, "y": k % 4, "t": self.task, "k": k}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {**default_collate(samples), "size": torch.tensor(len(samples))}


def numbered(task: int, count: int = 12, **options: Any) -> DataLoader[Any]:
    return DataLoader(Numbered(task, count), 4, collate_fn=collate, **options)


def recorded(keep: attach.ER, **options: Any) -> list[Any]:
    recorder, module = Recorder(), Classifier(adam)
    torch.manual_seed(2)
    for task in range(2):
        data = attach.with_replay(numbered(task, **options), keep)
        trainer([keep, recorder], max_epochs=2).fit(module, data)
    return recorder.batches


def test_a_batch_holds_its_rows_and_rows_of_the_memory_before_it() -> None:
    """The memory is large enough for every row, so it holds all rows that were trained on."""
    keep = attach.ER(mem_size=100, mem_batch_size=3)
    batches = recorded(keep)
    past: list[tuple[int, int]] = []
    values: dict[tuple[int, int], list[float]] = {}
    for number, batch in enumerate(batches):
        rows = list(zip(batch["t"].tolist(), batch["k"].tolist(), strict=True))
        task, first = number // 6, 4 * (number % 3)
        assert rows[:4] == [(task, k) for k in range(first, first + 4)]
        assert batch["size"] == len(rows) == (4 if number == 0 else 7)
        assert set(rows[4:]) <= set(past)
        past += rows[:4]
        for row, x in zip(rows, batch["x"][:, 0].tolist(), strict=True):
            values.setdefault(row, []).append(x)
    assert keep.rows[:48] == past
    assert keep.rows[48:] == [None] * 52
    assert all(len(set(numbers)) == len(numbers) for numbers in values.values())  # transforms ran again


def test_a_full_reservoir_is_a_sample_of_all_rows() -> None:
    """Vitter's algorithm R, on the numbers of the plan."""
    keep = attach.ER(mem_size=8, mem_batch_size=3, seed=4)
    recorded(keep)
    stream = [(task, k) for task in range(2) for _ in range(2) for k in range(12)]
    reference: list[Any] = []
    for n, (row, u) in enumerate(zip(stream, uniform(4, "memory writes", count=48), strict=True), start=1):
        if n <= 8:
            reference.append(row)
        elif int(u * n) < 8:
            reference[int(u * n)] = row
    assert keep.rows == reference


@pytest.mark.slow
def test_workers_read_the_same_rows() -> None:
    workers = {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True}
    here, there = (recorded(attach.ER(mem_size=10, mem_batch_size=3), **options) for options in ({}, workers))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a["k"], b["k"])
        assert torch.equal(a["t"], b["t"])


class Data(pl.LightningDataModule):
    """A user's data module; its dataset is made in `setup`."""

    def __init__(self, task: int) -> None:
        super().__init__()
        self.task_number = task

    def setup(self, stage: str) -> None:
        self.dataset = Numbered(self.task_number, 12)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, 4, collate_fn=collate)


def test_a_data_module_gives_what_its_loader_gives() -> None:
    keep, recorder, module = attach.ER(mem_size=10, mem_batch_size=3), Recorder(), Classifier(adam)
    torch.manual_seed(2)
    for task in range(2):
        data = Data(task)
        trainer([keep, recorder], max_epochs=2).fit(module, datamodule=attach.with_replay(data, keep))
        assert "train_dataloader" not in vars(data)
    for a, b in zip(recorded(attach.ER(mem_size=10, mem_batch_size=3)), recorder.batches, strict=True):
        assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    "keep", [attach.AGEM(mem_size=20, mem_batch_size=5, num_tasks=2), attach.DERpp(outputs, beta=0.5)]
)
def test_metrics_and_logs_are_those_of_the_batches(keep: Any) -> None:
    logged: list[float] = []

    class Logging(Classifier):
        def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
            if name == "loss":
                logged.append(float(value.detach()))

        def on_train_epoch_end(self) -> None:
            state: Any = self.accuracy
            updates.append(int(state.tp.sum() + state.fn.sum()))

    updates: list[int] = []
    module = Logging(adam)
    for task in range(2):
        fit(module, task, [keep], steps=8)
    assert updates == [56, 112]  # samples of the tasks, since an unlogged metric is not reset
    assert len(logged) == 16


def test_with_ewc_the_fisher_information_is_of_the_task_alone() -> None:
    seen: list[int] = []

    def nll(module: Any, batch: Any) -> Tensor:
        seen.append(int(batch["t"][0]))
        value: Tensor = outputs(module, batch).square().sum(1)
        return value

    replay, keep = attach.ER(mem_size=10, mem_batch_size=3), attach.EWC(1.0, nll=nll)
    module = Classifier(adam)
    for task in range(2):
        trainer([replay, keep]).fit(module, attach.with_replay(numbered(task), replay))
    assert seen == [0] * 12 + [1] * 12


class Stream(IterableDataset[Any]):
    """A dataset without indices."""

    def __iter__(self) -> Any:
        return iter([])


def test_errors_before_training() -> None:
    keep, module = attach.ER(mem_size=20, mem_batch_size=5), Classifier(adam)
    with pytest.raises(ValueError, match=r"attach\.ER needs its own loader, got a DataLoader; call"):
        trainer([keep]).fit(module, numbered(0))
    by_class: dict[str, Any] = {"memory": "class_balanced", "classes": [range(4)]}
    dataset = TensorDataset(torch.zeros(8, 6))
    calls: list[tuple[Any, Any, str]] = [
        (DataLoader(Stream(), batch_size=2), keep, "needs a dataset with indices, got a Stream"),
        (
            [torch.zeros(2, 6)],
            keep,
            r"or a LightningDataModule with one, got a list; .* Give a DataLoader of a",
        ),
        (DataLoader(dataset, batch_size=None), keep, "a known number of batches, got batch_size=None"),
        (DataLoader(dataset, batch_size=21), keep, "at least batch_size=21 slots"),
        (DataLoader(dataset), attach.EWC(1.0), "callback of a replay method, such as attach.ER, got a EWC"),
        (DataLoader(dataset), attach.ER(**by_class), "one label for each of the 8 samples"),
    ]
    for data, callback, message in calls:
        with pytest.raises(ValueError, match=message):
            attach.with_replay(data, callback)
    for call, message in (
        (lambda: attach.ER(mem_size=5), "mem_batch_size must be <= the 5 samples of the memory"),
        (lambda: attach.ER(memory="class_balanced"), r"needs classes=\.\.\., the labels of each task"),
        (lambda: attach.AGEM(), r"memory=ring of attach.AGEM needs num_tasks=\.\.\."),
        (lambda: attach.AGEM(mem_size=1001, num_tasks=3), "must divide into the 3 equal parts"),
        (lambda: attach.DER(outputs, alpha=-1.0), "alpha must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_errors_of_later_tasks() -> None:
    module, keep = Classifier(adam), attach.AGEM(mem_size=20, mem_batch_size=5, num_tasks=1)
    fit(module, 0, [keep], steps=3)
    with pytest.raises(ValueError, match=r"fit would begin task 1, but attach\.AGEM has num_tasks=1"):
        fit(module, 1, [keep], steps=3)
    keep.datasets.clear()
    with pytest.raises(ValueError, match=r"give with_replay\(loader, keep, past=\[...\]\) the loaders"):
        keep.past_datasets()


def test_outputs_of_another_shape() -> None:
    sizes = iter([1, 2, 1])  # of the first batch, of the second one and of its draw
    keep = attach.DER(lambda module, batch: outputs(module, batch)[:, : next(sizes)])
    with pytest.raises(ValueError, match=r"outputs must return \[7, 1\] .* 7 samples, got \[7, 2\]"):
        fit(Classifier(adam), 0, [keep], steps=2)


def test_stored_outputs_are_those_of_the_step() -> None:
    """With dropout, which draws the same numbers as the training step."""
    keep, module = attach.DER(outputs, mem_size=30), Classifier(adam, dropout=0.5)
    logits: list[Tensor] = []

    def keep_output(net: Any, inputs: Any, output: Tensor) -> None:
        logits.append(output.detach().clone())

    module.net.register_forward_hook(keep_output)
    fit(module, 0, [keep], steps=1)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(keep.stored[:7], logits[1])
