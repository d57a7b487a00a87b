"""Compiled programs on disk: read by later processes, ignored if they are damaged, no side effects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from sequel_core import load_weights
from sequel_core.cli import main
from sequel_flax import programs
from sequel_flax.programs import kept_on_disk, program_folder

SMALL = ("benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.subset=60", "backbone.width=8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Turn off the cache of the tests, and return the folder of the command's cache."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    yield program_folder()
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def hits() -> Iterator[Counter[str]]:
    """Count JAX's events."""
    counts: Counter[str] = Counter()

    def listen(event: str, **_: str | int) -> None:
        counts[event.rpartition("/")[2]] += 1

    monitoring.register_event_listener(listen)
    yield counts
    monitoring.unregister_event_listener(listen)


def cube() -> float:
    """Compile a program anew, as a new process does."""
    jax.clear_caches()
    return float(jax.jit(lambda x: x * x * x)(3.0))


def test_programs_are_read_from_disk(folder: Path, hits: Counter[str]) -> None:
    for expected in (0, 1):
        with kept_on_disk():
            assert cube() == 27
        assert hits["cache_hits"] == expected
    assert len(list(folder.glob("jit__lambda*"))) == 1


def test_nothing_is_kept_outside_the_context(folder: Path) -> None:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [jax.config.values[name] for name in names]
    with kept_on_disk():
        pass
    assert [jax.config.values[name] for name in names] == before
    assert cube() == 27
    assert not folder.exists()


def test_jax_settings_turn_it_off(folder: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with kept_on_disk():
            assert cube() == 27
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not folder.exists()


def test_damaged_files_are_ignored(folder: Path, hits: Counter[str]) -> None:
    with kept_on_disk():
        cube()
    for path in folder.glob("*"):
        path.write_bytes(path.read_bytes()[:100])
    with kept_on_disk():
        assert cube() == 27
    assert hits["cache_hits"] == 0


def test_a_folder_that_cannot_be_made_is_ignored(folder: Path) -> None:
    folder.parent.parent.mkdir(parents=True)
    folder.parent.write_text("a file in its place")
    with kept_on_disk():
        assert cube() == 27


def test_the_older_half_is_deleted_if_there_is_too_much(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept_on_disk():
        cube()
        float(jax.jit(lambda x: x - 2)(3.0))
    count = len(list(folder.glob("*")))
    assert count >= 2
    monkeypatch.setattr(programs, "MAX_BYTES", 0)
    with kept_on_disk():
        pass
    assert len(list(folder.glob("*"))) == count - count // 2


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ewc", "er"])
def test_weights_do_not_depend_on_the_cache(algo: str, folder: Path, tmp_path: Path) -> None:
    weights = []
    for name in ("off", "written", "read"):
        jax.clear_caches()
        jax.config.update("jax_enable_compilation_cache", name != "off")
        compilation_cache.reset_cache()
        run_dir = tmp_path / name
        assert main(["run", "-q", "mode=jax", f"algo={algo}", *SMALL, f"run_dir={run_dir}"]) == 0
        weights.append(load_weights(run_dir))
    for other in weights[1:]:
        for path, array in weights[0].items():
            np.testing.assert_array_equal(other[path], array)
