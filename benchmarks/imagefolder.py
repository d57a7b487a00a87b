"""A data set from a folder of image files, with one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from sequel_benchmarks.cache import Arrays, folder_of, in_memory
from sequel_benchmarks.data import DataSet
from sequel_benchmarks.decode import BLOCK, decode_images, raise_for_huge_images, read_image
from sequel_core.stream.arrays import UInt8Array
from sequel_core.stream.images import Normalisation

TEST_FOLDERS = ("test", "val")


def image_folder(
    root: str | os.PathLike[str],
    size: int | tuple[int, ...] | None = None,
    channels: int = 3,
    name: str = "imagefolder",
) -> DataSet:
    """Return the images in `root/train/CLASS/` and `root/test/CLASS/` (or `root/val/CLASS/`) as arrays.

    The label of a class is the position of its folder in the sorted list of folder names. Images are sorted
    by class, then by file name, and decoded into memory. Hidden files are ignored.

    Args:
        root: the folder.
        size: (height, width) in pixels, or one number for both, to resize every image to with bilinear
            interpolation; None if all images have one size.
        channels: 3 for RGB or 1 for grey; images are converted if necessary.
        name: name of the data set, which becomes part of the benchmark's name.

    Returns:
        The data set: uint8 images `[N, H, W, C]` and int64 labels `[N]` for training and for testing.

    Raises:
        ValueError: an argument is out of range, a folder is missing, training and test have different
            classes, a class has no images, a file is not an image, or images differ in size and `size` is
            None. The message names the folder or file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from sequel_benchmarks import image_folder
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        ...         Path(root, folder).mkdir(parents=True)
        ...         Image.new("RGB", (8, 8)).save(Path(root, folder, "0.png"))
        ...     data = image_folder(root)
        >>> data.class_names, data.train_images.shape
        (('cat', 'dog'), (2, 8, 8, 3))
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {channels!r}")
    sides = (size,) * 2 if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise ValueError(f"size must be a height and a width >= 1, or one number for both, got {size!r}")
    shape = None if sides is None else (sides[0], sides[1])
    folder = folder_of("root", root)
    classes = class_folders(folder)
    arrays: list[Any] = []  # in the order of `Arrays`
    for part in ("train", _test_folder(folder)):
        files = [
            [path for path in sorted((folder / part / c).iterdir()) if _is_visible(path) and path.is_file()]
            for c in classes
        ]
        for label, class_files in enumerate(files):
            if not class_files:
                raise ValueError(f"{folder / part / classes[label]} must hold an image, it is empty")
        names = [path.relative_to(folder).as_posix() for class_files in files for path in class_files]
        if shape is None and not arrays:
            first = folder / names[0]
            with raise_for_huge_images():
                height, width, _ = read_image(first, first.read_bytes, channels).shape
        elif shape is not None:
            height, width = shape
        images = in_memory("images", (len(names), height, width, channels))
        decode_images(
            names,
            lambda name: (folder / name).read_bytes(),
            images,
            f"decoding {folder.name}, {part}",
            source=folder,
            size=shape,
        )
        counts = [len(class_files) for class_files in files]
        arrays += [images, np.repeat(np.arange(len(classes)), counts)]
    return DataSet(
        name,
        *Arrays(*arrays),
        num_classes=len(classes),
        normalisation=normalisation_of(arrays[0]),
        class_names=tuple(classes),
    )


def class_folders(root: Path) -> list[str]:
    """Return the class names of an image folder, sorted, without reading any image.

    Raises:
        ValueError: a folder is missing, there is no class, or training and test have different classes.
    """
    listed = {}
    for part in ("train", _test_folder(root)):
        if not (root / part).is_dir():
            raise ValueError(
                f"{root} must hold train/CLASS/ and test/CLASS/ (or val/CLASS/) with images, it has no "
                f"{part}/; check the path"
            )
        folders = [path for path in (root / part).iterdir() if _is_visible(path) and path.is_dir()]
        listed[part] = sorted(path.name for path in folders)
    (train_part, train), (test_part, test) = listed.items()
    unmatched = sorted(set(train) ^ set(test))
    if unmatched or not train:
        problem = "it has none"
        if unmatched:
            problem = f"{unmatched[0]} is in {train_part if unmatched[0] in train else test_part}/ only"
        raise ValueError(
            f"{root} must have the same classes in {train_part}/ and {test_part}/, at least one: {problem}"
        )
    return train


def normalisation_of(images: UInt8Array) -> Normalisation:
    """Return the mean and standard deviation per channel of the pixels / 255. A deviation of 0 becomes 1.

    Args:
        images: uint8 `[N, H, W, C]`, at least one.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256))
    for start in range(0, len(images), BLOCK):
        for c in range(channels):
            counts[c] += np.bincount(images[start : start + BLOCK, ..., c].ravel(), minlength=256)
    frequencies = counts / counts.sum(1, keepdims=True)
    values = np.arange(256) / 255
    mean = frequencies @ values
    std = np.sqrt((frequencies * (values - mean[:, None]) ** 2).sum(1))
    return Normalisation(tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))


def _test_folder(root: Path) -> str:
    return next((part for part in TEST_FOLDERS if (root / part).is_dir()), TEST_FOLDERS[0])


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")
