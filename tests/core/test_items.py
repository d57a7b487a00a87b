"""Images read item by item from torch data sets, PIL images and NumPy arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from sequel_core.stream.items import ItemImages
from sequel_core.stream.task import JoinedSplit, Split, join


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
        converted = ItemImages(Recording([(image, 0) for image in images]))
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
        labels = ItemImages(data).labels
        assert labels.tolist() == expected
        assert labels.dtype == np.int64
        assert len(set(listed.read + tensor.read)) == 1  # the first item, for its shape


def test_labels_are_read_from_the_items_if_no_attribute_has_them(pixels: np.ndarray[Any, Any]) -> None:
    tensors = TensorDataset(torch.tensor(pixels).permute(0, 3, 1, 2), torch.tensor([4, 2, 7, 2, 0]))
    assert ItemImages(tensors).labels.tolist() == [4, 2, 7, 2, 0]
    items = [(x, y) for x, y in zip(pixels, (1, 0, 1, 0, 0), strict=True)]
    changed = Recording(items, targets=[4, 2, 7, 2, 0], target_transform=lambda y: y % 2)
    assert ItemImages(changed).labels.tolist() == [1, 0, 1, 0, 0]
    assert ItemImages(Subset(changed, [2, 1])).labels.tolist() == [1, 0]
    assert ItemImages(Recording(items, targets=[0, 1])).labels.tolist() == [1, 0, 1, 0, 0]  # too few


def test_requested_rows_are_read_once_each(pixels: np.ndarray[Any, Any]) -> None:
    data = Recording([(x, 1) for x in pixels], targets=[1] * 5)
    split = Split(ItemImages(data), np.array([3] * 5), task=2).pick(np.array([4, 0, 2]))
    data.read.clear()
    samples = split.take(np.array([2, 0, 2, 2]))
    assert data.read == [2, 4]
    np.testing.assert_array_equal(samples.x, pixels[[2, 4, 2, 2]])
    assert (samples.y.tolist(), samples.t.tolist()) == ([3] * 4, [2] * 4)


def test_a_data_set_is_a_part_of_a_joined_split(pixels: np.ndarray[Any, Any]) -> None:
    items = Split(ItemImages(Recording([(x, 1) for x in pixels])), np.ones(5, np.int64), task=1)
    joined = join([Split(pixels, np.zeros(5, np.int64)), items])
    assert isinstance(joined, JoinedSplit)
    samples = joined.take(np.array([7, 1, 9]))
    np.testing.assert_array_equal(samples.x, pixels[[2, 1, 4]])
    assert (samples.y.tolist(), samples.t.tolist()) == ([1, 0, 1], [1, 0, 1])


IMAGE = np.zeros((3, 4, 1), np.uint8)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "mine is empty; it needs at least one item"),
        (iter(()), "mine must have __len__ and __getitem__, got tuple_iterator; collect"),
        ([IMAGE], r"mine: an item must be \(image, label, \.\.\.\), got ndarray at position 0"),
        ([(IMAGE, 0), (IMAGE, 0.5)], "mine: a label must be an integer, got 0.5 at position 1"),
        ([(IMAGE, torch.tensor(0.0))], r"a label must be an integer, got tensor\(0.\) at position 0"),
        ([("a.png", 0)], r"mine: an image must be \[H, W, C\] or \[H, W\], got str \[\] at position 0"),
        (
            [(torch.zeros(784), 0)],
            r"an image must be \[C, H, W\] or \[H, W\], got Tensor \[784\] at position 0",
        ),
        (
            [(IMAGE.astype(np.int64), 0)],
            r"an image must be uint8 or of floats, got int64 \(convert with x.astype\(np.uint8\)\) at posi",
        ),
        ([(Image.new("P", (4, 3)), 0)], r"L, RGB, RGBA \(use .convert\('RGB'\)\), got 'P' at position 0"),
    ],
)
def test_an_error_names_the_bad_item(items: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemImages(items, "mine")


def test_an_error_names_a_bad_item_that_is_read_later() -> None:
    items: list[tuple[Any, int]] = [(IMAGE, 0), (IMAGE, 1), (IMAGE[:2], 0), (IMAGE.astype(np.float32), 0)]
    images = ItemImages(items, "mine")
    assert images[np.array([1, 0])].shape == (2, 3, 4, 1)
    with pytest.raises(ValueError, match=r"mine: images must be uint8 .* \[2, 4, 1\] at position 2"):
        images[np.array([0, 2])]
    with pytest.raises(ValueError, match=r"got float32 \[3, 4, 1\] at position 3; resize or convert"):
        images[np.array([3])]
    with pytest.raises(ValueError, match="mine: item 0 has label 0, but its targets have 5; make them equal"):
        ItemImages(Recording(items, targets=[5, 1, 0, 0]), "mine")
