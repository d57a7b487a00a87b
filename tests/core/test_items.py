"""Inputs and targets read item by item from data sets: images, tables, tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from sequel_core.stream.items import ItemArrays
from sequel_core.stream.task import JoinedSplit, Split, join
from sequel_core.stream.trees import LeafSpec


class Recording(Dataset[Any]):
    """A data set that records the indices that are read."""

    def __init__(self, items: Sequence[Any], **attributes: Any) -> None:
        self.items = items
        self.read: list[int] = []
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.items[index]


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return rng.integers(0, 256, (5, 3, 4, 3), dtype=np.uint8)


def test_images_of_all_types_become_the_same_array(pixels: np.ndarray[Any, Any]) -> None:
    halves = pixels.astype(np.float64) / 2
    images_by_type: dict[str, tuple[list[Any], np.ndarray[Any, Any]]] = {
        "array": (list(pixels), pixels),
        "float64 array": (list(halves), halves.astype(np.float32)),
        "grey array": (list(pixels[..., 0]), pixels[..., :1]),
        "tensor": ([torch.tensor(x).permute(2, 0, 1) for x in pixels], pixels),
        "half tensor": ([torch.tensor(x).permute(2, 0, 1).half() for x in pixels], pixels.astype(np.float32)),
        "learned tensor": (
            [torch.tensor(x).permute(2, 0, 1).requires_grad_() for x in halves],
            halves.astype(np.float32),
        ),
        "grey tensor": ([torch.tensor(x[..., 0]) for x in pixels], pixels[..., :1]),
        "PIL": ([Image.fromarray(x) for x in pixels], pixels),
        "grey PIL": ([Image.fromarray(x[..., 0]) for x in pixels], pixels[..., :1]),
    }
    rows = np.array([3, 0, 3])
    for name, (images, expected) in images_by_type.items():
        converted = ItemArrays(Recording([(image, 0) for image in images])).x
        assert converted.shape == expected.shape, name
        assert converted.dtype == expected.dtype, name
        np.testing.assert_array_equal(converted[rows], expected[rows], name)


def test_labels_come_from_attributes_of_the_data_set(pixels: np.ndarray[Any, Any]) -> None:
    items = [(x, torch.tensor(label)) for x, label in zip(pixels, (4, 2, 7, 2, 0), strict=True)]
    listed = Recording(items, targets=[4, 2, 7, 2, 0])
    tensor = Recording(items, targets=["a"] * 5, labels=torch.tensor([4, 2, 7, 2, 0]))
    subset: Dataset[Any] = Subset(listed, [3, 2])
    both: Any = ConcatDataset([tensor, Subset(tensor, [0])])
    cases: list[tuple[Any, list[int]]] = [(listed, [4, 2, 7, 2, 0]), (tensor, [4, 2, 7, 2, 0])]
    cases += [(subset, [2, 7]), (both, [4, 2, 7, 2, 0, 4])]
    for data, expected in cases:
        listed.read.clear()
        tensor.read.clear()
        labels = ItemArrays(data).y
        assert labels.tolist() == expected
        assert labels.dtype == np.int64
        assert len(set(listed.read + tensor.read)) == 1  # the first item, for its shape


def test_labels_are_read_from_the_items_if_no_attribute_has_them(pixels: np.ndarray[Any, Any]) -> None:
    tensors = TensorDataset(torch.tensor(pixels).permute(0, 3, 1, 2), torch.tensor([4, 2, 7, 2, 0]))
    assert ItemArrays(tensors).y.tolist() == [4, 2, 7, 2, 0]
    items = [(x, y) for x, y in zip(pixels, (1, 0, 1, 0, 0), strict=True)]
    changed = Recording(items, targets=[4, 2, 7, 2, 0], target_transform=lambda y: y % 2)
    assert ItemArrays(changed).y.tolist() == [1, 0, 1, 0, 0]
    assert ItemArrays(Subset(changed, [2, 1])).y.tolist() == [1, 0]
    assert ItemArrays(Recording(items, targets=[0, 1])).y.tolist() == [1, 0, 1, 0, 0]  # too few


def test_requested_rows_are_read_once_each(pixels: np.ndarray[Any, Any]) -> None:
    data = Recording([(x, 1) for x in pixels], targets=[1] * 5)
    split = Split(ItemArrays(data).x, np.array([3] * 5), task=2).pick(np.array([4, 0, 2]))
    data.read.clear()
    samples = split.take(np.array([2, 0, 2, 2]))
    assert data.read == [2, 4]
    np.testing.assert_array_equal(samples.x, pixels[[2, 4, 2, 2]])
    assert (samples.y.tolist(), samples.t.tolist()) == ([3] * 4, [2] * 4)


def test_a_data_set_is_a_part_of_a_joined_split(pixels: np.ndarray[Any, Any]) -> None:
    items = Split(ItemArrays(Recording([(x, 1) for x in pixels])).x, np.ones(5, np.int64), task=1)
    joined = join([Split(pixels, np.zeros(5, np.int64)), items])
    assert isinstance(joined, JoinedSplit)
    samples = joined.take(np.array([7, 1, 9]))
    np.testing.assert_array_equal(samples.x, pixels[[2, 1, 4]])
    assert (samples.y.tolist(), samples.t.tolist()) == ([1, 0, 1], [1, 0, 1])


def test_tables_of_all_types_become_the_same_array(rng: np.random.Generator) -> None:
    table = rng.normal(size=(5, 3))
    floats = table.astype(np.float32)
    integers: np.ndarray[Any, Any] = rng.integers(-9, 9, (5, 3), dtype=np.int16)
    cases: dict[str, tuple[list[Any], np.ndarray[Any, Any]]] = {
        "array": (list(table), floats),
        "tensor": (list(torch.tensor(table)), floats),
        "list": (table.tolist(), floats),
        "integers": (list(integers), integers),
        "integer tensor": (list(torch.tensor(integers)), integers),
        "half": (list(torch.tensor(integers).half()), integers.astype(np.float16)),
        "booleans": (list(integers > 0), integers > 0),
        "numbers": (table[:, 0].tolist(), floats[:, 0]),
        "videos": ([np.full((2, 3, 4, 5), k, np.uint8) for k in range(5)], np.indices((5, 2, 3, 4, 5))[0]),
    }
    for name, (values, expected) in cases.items():
        x = ItemArrays(Recording([(value, 0) for value in values])).x
        assert x.shape == expected.shape, name
        assert x.dtype == ("uint8" if name == "videos" else expected.dtype), name
        rows = x[np.array([3, 0, 3])]
        assert rows.dtype == x.dtype, name
        np.testing.assert_array_equal(rows, expected[[3, 0, 3]], name)


def test_items_with_several_arrays_are_read_once(rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 90, (4, 6))
    depth = rng.normal(size=(4, 2, 3)).astype(np.float32)
    boxes = rng.normal(size=(4, 2))
    items = [
        ({"tokens": torch.tensor(tokens[k]), "image": {"depth": torch.tensor(depth[k])}}, {"box": boxes[k]})
        for k in range(4)
    ]
    data = Recording(items)
    arrays = ItemArrays(data)
    split = Split(arrays.x, arrays.y, task=1)
    assert split.x_spec == {
        "tokens": LeafSpec((6,), "int64"),
        "image": {"depth": LeafSpec((2, 3), "float32")},  # not moved: in a dict, nothing is an image
    }
    assert split.y_spec == {"box": LeafSpec((2,), "float32")}
    data.read.clear()
    samples = split.pick(np.array([3, 2, 0])).take(np.array([2, 0, 2]))
    assert data.read == [0, 3]
    np.testing.assert_array_equal(samples.x["tokens"], tokens[[0, 3, 0]])
    np.testing.assert_array_equal(samples.x["image"]["depth"], depth[[0, 3, 0]])
    np.testing.assert_array_equal(samples.y["box"], boxes[[0, 3, 0]].astype(np.float32))
    both = join([split, Split({"tokens": tokens, "image": {"depth": depth}}, {"box": boxes})])
    np.testing.assert_array_equal(both.take(np.array([5, 1])).x["image"]["depth"], depth[[1, 1]])


@pytest.mark.parametrize(
    ("targets", "expected", "dtype"),
    [
        ([2, 0], [2, 0], "int64"),
        ([torch.tensor(2, dtype=torch.uint8), torch.tensor(0, dtype=torch.uint8)], [2, 0], "int64"),
        ([0.5, -1.0], [0.5, -1.0], "float32"),
        ([True, False], [True, False], "bool"),
        ([np.array([1, 0], bool), np.array([0, 0], bool)], [[True, False], [False, False]], "bool"),
        ([torch.tensor([4, -100]), torch.tensor([1, 2])], [[4, -100], [1, 2]], "int64"),
        ([np.array([0.5, 2.0]), np.array([1.0, 1.0])], [[0.5, 2.0], [1.0, 1.0]], "float32"),
    ],
)
def test_targets_of_all_types(targets: list[Any], expected: Any, dtype: str) -> None:
    # An attribute of integers is not taken for the targets if the items' targets are no labels.
    data = Recording([(np.zeros(3), y) for y in targets], targets=None if dtype == "int64" else [7, 7])
    y = ItemArrays(data).y
    assert (y.tolist(), y.dtype) == (expected, dtype)


def test_items_that_are_dicts() -> None:
    items = [{"ids": [k, 1, 2], "mask": torch.tensor([1, 1, 0]), "labels": k} for k in (3, 5)]
    arrays = ItemArrays(Recording(items), target="labels")
    assert arrays.y.tolist() == [3, 5]
    assert arrays.x["ids"][np.array([1, 0])].tolist() == [[5, 1, 2], [3, 1, 2]]
    assert arrays.x["mask"][np.array([1])].tolist() == [[1, 1, 0]]


IMAGE = np.zeros((3, 4, 1), np.uint8)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "mine is empty; it needs at least one item"),
        (iter(()), "mine must have __len__ and __getitem__, got tuple_iterator; collect"),
        ([IMAGE], r"mine, item 0: an item must be \(x, y, \.\.\.\) or a dict, got ndarray"),
        ([(IMAGE, 0), (IMAGE, 0.5)], r"mine, item 1: y must be int64 \[\] as in the first item, got float32"),
        ([(IMAGE, "a")], "mine, item 0: y must be numbers, got 'a'; number texts in the data set"),
        ([("a.png", 0)], r"mine, item 0: x must be numbers, got 'a.png'"),
        (
            [(IMAGE.astype(np.int64), 0)],
            r"an image must be uint8 or of floats, got int64 \(convert with x.astype\(np.uint8\); if it is",
        ),
        ([(Image.new("P", (4, 3)), 0)], r"item 0: a PIL image .*L, RGB, RGBA \(use .convert\('RGB'\)\), got"),
        (
            [({"ids": [1, 2]}, 0), ({"ids": [1, 2, 3]}, 0)],
            r"mine, item 1: x.ids must be int64 \[2\] as in the first item, got int64 \[3\]; resize, pad or",
        ),
        (
            [({"ids": [[1, 2], [3]]}, 0)],
            r"mine, item 0: x.ids must have one shape in all rows, got \[1\] in row 1 and \[2\] in row 0",
        ),
        (
            [({"ids": 1}, 0), ({"ids": 1, "mask": 1}, 0)],
            "mine, item 1: all items must have x.ids, as the first, got x.ids, x.mask",
        ),
        ([({"text": "a"}, 0)], "mine, item 0: x.text must be numbers, got 'a'"),
        ([{"ids": 1, "y": 2}], r"mine, item 0: target must name the key of y .* got the keys \['ids', 'y'\]"),
    ],
)
def test_an_error_names_the_bad_item(items: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemArrays(items, "mine")


def test_an_error_names_the_target() -> None:
    for items, message in (
        ([{"ids": 1, "y": 2}], r"item 0: target must be one of the keys \['ids', 'y'\], got 'labels'"),
        ([{"ids": 1, "labels": 2}, {"ids": 1}], r"item 1: target must be one of the keys \['ids'\], got"),
        ([{"labels": 2}], "item 0: a dict must have inputs beside the target 'labels'"),
        ([(1, 2)], "item 0: target is only used if items are dicts, got tuple; leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            ItemArrays(items, target="labels")


def test_an_error_names_a_bad_item_that_is_read_later() -> None:
    items: list[tuple[Any, int]] = [(IMAGE, 0), (IMAGE, 1), (IMAGE[:2], 0), (IMAGE.astype(np.float32), 0)]
    images = ItemArrays(Recording(items, targets=[0, 1, 0, 0]), "mine").x
    assert images[np.array([1, 0])].shape == (2, 3, 4, 1)
    with pytest.raises(
        ValueError, match=r"mine, item 2: x must be uint8 \[3, 4, 1\] .* got uint8 \[2, 4, 1\]"
    ):
        images[np.array([0, 2])]
    with pytest.raises(ValueError, match=r"mine, item 3: .* got float32 \[3, 4, 1\]; resize"):
        images[np.array([3])]
    with pytest.raises(ValueError, match="mine, item 0: the label is 0, but its targets have 5; make them"):
        ItemArrays(Recording(items[:2], targets=[5, 1]), "mine")


class RandomTargets(Recording):
    def __getitem__(self, index: int) -> Any:
        super().__getitem__(index)
        return np.zeros(2), float(len(self.read))


def test_targets_that_change_are_an_error() -> None:
    with pytest.raises(ValueError, match="item 0: the targets changed between two reads; they must be fixed"):
        ItemArrays(RandomTargets([0, 0]))
