"""Decoding image files on all cores, with a progress bar."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from sequel_core.stream.arrays import UInt8Array

T = TypeVar("T")

BLOCK = 256
"""Number of images that a thread decodes at a time."""


def in_threads(work: Callable[[T], int], jobs: Iterable[T], title: str, total: int, unit: str) -> None:
    """Run all jobs in one thread per core. Decoders and hash functions release Python's global lock.

    Args:
        work: runs one job and returns the number of units in it.
        jobs: the jobs, independent of each other.
        title: title of the progress bar, which is only shown on a terminal.
        total: number of units of all jobs.
        unit: name of the unit.

    Raises:
        Exception: the error of the first job that failed. Jobs that have not started are cancelled.
    """
    with (
        tqdm(total=total, desc=title, unit=f" {unit}", disable=None, leave=False) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        try:
            for future in [pool.submit(work, job) for job in jobs]:
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_image(
    path: Path,
    read: Callable[[], bytes],
    channels: int,
    size: tuple[int, int] | None = None,
    required_size: tuple[int, int] | None = None,
) -> UInt8Array:
    """Return the image in a file, uint8 `[H, W, C]`.

    Args:
        path: path of the file, for messages.
        read: returns the file's content, in any format that Pillow reads.
        channels: 3 for RGB or 1 for grey; the image is converted if necessary.
        size: (H, W) to resize to with bilinear interpolation; None for the image's size.
        required_size: (H, W) that the image must have; None for any size.

    Raises:
        ValueError: the file cannot be read or has another size. The message names the file.
    """
    try:
        with Image.open(BytesIO(read())) as file:
            height, width = file.height, file.width
            if required_size in (None, (height, width)):
                image = file.convert("RGB" if channels == 3 else "L")
                if size is not None and image.size != size[::-1]:
                    image = image.resize(size[::-1], Image.Resampling.BILINEAR)
                return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)
    except Exception as error:  # Pillow raises many types of errors for damaged files
        raise ValueError(f"{path} cannot be read as an image ({error}); replace or delete it") from error
    raise ValueError(
        f"{path} is {height} x {width}, it must be {required_size[0]} x {required_size[1]} like the other "
        "images; resize it, or give the image folder a size"
    )


@contextmanager
def raise_for_huge_images() -> Iterator[None]:
    """Turn Pillow's warning about huge images into an error.

    Enter it before starting threads, because all threads share the warning filters.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_images(
    names: Sequence[str],
    read: Callable[[str], bytes],
    out: UInt8Array,
    title: str,
    *,
    source: Path,
    size: tuple[int, int] | None = None,
) -> None:
    """Decode image files of one size into an array.

    Args:
        names: names of the files.
        read: returns a file's content, given its name; called from several threads.
        out: uint8 `[N, H, W, C]`; image n is decoded from the n-th file.
        title: title of the progress bar.
        source: folder or archive of the files, for messages.
        size: (H, W) to resize to; None if all images must already have the size of `out`.

    Raises:
        ValueError: an image cannot be read or has another size. The message names the file.
    """
    height, width, channels = out.shape[1:]
    required_size = (height, width) if size is None else None

    def work(rows: range) -> int:
        for row in rows:
            name = names[row]
            out[row] = read_image(source / name, partial(read, name), channels, size, required_size)
        return len(rows)

    blocks = [range(start, min(start + BLOCK, len(names))) for start in range(0, len(names), BLOCK)]
    with raise_for_huge_images():
        in_threads(work, blocks, title, len(names), "images")
