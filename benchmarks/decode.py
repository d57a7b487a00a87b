"""Decoding pictures and batches of them, on all cores and with a progress bar."""

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
"""Pictures that a thread decodes at a time."""


def in_threads(work: Callable[[T], int], jobs: Iterable[T], title: str, total: int, unit: str) -> None:
    """Do all jobs, in as many threads as there are cores; the libraries below release Python's lock.

    Args:
        work: does one job and returns how many units it was.
        jobs: independent of one another.
        title: of the progress bar, which is shown on a terminal only.
        total: number of units.
        unit: for people.

    Raises:
        Exception: of the first job, in their order, that failed; jobs that have not begun are left out.
    """
    with (
        tqdm(total=total, desc=title, unit=f" {unit}", disable=None, leave=False) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        try:
            for done in [pool.submit(work, job) for job in jobs]:
                bar.update(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_picture(
    path: Path,
    read: Callable[[], bytes],
    channels: int,
    size: tuple[int, int] | None = None,
    only: tuple[int, int] | None = None,
) -> UInt8Array:
    """Return a picture, uint8 `[H, W, C]`.

    Args:
        path: of the file, for messages.
        read: returns the file's content, in any format that Pillow reads.
        channels: 3 for RGB or 1 for grey; converted where the file has others.
        size: (H, W) to resize to, bilinear; None for the picture's own.
        only: (H, W) that the picture must have; None for any.

    Raises:
        ValueError: not to be read, or of another size; names the file.
    """
    try:
        with Image.open(BytesIO(read())) as file:
            height, width = file.height, file.width
            if only in (None, (height, width)):
                picture = file.convert("RGB" if channels == 3 else "L")
                if size is not None and picture.size != size[::-1]:
                    picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
                return np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)
    except Exception as error:  # Pillow's readers raise whatever the damage leads to
        raise ValueError(
            f"{path} cannot be read as a picture ({error}); replace it or take it away"
        ) from error
    raise ValueError(
        f"{path} is {height} x {width}, it must be {only[0]} x {only[1]} as the others; resize it, or have "
        "an image folder do it with size"
    )


@contextmanager
def pillows_warnings() -> Iterator[None]:
    """Refuse a picture of which Pillow warns that it is huge; not in threads, which share the filters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_pictures(
    names: Sequence[str],
    read: Callable[[str], bytes],
    out: UInt8Array,
    title: str,
    *,
    where: Path,
    size: tuple[int, int] | None = None,
) -> None:
    """Decode pictures of one size into an array.

    Args:
        names: of the files.
        read: returns a file's content; called from several threads.
        out: uint8 `[N, H, W, C]`, filled in the order of the names.
        title: of the progress bar.
        where: folder or archive of the files, for messages.
        size: (H, W) to resize to; None where all pictures must have the array's.

    Raises:
        ValueError: a picture that cannot be read or has another size; names it.
    """
    height, width, channels = out.shape[1:]
    only = (height, width) if size is None else None

    def work(rows: range) -> int:
        for row in rows:
            out[row] = read_picture(where / names[row], partial(read, names[row]), channels, size, only)
        return len(rows)

    blocks = [range(start, min(start + BLOCK, len(names))) for start in range(0, len(names), BLOCK)]
    with pillows_warnings():
        in_threads(work, blocks, title, len(names), "images")
