"""What importing each package loads, in a fresh interpreter."""

import json
import pkgutil
import subprocess
import sys

import pytest

import sequel_benchmarks
import sequel_core

TORCH = {"torch", "torchvision", "torchmetrics", "pytorch_lightning", "lightning_fabric"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


def loaded_by(*modules: str, call: str = "") -> set[str]:
    """Return the top-level packages that are loaded after importing modules and running `call`."""
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"import sequel_core\n{call}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return set(json.loads(child.stdout.splitlines()[-1]))


def test_the_core_and_the_benchmarks_load_no_framework() -> None:
    modules = [
        module.name
        for package in (sequel_core, sequel_benchmarks)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    assert {"sequel_core.runs.metrics", "sequel_core.runs.results", "sequel_core.stream.plan"} <= set(modules)
    assert not loaded_by("sequel_core", "sequel_benchmarks", *modules) & (TORCH | JAX)


def test_importing_the_core_loads_no_slow_package() -> None:
    loaded = loaded_by("sequel_core")
    assert not loaded & {"filelock", "hydra", "jinja2", "matplotlib", "pydantic", "rich", "scipy", "sklearn"}


def test_the_help_of_the_command_loads_no_framework() -> None:
    loaded = loaded_by("sequel_core.cli", call="sequel_core.cli.main(['--help'])")
    assert not loaded & (TORCH | JAX)


@pytest.mark.parametrize(
    ("package", "framework", "other"), [("sequel_flax", "jax", TORCH), ("sequel_lightning", "torch", JAX)]
)
def test_a_plug_in_loads_its_own_framework_only(package: str, framework: str, other: set[str]) -> None:
    loaded = loaded_by(package)
    assert framework in loaded
    assert not loaded & other
    assert "tensorflow" not in loaded
