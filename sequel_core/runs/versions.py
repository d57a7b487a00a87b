"""Versions of the libraries that a run is computed with, and of the package that wrote its files."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from functools import cache
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
