"""A run restores every process-wide setting that it changes."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from threadpoolctl import threadpool_info

from sequel_core import compare, load_result
from sequel_core.runs.signals import NAMES

SMALL = ["algo=naive", "benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.subset=20"]


def settings() -> dict[str, Any]:
    """Return the settings of this process that a run may change."""
    return {
        "excepthook": threading.excepthook,
        "unraisablehook": sys.unraisablehook,
        "signals": [signal.getsignal(getattr(signal, name)) for name in NAMES],
        "filters": [list(logging.getLogger(name).filters) for name in ("absl", "asyncio")],
        "x64": jax.config.read("jax_enable_x64"),
        "torch threads": torch.get_num_threads(),
        "blas threads": {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"},
    }


@pytest.mark.parametrize("lr", [0.1, 1e30])
def test_process_wide_settings_are_restored(
    lr: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a run that fails: it diverges at the high learning rate."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = settings()
    training = ["training.dtype=float64", f"optimizer.lr={lr}"]
    comparison = compare([*SMALL, *training], run_dir=tmp_path / "runs", progress=False)
    after = settings()
    torch.set_num_threads(threads)
    assert after == before
    assert [run.result is not None for run in comparison.runs] == [lr < 1] * 2
    first, _ = comparison.runs
    assert load_result(first.directory).summary["threads"] == 1  # of torch, while it ran
