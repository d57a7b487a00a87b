"""A data set from a folder of pictures, one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from sequel_benchmarks.cache import Arrays, folder_of, in_memory
from sequel_benchmarks.data import DataSet
from sequel_benchmarks.decode import BLOCK, decode_pictures, pillows_warnings, read_picture
from sequel_core.stream.arrays import UInt8Array
from sequel_core.stream.images import Normalisation

TEST_FOLDERS = ("test", "val")


def image_folder(
    root: str | os.PathLike[str],
    size: int | tuple[int, ...] | None = None,
    channels: int = 3,
    name: str = "imagefolder",
) -> DataSet:
    """Return the pictures in `root/train/CLASS/` and `root/test/CLASS/` (or `root/val/CLASS/`) as arrays.

    The label of a class is the position of its folder's name in the sorted list; pictures are in the order of
    their classes, then of their names. They are decoded into memory. Hidden files are left out.

    Args:
        root: the folder.
        size: (H, W), or one number for both, that each picture is resized to (bilinear); None where all have
            one size.
        channels: 3 for RGB, or 1 for grey; pictures of another kind are converted.
        name: of the data set, part of the benchmark's name.

    Raises:
        ValueError: an argument out of range, no such folders, classes that differ between training and test,
            a class without pictures, a file that is not a picture, or pictures of several sizes without
            `size`; names the folder or file.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {channels!r}")
    sides = (size,) * 2 if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise ValueError(f"size must be a height and a width >= 1, or one number for both, got {size!r}")
    shape = None if sides is None else (sides[0], sides[1])
    folder = folder_of("root", root)
    classes = class_folders(folder)
    arrays: list[Any] = []
    for part in ("train", _test_folder(folder)):
        found = [
            [path for path in sorted((folder / part / c).iterdir()) if _is_shown(path) and path.is_file()]
            for c in classes
        ]
        for label, files in enumerate(found):
            if not files:
                raise ValueError(f"{folder / part / classes[label]} must hold a picture, it is empty")
        names = [path.relative_to(folder).as_posix() for files in found for path in files]
        if shape is None and not arrays:
            first = folder / names[0]
            with pillows_warnings():
                height, width, _ = read_picture(first, first.read_bytes, channels).shape
        elif shape is not None:
            height, width = shape
        images = in_memory("images", (len(names), height, width, channels))
        decode_pictures(
            names,
            lambda name: (folder / name).read_bytes(),
            images,
            f"decoding {folder.name}, {part}",
            where=folder,
            size=shape,
        )
        arrays += [images, np.repeat(np.arange(len(classes)), [len(files) for files in found])]
    return DataSet(
        name,
        *Arrays(*arrays),
        num_classes=len(classes),
        normalisation=normalisation_of(arrays[0]),
        class_names=tuple(classes),
    )


def class_folders(root: Path) -> list[str]:
    """Return the names of the classes of an image folder, sorted, without reading any picture.

    Raises:
        ValueError: no such folder, no class in it, or classes that differ between training and test.
    """
    listed = {}
    for part in ("train", _test_folder(root)):
        if not (root / part).is_dir():
            raise ValueError(
                f"{root} must hold train/CLASS/ and test/CLASS/ (or val/CLASS/) with pictures, it has no "
                f"{part}/; check the path"
            )
        folders = [path for path in (root / part).iterdir() if _is_shown(path) and path.is_dir()]
        listed[part] = sorted(path.name for path in folders)
    (part, train), (other, test) = listed.items()
    strangers = sorted(set(train) ^ set(test))
    if strangers or not train:
        fault = "it has none"
        if strangers:
            fault = f"{strangers[0]} is in {part if strangers[0] in train else other}/ only"
        raise ValueError(f"{root} must have the same classes in {part}/ and {other}/, at least one: {fault}")
    return train


def normalisation_of(images: UInt8Array) -> Normalisation:
    """Return mean and standard deviation of each channel, of the pixels / 255; a deviation of 0 counts as 1.

    Args:
        images: uint8 `[N, H, W, C]`, at least one.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256))
    for start in range(0, len(images), BLOCK):
        for c in range(channels):
            counts[c] += np.bincount(images[start : start + BLOCK, ..., c].ravel(), minlength=256)
    shares, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    deviation = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
    return Normalisation(tuple(mean.tolist()), tuple(np.where(deviation > 0, deviation, 1.0).tolist()))


def _test_folder(root: Path) -> str:
    return next((part for part in TEST_FOLDERS if (root / part).is_dir()), TEST_FOLDERS[0])


def _is_shown(path: Path) -> bool:
    return not path.name.startswith(".")
