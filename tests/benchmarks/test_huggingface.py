"""`from_huggingface` with data sets of `datasets`, if it is installed, and with lists of items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sequel_benchmarks import from_huggingface

LENGTH = 6


def columns(task: int, count: int) -> dict[str, Any]:
    """Return columns as a tokenizer makes them; row k of a task has k % 5 + 1 tokens."""
    rng = np.random.default_rng([task, count])
    ids = [rng.integers(1, 30, k % 5 + 1).tolist() for k in range(count)]
    return {"text": [str(row) for row in ids], "ids": ids, "label": [(k + task) % 3 for k in range(count)]}


def padded(rows: list[list[int]]) -> Any:
    return np.array([row + [0] * (LENGTH - len(row)) for row in rows])


def collate(items: list[Any]) -> dict[str, Any]:
    ids = padded([item["ids"] for item in items])
    labels = np.array([item["label"] for item in items])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).astype(np.int64),
        "labels": labels,
        "length": ids[:, 0],
    }


class Columns:
    """The part of the interface of `datasets.Dataset` that is used."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self.columns.items()}

    def select_columns(self, names: list[str]) -> Columns:
        return Columns({name: self.columns[name] for name in names})


def make(library: str, columns: dict[str, Any]) -> Any:
    if library == "interface":
        return Columns(columns)
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def dataset_dict(library: str, parts: dict[str, Any]) -> Any:
    data = {name: make(library, part) for name, part in parts.items()}
    return data if library == "interface" else pytest.importorskip("datasets").DatasetDict(data)


libraries = pytest.mark.parametrize("library", ["interface", "datasets"])


@libraries
def test_collated_items(library: str) -> None:
    parts = [{"train": columns(t, 12), "test": columns(t, 5), "dev": columns(t, 4)} for t in range(2)]
    stream = from_huggingface(
        [dataset_dict(library, part) for part in parts],
        collate,
        inputs=["input_ids", "attention_mask"],
        splits=("train", "test", "dev"),
        name="texts",
    )
    assert (stream.name, stream.scenario, stream.num_classes) == ("texts", "domain", 3)
    for t, task in enumerate(stream.tasks):
        for split, part in ((task.train, "train"), (task.test, "test"), (task.validation, "dev")):
            x, y, owner = split.take(np.arange(len(split)))
            ids = padded(parts[t][part]["ids"])
            assert sorted(x) == ["attention_mask", "input_ids"]
            np.testing.assert_array_equal(x["input_ids"], ids)
            np.testing.assert_array_equal(x["attention_mask"].sum(1), np.arange(len(ids)) % 5 + 1)
            np.testing.assert_array_equal(y, parts[t][part]["label"])
            assert (owner == t).all()


@libraries
def test_columns_that_need_no_collation(library: str) -> None:
    ids = padded(columns(0, 9)["ids"])
    data = {"text": ["a"] * 9, "input_ids": ids.tolist(), "targets": np.roll(ids, -1, 1).tolist()}
    stream = from_huggingface(
        dataset_dict(library, {"train": data, "test": data}), inputs=["input_ids"], target="targets"
    )
    assert len(stream) == 1
    assert stream.spec.per_token
    assert stream.num_classes == 1 + ids.max()
    x, y, _ = stream.tasks[0].train.take(np.array([7, 2]))
    np.testing.assert_array_equal(x["input_ids"], ids[[7, 2]])
    np.testing.assert_array_equal(y, np.roll(ids, -1, 1)[[7, 2]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"splits": ("train", "dev")}, r"task 0 must have the splits train, dev, got train, test; name its"),
        ({"splits": "train"}, r"splits must be the names of two or three splits, got 'train'"),
        (
            {"target": "stars"},
            r"task 0, train must have a column stars, got input_ids, attention_mask, labels",
        ),
        ({"inputs": ["ids"]}, r"task 0, train must have a column ids, got input_ids"),
        ({"scenario": "tasks"}, r"scenario must be one of domain, task, class"),
    ],
)
def test_what_is_missing_is_named(options: Any, words: str) -> None:
    texts = dataset_dict("interface", {"train": columns(0, 6), "test": columns(0, 6)})
    with pytest.raises(ValueError, match=words):
        from_huggingface([texts, texts], collate, **options)


def test_tasks_of_different_lengths_are_an_error() -> None:
    def shorter(items: list[Any]) -> dict[str, Any]:
        width = max(len(item["ids"]) for item in items)
        return {
            name: values[:, :width] if values.ndim > 1 else values for name, values in collate(items).items()
        }

    tasks = [
        dataset_dict("interface", {"train": columns(0, 6), "test": columns(0, 6)}),
        dataset_dict("interface", {"train": columns(1, 2), "test": columns(1, 2)}),
    ]
    with pytest.raises(
        ValueError, match=r"must have one shape and dtype.*\[2\].* in task 1 and .*\[5\].* in task 0"
    ):
        from_huggingface(tasks, shorter)
