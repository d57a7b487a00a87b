"""Small disks, for tests with a full or read-only disk."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, kibibytes: int = 128) -> Iterator[Path]:
    """Mount a small disk at a new folder; skip the test if mounting is not permitted."""
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
    """Resize a mounted disk to 9 MiB."""
    subprocess.run(["mount", "-o", "remount,size=9m", str(path)], check=True, capture_output=True)


@contextmanager
def write_protected(path: Path) -> Iterator[None]:
    """Make a mounted disk read-only; files that are already open can still be written."""
    for options in (["--bind", str(path)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *options, str(path)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True, capture_output=True)


def fill(path: Path) -> None:
    """Fill the disk of a folder to the last byte."""
    with (path / "full").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
