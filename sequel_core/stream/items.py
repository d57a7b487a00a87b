"""Images of a user's data set, read one item at a time, as an array that a `Split` can be a view of.

An item is what torch's `Dataset`s give, `(image, label, ...)`; torch is not imported for it.
"""

from __future__ import annotations

import operator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

PIL_MODES = ("L", "RGB", "RGBA")
MOST_CHANNELS = 4  # of images as one knows them; more, after so few rows, are a width
SOME = 1000  # images whose values tell how the others are to be converted


class Items(Protocol):
    """A data set whose items can be counted and read at random, such as a torch `Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class ItemImages:
    """The images of a data set, `[N, H, W, C]`: `images[rows]` reads these items and no others.

    So a data set may decode, transform or draw its images as they are asked for, and memory does not grow.
    What a random transform gives depends on when it is asked, and a sample that is read ahead takes from its
    generator too: such runs are not repeatable to the last bit. `Augmentation` is.

    Args:
        data: its items are `(image, label, ...)`. An image is a torch tensor `[C, H, W]` or `[H, W]`, a NumPy
            array or a PIL image `[H, W, C]` or `[H, W]`, of one shape throughout; uint8 stays uint8, floats
            become float32. A label is an integer.
        name: for error messages.
        labels: of all items, where they are known; else from the data set's `targets` or `labels`, through
            `Subset` and `ConcatDataset`; else, or where it has a `target_transform`, all items are read once.

    Attributes:
        labels: int64 `[N]`.
        shape: `(N, H, W, C)`.
        dtype: uint8 or float32.

    Raises:
        ValueError: no items, or one that is not as above; names the data set and the position.
    """

    ndim = 4

    def __init__(self, data: Items, name: str = "data set", labels: NDArray[Any] | None = None) -> None:
        """Read the first item, and the labels."""
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
        found = known_labels(data) if labels is None else labels
        if found is None:
            found = np.array([label, *(self._item(i)[1] for i in range(1, len(data)))], np.int64)
        self.labels = found.astype(np.int64, copy=False)
        self[np.zeros(1, np.int64)]  # compares its label

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Return the images in these rows `[n, H, W, C]`; a row that is asked for twice is read once."""
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
                    f"{self.name}: item {row} has label {label}, its targets say {self.labels[row]}; "
                    "make them agree, or remove the attribute and the labels are read from the items"
                )
            images[k] = image
        return images[places.reshape(-1)]

    def _item(self, row: int) -> tuple[NDArray[Any], int]:
        """Return image and label of an item."""
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
        ValueError: anything else.
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


def check_images(images: Any, channels_last: bool = False) -> None:
    """Raise ValueError if images are not uint8 or float32 `[N, H, W, C]`; it says how to convert them.

    Args:
        images: an array, or what has the shape and the dtype of one.
        channels_last: whether they are `[N, H, W, C]` although their shape looks like `[N, C, H, W]`.
    """
    got, shape = f"got {images.dtype} {list(images.shape)}", images.shape
    if images.ndim != 4:
        remedy = {
            2: "reshape each row to an image, x.reshape(len(x), H, W, C)",
            3: "add the axis of channels, x[..., None]",
        }.get(images.ndim, "give them one axis each for samples, height, width and channels")
        raise ValueError(f"images must be uint8 or float32 [N, H, W, C], {got}; {remedy}")
    if images.dtype not in (np.uint8, np.float32):
        raise ValueError(f"images must be uint8 or float32 [N, H, W, C], {got}; {conversion(images)}")
    if not channels_last and shape[1] <= MOST_CHANNELS < min(shape[2:]):
        raise ValueError(
            f"images must be [N, H, W, C], {got}, which looks like [N, C, H, W]; use np.moveaxis(x, 1, -1), "
            f"or give channels_last=True if their height is {shape[1]}"
        )


def conversion(images: Any) -> str:
    """Return how to make uint8 or float32 images of an array of another dtype, by its first values."""
    kind, as_they_are = images.dtype.kind, "x.astype(np.float32) to have them taken as they are"
    some = np.asarray(images[:SOME])
    if kind == "b":
        return "convert with 255 * x.astype(np.uint8)"
    if kind not in "iuf" or some.size == 0:
        return "convert them to numbers, uint8 from 0 to 255 or float32"
    low, high = some.min(), some.max()
    if not (low >= 0 and high <= 255):
        if kind == "f":
            return f"convert with {as_they_are}"
        return f"values from {low} to {high} do not fit uint8; scale them to 0..255, or use {as_they_are}"
    if kind in "iu":
        return "convert with x.astype(np.uint8)"
    pixels = "np.rint(255 * x).astype(np.uint8)" if high <= 1 else "np.rint(x).astype(np.uint8)"
    return f"convert with {pixels}, or with {as_they_are}"


def check_labels(labels: Any) -> None:
    """Raise ValueError if labels are not integers `[N]`; it says how to convert them."""
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        return
    if labels.ndim == 2:
        remedy = "use y.ravel()" if labels.shape[1] == 1 else "one-hot labels become integers by y.argmax(1)"
    elif labels.dtype == np.bool_ or (labels.dtype.kind == "f" and np.array_equal(labels, np.trunc(labels))):
        remedy = "convert with y.astype(np.int64)"
    else:
        remedy = "number them with np.unique(y, return_inverse=True)[1]"
    raise ValueError(f"labels must be integers [N], got {labels.dtype} {list(labels.shape)}; {remedy}")


def known_labels(data: Any) -> NDArray[Any] | None:
    """Return the labels `[N]` that a data set tells without reading its items, or None.

    It tells them by `targets` or `labels`, or is a torch `Subset` or `ConcatDataset` of data sets that do.
    """
    if getattr(data, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels"):
        found = getattr(data, name, None)
        if found is not None and not callable(found):
            found = found.detach().cpu().numpy() if hasattr(found, "detach") else np.asarray(found)
            if found.shape == (len(data),) and np.issubdtype(found.dtype, np.integer):
                return found
    if hasattr(data, "dataset") and hasattr(data, "indices"):
        whole = known_labels(data.dataset)
        return None if whole is None else whole[np.asarray(data.indices, np.int64)]
    parts = [known_labels(part) for part in getattr(data, "datasets", ())]
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if parts and len(known) == len(parts) else None
