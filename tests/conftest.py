"""Settings of all tests: fixed seeds, reproducible Hypothesis examples, no rank promotion in JAX."""

import gc
import os
import random
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import settings

os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # read when a test imports jax
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch: two pytest workers share the cores

settings.register_profile("sequel", derandomize=True, deadline=None)
settings.load_profile("sequel")


# Compilation takes most of the time of the JAX tests. Each worker has its own compilation cache, because
# JAX's cache does not support two writers. The variables are set here, not in a hook, because JAX reads them
# when it is imported, and the conftest.py of some folders imports it.
COMPILED = TemporaryDirectory(prefix="sequel-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


# Python would search all objects of the imported packages again and again, which takes a tenth of the time.
gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish() -> None:
    """Leave the objects of the imported packages out of garbage collection."""
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """Let XLA compile fast instead of well, except in runs with slow tests, which run the programs of users.

    Its older emitters of fused operations compile in half the time.
    """
    config.add_cleanup(COMPILED.cleanup)
    if config.getoption("markexpr") == "not slow":
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _single_precision_after_each_test() -> Iterator[None]:
    """Switch JAX back to float32, because a run with `training.dtype=float64` switches the whole process."""
    yield
    if "jax" in sys.modules and sys.modules["jax"].config.jax_enable_x64:
        sys.modules["jax"].config.update("jax_enable_x64", False)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
