"""The wheel: its files, its metadata, and imports and commands from it."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {  # folder of the repository -> name in the wheel
    "sequel_core": "sequel_core",
    "sequel_lightning": "sequel_lightning",
    "sequel_flax": "sequel_flax",
    "benchmarks": "sequel_benchmarks",
    "configs": "sequel_configs",
    "hydra_plugins": "hydra_plugins",  # a namespace that other packages share
}

LAUNCHERS = {"joblib", "ray", "submitit"}
"""Extras without constraints; Ray's launcher needs an older cloudpickle than these have."""


def source_files(*patterns: str) -> list[Path]:
    """Return the files of all packages that match a pattern, relative to the repository."""
    paths = (path for folder in FOLDERS for pattern in patterns for path in (ROOT / folder).rglob(pattern))
    return sorted(path.relative_to(ROOT) for path in paths if "__pycache__" not in path.parts)


def installed_name(path: Path) -> str:
    return "/".join((FOLDERS[path.parts[0]], *path.parts[1:]))


def python(*args: str, cwd: Path, **env: str) -> str:
    """Return what a fresh interpreter prints."""
    child = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout.strip()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy without files of earlier builds."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), ".")
    python(*pip, cwd=copy)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    python(*pip, cwd=target)
    return target


def test_pyproject_lists_every_package(project: dict[str, Any]) -> None:
    folders = {path.parent for path in source_files("*.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == {
        installed_name(folder).replace("/", ".") for folder in folders
    }


def test_the_wheel_contains_all_source_files_and_no_others(contents: set[str]) -> None:
    expected = {
        installed_name(path) for path in source_files("*.py", "*.yaml", "*.html", "*.css", "py.typed")
    }
    assert {name for name in contents if ".dist-info/" not in name} == expected
    assert {name.partition("/")[0] for name in expected} == set(FOLDERS.values())
    typed = set(FOLDERS.values()) - {"sequel_configs", "hydra_plugins"}
    assert {f"{folder}/py.typed" for folder in typed} <= expected
    assert {"sequel_configs/config.yaml", "sequel_configs/algo/ewc.yaml"} <= expected


def test_the_metadata_of_the_wheel(wheel: Path, contents: set[str]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name == f"sequel_cl-{version}-py3-none-any.whl"
    info = {name.partition(".dist-info/")[2] for name in contents if ".dist-info/" in name}
    assert {"METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE"} <= info
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"sequel_cl-{version}.dist-info/METADATA").decode()
    assert "Name: sequel-cl\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    core = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert not [line for line in core if "torch" in line or "jax" in line or "flax" in line]


def test_a_config_composes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sequel_benchmarks, sequel_configs, sequel_core\n"
        "print([module.__path__[0] for module in (sequel_core, sequel_benchmarks, sequel_configs)])\n"
        "from hydra import compose, initialize_config_module\n"
        "with initialize_config_module('sequel_configs', version_base='1.3'):\n"
        "    config = compose('config', ['algo=ewc', 'benchmark=rotatedmnist'])\n"
        "print(config.algo.name, config.benchmark.name)\n"
    )
    paths, composed = python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    names = ("sequel_core", "sequel_benchmarks", "sequel_configs")
    assert paths == str([str(installed / name) for name in names])
    assert composed == "ewc rotatedmnist"


def test_the_command_works_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['sequel', '--help']; from sequel_core.cli import entry_point; entry_point()"
    )
    assert "usage: sequel" in python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))


def test_extras_contain_one_framework_only(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"lightning", "flax", "wandb", "comet", "all", "dev", "docs", *LAUNCHERS}
    names = {extra: " ".join(requirements) for extra, requirements in extras.items()}
    assert "jax" not in names["lightning"]
    assert "flax" not in names["lightning"]
    assert "torch" not in names["flax"]


def test_the_constraints_pin_every_requirement(project: dict[str, Any]) -> None:
    def name(requirement: str) -> str:
        for mark in "<>=![;~ ":
            requirement = requirement.partition(mark)[0]
        return requirement.lower().replace("_", "-")

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line and "/" not in line for line in pins)
    required = list(project["project"]["dependencies"])
    for extra, requirements in project["project"]["optional-dependencies"].items():
        required += requirements if extra not in {"all", *LAUNCHERS} else []
    assert {name(requirement) for requirement in required} <= {name(line) for line in pins}
