"""A disk with little space, for tests of what happens where it is full."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SIZE = "128k"


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """Mount a disk of 128 KiB at a new folder for a while; skip the test where this may not be done."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True, capture_output=True)


def fill(path: Path) -> None:
    """Fill the disk that a folder lies on to the last byte."""
    with (path / "full").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
