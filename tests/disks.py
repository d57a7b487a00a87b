"""A disk with little space, for tests of what happens where it is full."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, kibibytes: int = 128) -> Iterator[Path]:
    """Mount a small disk at a new folder for a while; skip the test where this may not be done."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True, capture_output=True)


def enlarge(path: Path) -> None:
    """Give a mounted disk 9 MiB."""
    subprocess.run(["mount", "-o", "remount,size=9m", str(path)], check=True, capture_output=True)


@contextmanager
def write_protected(path: Path) -> Iterator[None]:
    """Let a mounted disk be read only for a while; a file that is open may still be written."""
    for options in (["--bind", str(path)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *options, str(path)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True, capture_output=True)


def fill(path: Path) -> None:
    """Fill the disk that a folder lies on to the last byte."""
    with (path / "full").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
