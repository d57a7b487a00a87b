"""Map-style data sets as arrays that a `Split` can view; items are read one at a time.

An item is `(x, y, ...)`, as in torch's `Dataset`, or a dict, as in Hugging Face's. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sequel_core.stream.trees import (
    LeafSpec,
    Tree,
    is_label,
    leaves,
    named_leaves,
    named_map,
    read_dtype,
    specs_text,
    tree_map,
)

PIL_MODES = ("L", "RGB", "RGBA")
MOST_CHANNELS = 4  # a second axis of at most this length, before longer ones, is taken for channels
SOME = 1000  # number of images whose values decide how to convert the others


class Items(Protocol):
    """A map-style data set, such as a torch `Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class ItemArray:
    """One array `[N, ...]` of the inputs of a data set; `array[rows]` reads only these items.

    Args:
        items: the data set.
        leaf: name of the array in an item, such as `x` or `x.input_ids`.
        spec: its shape and dtype.
    """

    def __init__(self, items: ItemArrays, leaf: str, spec: LeafSpec) -> None:
        self.items, self.leaf = items, leaf
        self.shape: tuple[int, ...] = (len(items), *spec.shape)
        self.ndim = len(self.shape)
        self.dtype = np.dtype(spec.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Return the values of these rows, `[n, ...]`."""
        return self.items.read(rows)[self.leaf]


class ItemArrays:
    """The inputs and targets of a data set as arrays `[N, ...]`. Inputs are read when they are needed.

    The data set may decode and transform its items when they are read, so memory does not grow.
    Runs with random transforms are not repeatable bit by bit, because the result depends on the order in
    which samples are read, and samples are read ahead. `Augmentation` is repeatable.

    The inputs x and the targets y of an item are each a number, an array, a tensor, or a (nested) dict of
    these. Each has the same shape and dtype in all items.

    x is taken for an image if it is a PIL image, or an array or tensor with two or three axes. A torch tensor
    `[C, H, W]` or `[H, W]`, or a NumPy array or PIL image `[H, W, C]` or `[H, W]`, becomes `[H, W, C]`; uint8
    stays uint8, floats become float32. To give other data with two or three axes, use a dict, such as
    `{"x": array}`. Its arrays keep their order of axes and their dtype, except float64, which becomes
    float32.

    Args:
        data: a data set with items `(x, y, ...)`; with `target`, items are dicts.
        name: for error messages.
        labels: integers `[N]`, the class labels of all items. If None, they are taken from the attribute
            `targets` or `labels` (also through `Subset` and `ConcatDataset`). If there is none, if the data
            set has a `target_transform`, or if targets are not class labels, all items are read once.
        target: key of y in items that are dicts; the other keys are x.

    Attributes:
        x: an `ItemArray`, or a dict of them.
        y: an array `[N, ...]`, or a dict of arrays; class labels are int64 `[N]`.

    Raises:
        ValueError: there are no items, or an item has another form; names the data set, the array and the
            position.
    """

    def __init__(
        self,
        data: Items,
        name: str = "data set",
        labels: NDArray[Any] | None = None,
        target: str | None = None,
    ) -> None:
        """Read the first item and the targets."""
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                f"{name} must have __len__ and __getitem__, got {type(data).__name__}; collect a stream's "
                "items in a list first"
            )
        if len(data) == 0:
            raise ValueError(f"{name} is empty; it needs at least one item")
        self.data, self.name, self.target = data, name, target
        x, y = self._item(0)
        self._specs = (item_specs("x", x), item_specs("y", y))
        known = None
        if self._labelled:
            known = known_labels(data) if labels is None else labels
        if known is None:
            targets = [y, *(self._checked_item(row)[1] for row in range(1, len(data)))]
            known = tree_map(lambda *values: np.stack(values), *targets)
        self.y: Tree = known.astype(np.int64, copy=False) if self._labelled else known
        self.x: Tree = named_map(lambda leaf, _: ItemArray(self, leaf, self._specs[0][leaf]), x, "x")
        self.read(np.zeros(1, np.int64))  # compares the first item with the known labels

    def __len__(self) -> int:
        return len(self.data)

    @property
    def _labelled(self) -> bool:
        return is_label(self._specs[1].get("y"))

    def read(self, rows: Any) -> dict[str, NDArray[Any]]:
        """Return the inputs of these rows by name, `[n, ...]` each; a repeated row is read once.

        Raises:
            ValueError: an item has another shape, dtype or target than expected.
        """
        wanted, places = np.unique(rows, return_inverse=True)
        inputs = {
            name: np.empty((len(wanted), *spec.shape), spec.dtype) for name, spec in self._specs[0].items()
        }
        for k, row in enumerate(wanted.tolist()):
            x, y = self._checked_item(row)
            self._check_target(row, y)
            for name, value in named_leaves(x, "x"):
                inputs[name][k] = value
        return {name: values[places.reshape(-1)] for name, values in inputs.items()}

    def _check_target(self, row: int, y: Tree) -> None:
        """Raise ValueError if an item's target is not the one that was read or known before."""
        before = tree_map(lambda values: values[row], self.y)
        if all(map(_equal, leaves(y), leaves(before))):
            return
        if self._labelled:
            raise ValueError(
                f"{self.name}, item {row}: the label is {y}, but its targets have {before}; make them equal, "
                "or remove the attribute so that the labels are read from the items"
            )
        raise ValueError(
            f"{self.name}, item {row}: the targets changed between two reads; they must be fixed, so draw "
            "random targets in the loss"
        )

    def _checked_item(self, row: int) -> tuple[Tree, Tree]:
        """Return the inputs and targets of an item, which have the specs of the first item's.

        Raises:
            ValueError: they have others.
        """
        item = self._item(row)
        for name, value, first in zip("xy", item, self._specs, strict=True):
            specs = item_specs(name, value)
            if specs.keys() != first.keys():
                raise ValueError(
                    f"{self.name}, item {row}: all items must have {', '.join(first)}, as the first, got "
                    f"{', '.join(specs)}"
                )
            for leaf, spec in specs.items():
                if spec != first[leaf]:
                    raise ValueError(
                        f"{self.name}, item {row}: {leaf} must be {specs_text(first[leaf])} as in the first "
                        f"item, got {specs_text(spec)}; resize, pad or convert it in the data set"
                    )
        return item

    def _item(self, row: int) -> tuple[Tree, Tree]:
        """Return the inputs and the targets of an item as arrays."""
        item = self.data[row]
        x, y = self._parts(item, row)
        try:
            x = as_image(x) if looks_like_image(x) else named_map(as_leaf, x, "x")
            y = named_map(as_leaf, y, "y")
        except ValueError as error:
            raise ValueError(f"{self.name}, item {row}: {error}") from error
        return x, y.astype(np.int64) if is_label(item_specs("y", y).get("y")) else y

    def _parts(self, item: Any, row: int) -> tuple[Any, Any]:
        """Return x and y of an item as the data set has them."""
        if isinstance(item, Mapping):
            try:
                return without_target(item, self.target)
            except ValueError as error:
                raise ValueError(f"{self.name}, item {row}: {error}") from error
        if self.target is not None:
            raise ValueError(
                f"{self.name}, item {row}: target is only used if items are dicts, got "
                f"{type(item).__name__}; leave it out"
            )
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise ValueError(
                f"{self.name}, item {row}: an item must be (x, y, ...) or a dict, got {type(item).__name__}"
            )
        return item[0], item[1]


def take_rows(tree: Tree, rows: Any) -> Tree:
    """Return the rows `[n]` of every array of a tree; an item of a data set is read once for all arrays."""
    read: dict[int, dict[str, NDArray[Any]]] = {}

    def rows_of(array: Any) -> Any:
        if not isinstance(array, ItemArray):
            return array[rows]
        if id(array.items) not in read:
            read[id(array.items)] = array.items.read(rows)
        return read[id(array.items)][array.leaf]

    return tree_map(rows_of, tree)


def without_target(values: Mapping[str, Any], target: str | None) -> tuple[dict[str, Any], Any]:
    """Return the inputs and the targets of a dict that has both.

    Raises:
        ValueError: `target` is not one of its keys, or is the only one.
    """
    keys = list(values)
    if target is None:
        raise ValueError(f"target must name the key of y if x and y are in one dict, got the keys {keys}")
    if target not in values:
        raise ValueError(f"target must be one of the keys {keys}, got {target!r}")
    if len(keys) == 1:
        raise ValueError(f"a dict must have inputs beside the target {target!r}, got the keys {keys}")
    return {key: value for key, value in values.items() if key != target}, values[target]


def item_specs(name: str, item: Tree) -> dict[str, LeafSpec]:
    """Return the specs of the arrays of the inputs or targets of one item, by name."""
    return {leaf: LeafSpec(tuple(a.shape), str(a.dtype)) for leaf, a in named_leaves(item, name)}


def as_leaf(name: str, value: Any) -> NDArray[Any]:
    """Return a number, an array or a tensor as an array; float64 becomes float32.

    Raises:
        ValueError: the value is something else.
    """
    array = as_array(name, value)
    if array.dtype.kind not in "biuf":
        got = f"{array.dtype} {list(array.shape)}" if array.shape else repr(value)
        raise ValueError(
            f"{name} must be numbers, got {got}; number texts in the data set, or leave the key out"
        )
    return array.astype(read_dtype(array.dtype), copy=False)


def as_array(name: str, value: Any) -> NDArray[Any]:
    """Return a number, a list, an array or a tensor as an array.

    Raises:
        ValueError: a list of arrays of different shapes.
    """
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:  # NumPy's message for nested lists of different lengths
        _check_ragged(name, value)
        raise ValueError(f"{name} must be numbers of one shape; pad in the data set ({error})") from error
    if array.dtype == object and array.ndim:
        _check_ragged(name, array)
    return array


def _check_ragged(name: str, values: Any) -> None:
    """Raise ValueError if the rows of a list have different shapes, and name the first that differs."""
    shapes = [np.asarray(value, object).shape for value in values]
    for row, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"{name} must have one shape in all rows, got {list(shape)} in row {row} and "
                f"{list(shapes[0])} in row 0; pad in the data set"
            )


def looks_like_image(x: Any) -> bool:
    """Return whether the inputs of an item are taken for an image."""
    return isinstance(getattr(x, "mode", None), str) or getattr(x, "ndim", 0) in (2, 3)


def _equal(a: NDArray[Any], b: Any) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


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
        raise ValueError(
            f"an image must be uint8 or of floats, got {image.dtype} ({conversion(image)}; if it is no "
            'image, give a dict, {"x": array})'
        )
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
