"""Every example in a docstring runs, and every public class and function has one."""

from __future__ import annotations

import doctest
import pkgutil
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.small_data import write_small_data

PACKAGES = ("sequel_core", "sequel_lightning", "sequel_flax", "sequel_benchmarks")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PUBLIC = (*PACKAGES, "sequel_lightning.attach", "sequel_lightning.backbones", "sequel_flax.backbones")


def modules() -> list[str]:
    names = [
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}.")
    ]
    return [*PACKAGES, *(name for name in names if not name.endswith("__main__"))]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(module, module.__name__) if test.examples]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_small_data(root)
    return root


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQUEL_DATA_DIR", str(data_dir))
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    for test in examples(import_module(name)):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_have_examples(package: str) -> None:
    module = import_module(package)
    public = [item for item in map(partial(getattr, module), module.__all__) if callable(item)]
    lacking = [item.__name__ for item in public if ">>>" not in (item.__doc__ or "")]
    assert not lacking, f"{package}: no example in the docstring of {', '.join(lacking)}"
