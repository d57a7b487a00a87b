"""The README's example in both frameworks: two scripts that differ in a few lines, with the same numbers."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sequel_lightning._torchvision  # noqa: F401  lets the script import torchvision beside any PyTorch build
from sequel_core import load_result
from tests.pages import README, code_blocks, run_block

TORCH, FLAX = code_blocks(README, "python")


def test_the_scripts_differ_in_imports_backbone_and_optimizer_only() -> None:
    a, b = ([line for line in script.splitlines() if line] for script in (FLAX, TORCH))
    changed = [line[2:] for line in difflib.ndiff(a, b) if line[0] in "+-"]
    bodies = [line for line in changed if not line.startswith(("import ", "from "))]
    assert sorted({line.split(" = ")[0] for line in bodies}) == ["model", "optimizer"]
    assert len(bodies) == 4


def test_the_scripts_end_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flax, torch = (run_block(README, script) for script in (FLAX, TORCH))
    assert flax["learner"].mode == "jax"
    assert torch["learner"].mode == "pytorch"
    a, b = flax["result"], torch["result"]
    assert a.matrix.shape == (5, 5)
    np.testing.assert_array_equal(np.isnan(a.matrix), ~np.tri(5, dtype=bool))
    np.testing.assert_allclose(a.matrix, b.matrix, atol=0.02)
    assert a.average_accuracy > 0.9
    assert_close(flax["learner"].weights(), torch["learner"].weights(), 1e-3)
    runs = {path.resolve() for path in (tmp_path / "runs").iterdir()}
    assert runs == {r.run_dir.resolve() for r in (a, b)}
    assert all(load_result(path).summary["status"] == "finished" for path in runs)


def assert_close(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, array in b.items():
        assert np.linalg.norm(a[name] - array) < tolerance * np.linalg.norm(array), name
