"""Versions of the libraries that a run is computed with, and of the package that wrote its files."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "sequel-cl"
"""The distribution that this module belongs to."""

WRITER = "written_by"
"""The key in `config.yaml` whose value is the version that wrote the run."""

MODULES = {
    "numpy": "numpy",
    "torch": "torch",
    "pytorch-lightning": "pytorch_lightning",
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    PACKAGE: "sequel_core",
}
"""Module of each distribution whose version a run records."""


@cache
def _version(distribution: str) -> str:
    """Return the version of an installed distribution; cached because it reads files."""
    from importlib import metadata  # slow to import

    return metadata.version(distribution)


def loaded_versions() -> dict[str, str]:
    """Return the versions of Python, this package and the numerical libraries imported so far, by name."""
    loaded = [name for name, module in MODULES.items() if module in sys.modules]
    return {"python": platform.python_version(), **{name: _version(name) for name in loaded}}


@cache
def machine() -> str:
    """Return the architecture and the processor; processors of other kinds may round differently."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has it
        lines = []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if {"model name", "cpu family", "model"} <= values.keys():
        name = f"{values['model name']} (family {values['cpu family']}, model {values['model']})"
    return " ".join(part for part in (platform.machine(), name) if part)


@cache
def commit() -> str | None:
    """Return the git commit that this package is at, with `-dirty` for other changes; None if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def version_written_by(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str | None:
    """Return the version of this package that wrote a run; None if neither file has it.

    Args:
        config: of the run, from `config.yaml`.
        summary: of the run, from `summary.json`; version 0.1.0 recorded its version only there.
    """
    version = config.get(WRITER)
    if version is None and isinstance(summary.get("versions"), Mapping):
        version = summary["versions"].get(PACKAGE)
    return None if version is None else str(version)


def version_note(version: str | None, what: str = "it was") -> str:
    """Return a note for the end of an error: which version wrote the data. Empty if it is this version.

    Args:
        version: that wrote the data; None if unknown, as for an unfinished run of 0.1.0.
        what: subject and verb of the note.
    """
    this = _version(PACKAGE)
    return "" if version == this else f" ({what} written by {PACKAGE} {version or '0.1.0'}, this is {this})"
