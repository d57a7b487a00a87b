"""The documentation: its Python code runs, its commands compose, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

import sequel_lightning  # noqa: F401  lets a page import torchvision beside any PyTorch build
from sequel_core import load_result
from sequel_core.algorithms import ALGORITHMS
from sequel_core.cli import COMMANDS, main
from sequel_core.experiment.published import read_table
from tests.pages import PAGES, README, ROOT, anchors, code_blocks, commands, links, run_block, sentences
from tests.quick import some

DOCS = ROOT / "docs"
ELSEWHERE = {README, *(DOCS / "guides" / f"{name}.md" for name in ("examples", "logging", "user-code"))}
"""Pages whose Python code other tests run: `tests/examples`, and the last test here."""

SCRIPTS = [page for page in PAGES if page not in ELSEWHERE and code_blocks(page, "python")]
SLOW = {
    "docs/guides/comparisons.md",
    "docs/guides/flax.md",
    "docs/guides/optax.md",
    "docs/guides/many-seeds.md",
    "docs/guides/own-methods.md",
    *(f"docs/methods/{name}.md" for name in ALGORITHMS.keys() - {"ewc", "er"}),
}
"""Pages that train for long, and pages of methods, whose code differs in a few words."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_and_sentences_are_short(page: Path) -> None:
    counts = {sentence: len(sentence.split()) for sentence in sentences(page)}
    assert sum(counts.values()) <= 1500
    assert not [sentence for sentence, count in counts.items() if count > 35]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", some(SCRIPTS, {name_of(page) for page in SCRIPTS} - SLOW, name_of))
def test_the_python_code_of_a_page_is_a_script(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on speed
        for code in code_blocks(page, "python"):
            names = run_block(page, code, names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_are_accepted(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that run experiments are composed, with the experiment file of docs/guides/configuration.md."""
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text(code_blocks(DOCS / "guides" / "configuration.md", "yaml")[0])
    for line in commands(page):
        _, command, *arguments = shlex.split(line.partition(" --budget ")[0])
        assert command in COMMANDS, line
        resumes = any(text.startswith("resume=") and text != "resume=auto" for text in arguments)
        if command in ("run", "compare") and not resumes and "own.yaml" not in arguments:
            multirun = [] if command == "run" else ["-m"]
            given = [text for text in arguments if text not in ("--check", "--together")]
            code = main(["run", *multirun, "--cfg", *given])
            assert code == 0, f"{line}: {capsys.readouterr().err}"


WITH_YAML = [page for page in PAGES if page.stem != "user-code" and code_blocks(page, "yaml")]


@pytest.mark.parametrize("page", WITH_YAML, ids=name_of)
def test_yaml_files_of_a_page_are_accepted(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for code in code_blocks(page, "yaml"):
        Path("example.yaml").write_text(code)
        if "rows" in yaml.safe_load(code):
            assert read_table("example.yaml").rows
        else:
            assert main(["run", "example.yaml", "--cfg"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_has_the_targets_and_pytest_the_folders_of_a_page(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"^(?: {4})?make (\w+)", text, re.MULTILINE)) <= set(targets)
    assert all((ROOT / path).is_dir() for path in re.findall(r"^pytest ([\w/]+)", text, re.MULTILINE))


def test_the_error_that_the_configuration_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "algo=ewc", "algo.ewc_lamda=1"]) == 2
    (shown,) = code_blocks(DOCS / "guides" / "configuration.md", "text")
    assert capsys.readouterr().err == shown.lstrip("\n")


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_users_own_code_runs_in_both_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / "guides" / "user-code.md"
    for code in (*code_blocks(page, "python"), code_blocks(page, "yaml")[0]):
        name, _, content = code.lstrip("\n# ").partition("\n")
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the current directory
    for line in commands(page):
        assert main([*shlex.split(line)[1:], "-q"]) == 0, line
    results = [load_result(path) for path in sorted((tmp_path / "runs").iterdir())]
    assert [(r.config["mode"], len(r.matrix)) for r in results] == [("pytorch", 3), ("jax", 2)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        monkeypatch.delitem(sys.modules, name)
