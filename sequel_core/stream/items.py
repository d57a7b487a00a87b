"""Map-style data sets as image arrays that a `Split` can view; items are read one at a time.

An item is `(image, label, ...)`, as in torch's `Dataset`. Torch is not imported.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sequel_core.stream.trees import Tree, named_leaves

PIL_MODES = ("L", "RGB", "RGBA")
MOST_CHANNELS = 4  # a second axis of at most this length, before longer ones, is taken for channels
SOME = 1000  # number of images whose values decide how to convert the others


class Items(Protocol):
    """A map-style data set, such as a torch `Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class ItemImages:
    """The images of a data set as an array `[N, H, W, C]`; `images[rows]` reads only these items.

    The data set may decode and transform its images when they are read, so memory does not grow.
    Runs with random transforms are not repeatable bit by bit, because the result depends on the order in
    which samples are read, and samples are read ahead. `Augmentation` is repeatable.

    Args:
        data: a data set with items `(image, label, ...)`. An image is a torch tensor `[C, H, W]` or `[H, W]`,
            or a NumPy array or PIL image `[H, W, C]` or `[H, W]`. All images have the same shape. uint8 stays
            uint8, floats become float32. A label is an integer.
        name: for error messages.
        labels: of all items, `[N]`. If None, they are taken from the attribute `targets` or `labels` (also
            through `Subset` and `ConcatDataset`). If there is none, or if the data set has a
            `target_transform`, all items are read once.

    Attributes:
        labels: int64 `[N]`.
        shape: `(N, H, W, C)`.
        dtype: uint8 or float32.

    Raises:
        ValueError: there are no items, or an item has another form; names the data set and the position.
    """

    ndim = 4

    def __init__(self, data: Items, name: str = "data set", labels: NDArray[Any] | None = None) -> None:
        """Read the first item and the labels."""
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                f"{name} must have __len__ and __getitem__, got {type(data).__name__}; collect a stream's "
                "items in a list first"
            )
        if len(data) == 0:
            raise ValueError(f"{name} is empty; it needs at least one item")
        self.data, self.name = data, name
        first, label = self._item(0)
        self.shape: tuple[int, ...] = (len(data), *first.shape)
        self.dtype = first.dtype
        known = known_labels(data) if labels is None else labels
        if known is None:
            known = np.array([label, *(self._item(i)[1] for i in range(1, len(data)))], np.int64)
        self.labels = known.astype(np.int64, copy=False)
        self[np.zeros(1, np.int64)]  # checks the label of the first item

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Return the images of these rows, `[n, H, W, C]`; a repeated row is read once."""
        wanted, places = np.unique(rows, return_inverse=True)
        images = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        for k, row in enumerate(wanted.tolist()):
            image, label = self._item(row)
            if image.shape != self.shape[1:] or image.dtype != self.dtype:
                raise ValueError(
                    f"{self.name}: images must be {self.dtype} {list(self.shape[1:])} (H, W, C) like its "
                    f"first, got {image.dtype} {list(image.shape)} at position {row}; resize or convert them "
                    "in the data set"
                )
            if label != self.labels[row]:
                raise ValueError(
                    f"{self.name}: item {row} has label {label}, but its targets have {self.labels[row]}; "
                    "make them equal, or remove the attribute so that the labels are read from the items"
                )
            images[k] = image
        return images[places.reshape(-1)]

    def _item(self, row: int) -> tuple[NDArray[Any], int]:
        """Return the image and the label of an item."""
        item = self.data[row]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise ValueError(
                f"{self.name}: an item must be (image, label, ...), got {type(item).__name__} at position "
                f"{row}"
            )
        try:
            image = as_image(item[0])
        except ValueError as error:
            raise ValueError(f"{self.name}: {error} at position {row}") from error
        try:
            label = operator.index(item[1])
        except TypeError as error:
            raise ValueError(
                f"{self.name}: a label must be an integer, got {item[1]!r} at position {row}"
            ) from error
        return image, label


def as_image(value: Any) -> NDArray[Any]:
    """Return a torch tensor, a NumPy array or a PIL image as uint8 or float32 `[H, W, C]`.

    Raises:
        ValueError: another type, another number of axes or another dtype.
    """
    mode = getattr(value, "mode", None)  # of a PIL image
    if isinstance(mode, str) and mode not in PIL_MODES:
        raise ValueError(
            f"a PIL image must be of mode {', '.join(PIL_MODES)} (use .convert('RGB')), got {mode!r}"
        )
    channels_first = hasattr(value, "detach")  # a torch tensor
    image = value.detach().cpu().numpy() if channels_first else np.asarray(value)
    if image.ndim not in (2, 3):
        order = "[C, H, W] or [H, W]" if channels_first else "[H, W, C] or [H, W]"
        raise ValueError(f"an image must be {order}, got {type(value).__name__} {list(image.shape)}")
    if image.ndim == 2:
        image = image[:, :, None]
    elif channels_first:
        image = np.moveaxis(image, 0, -1)
    if np.issubdtype(image.dtype, np.floating):
        return image.astype(np.float32, copy=False)
    if image.dtype != np.uint8:
        raise ValueError(f"an image must be uint8 or of floats, got {image.dtype} ({conversion(image)})")
    return image


def check_leaves(x: Tree, y: Tree, channels_last: bool = False) -> None:
    """Raise ValueError unless inputs and targets are numbers with as many rows in every array.

    Args:
        x: arrays `[N, ...]`; one array `[N, H, W, C]` is taken for images.
        y: arrays `[N, ...]`.
        channels_last: images are `[N, H, W, C]` even if their shape looks like `[N, C, H, W]`.
    """
    named = [*named_leaves(x, "x"), *named_leaves(y, "y")]
    for name, a in named:
        if not hasattr(a, "dtype") or np.dtype(a.dtype).kind not in "biuf" or not a.shape:
            got = f"{a.dtype} {list(a.shape)}" if hasattr(a, "dtype") else type(a).__name__
            raise ValueError(
                f"{name} must be an array of numbers [N, ...], got {got}; number texts with "
                f"np.unique({name}, return_inverse=True)[1], or use np.asarray({name})"
            )
    counts = {name: len(a) for name, a in named}
    if len(set(counts.values())) > 1:
        raise ValueError(f"all arrays must have one row per sample, got {counts}")
    if not isinstance(x, Mapping) and x.ndim == 4:
        check_images(x, channels_last)


def check_images(images: Any, channels_last: bool = False) -> None:
    """Raise ValueError if images are not uint8 or float32 `[N, H, W, C]`, and name the conversion."""
    got, shape = f"got {images.dtype} {list(images.shape)}", images.shape
    if images.dtype not in (np.uint8, np.float32):
        raise ValueError(
            f"images must be uint8 or float32 [N, H, W, C], {got}; {conversion(images)}; if they are no "
            'images, give a dict, {"x": array}'
        )
    if not channels_last and shape[1] <= MOST_CHANNELS < min(shape[2:]):
        raise ValueError(
            f"images must be [N, H, W, C], {got}, which looks like [N, C, H, W]; use np.moveaxis(x, 1, -1), "
            f"or give channels_last=True if their height is {shape[1]}"
        )


def conversion(images: Any) -> str:
    """Return how to convert images to uint8 or float32, judged by the first values."""
    code, to_float = images.dtype.kind, "x.astype(np.float32) to use the values as they are"
    some = np.asarray(images[:SOME])
    if code == "b":
        return "convert with 255 * x.astype(np.uint8)"
    if code not in "iuf" or some.size == 0:
        return "convert them to numbers, uint8 from 0 to 255 or float32"
    low, high = some.min(), some.max()
    if not (low >= 0 and high <= 255):
        if code == "f":
            return f"convert with {to_float}"
        return f"values from {low} to {high} do not fit uint8; scale them to 0..255, or use {to_float}"
    if code in "iu":
        return "convert with x.astype(np.uint8)"
    pixels = "np.rint(255 * x).astype(np.uint8)" if high <= 1 else "np.rint(x).astype(np.uint8)"
    return f"convert with {pixels}, or with {to_float}"


def known_labels(data: Any) -> NDArray[Any] | None:
    """Return the labels `[N]` of a data set without reading its items, or None if that is not possible.

    They are its attribute `targets` or `labels`, or those of the data sets that a torch `Subset` or
    `ConcatDataset` consists of.
    """
    if getattr(data, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels"):
        labels = getattr(data, name, None)
        if labels is not None and not callable(labels):
            labels = labels.detach().cpu().numpy() if hasattr(labels, "detach") else np.asarray(labels)
            if labels.shape == (len(data),) and np.issubdtype(labels.dtype, np.integer):
                return labels
    if hasattr(data, "dataset") and hasattr(data, "indices"):
        whole = known_labels(data.dataset)
        return None if whole is None else whole[np.asarray(data.indices, np.int64)]
    parts = [known_labels(part) for part in getattr(data, "datasets", ())]
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if parts and len(known) == len(parts) else None
