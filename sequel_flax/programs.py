"""Compiled programs of JAX: kept on disk for later processes, and freed after many runs of a process."""

from __future__ import annotations

import hashlib
import itertools
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import platformdirs
from jax.experimental.compilation_cache import compilation_cache

MAX_BYTES = 1 << 30
"""The size of the folder of compiled programs at which the older half of them is deleted."""

RUNS_PER_RELEASE = 10
"""After so many runs of a process, all its compiled programs are freed."""

_runs = itertools.count(1)


@contextmanager
def kept_on_disk() -> Iterator[None]:
    """Read compiled programs from the user's cache directory, and write new ones there.

    Nothing changes if JAX has a directory of its own (`JAX_COMPILATION_CACHE_DIR`), or if its cache is turned
    off (`JAX_ENABLE_COMPILATION_CACHE=false`). A file that cannot be read or written is ignored.

    Example:
        >>> with kept_on_disk():
        ...     int(jax.jit(lambda x: x + 1)(2))
        3
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        yield
        return
    folder = program_folder()
    with suppress(OSError):
        _delete_old(folder)
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: settings[name] for name in options}
    with warnings.catch_warnings():
        message = "Error (reading|writing) persistent compilation cache entry"
        warnings.filterwarnings("ignore", message=message)
        for name, value in options.items():
            jax.config.update(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def program_folder() -> Path:
    """Return the folder of compiled programs for this type of processor: programs use its instructions.

    Example:
        >>> program_folder().parent.name
        'programs'
    """
    processor = platform.processor() + platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    name = hashlib.sha256(processor.encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("sequel", appauthor=False)) / "programs" / name


def _delete_old(folder: Path) -> None:
    """Delete the older half of the files if they have more than `MAX_BYTES`."""
    stats = {path: path.stat() for path in folder.glob("*")}
    if sum(stat.st_size for stat in stats.values()) > MAX_BYTES:
        for path in sorted(stats, key=lambda path: stats[path].st_mtime)[: len(stats) // 2]:
            path.unlink()


@contextmanager
def released() -> Iterator[None]:
    """Free all compiled programs of the process after every tenth run.

    JAX keeps some for each shape, and the settings of each network and optimizer.

    Example:
        >>> with released():
        ...     int(jax.jit(lambda x: x + 1)(2))
        3
    """
    yield
    if next(_runs) % RUNS_PER_RELEASE == 0:
        jax.clear_caches()
