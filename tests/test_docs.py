"""The documentation: its Python code runs, its commands compose, its links lead somewhere."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest

import sequel_lightning  # noqa: F401  lets a page import torchvision beside any PyTorch build
from sequel_core.cli import COMMANDS, main
from tests.pages import PAGES, README, ROOT, anchors, code_blocks, commands, links, run_block

ELSEWHERE = {"README.md", "logging.md", "user-code.md"}
"""Pages whose Python code other tests run: `tests/examples`, and the last test here."""

SCRIPTS = [page for page in PAGES if page.name not in ELSEWHERE and code_blocks(page, "python")]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    assert set(links(index)) >= {page.name for page in index.parent.glob("*.md") if page != index}


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.name)
def test_the_python_code_of_a_page_is_a_script(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on speed
        for code in code_blocks(page, "python"):
            names = run_block(page, code, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_accepted(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that run experiments are composed, with the experiment file that docs/configuration.md shows."""
    monkeypatch.chdir(tmp_path)
    (experiment,) = code_blocks(ROOT / "docs" / "configuration.md", "yaml")[:1]
    Path("experiment.yaml").write_text(experiment)
    for line in commands(page):
        _, command, *arguments = shlex.split(line)
        assert command in COMMANDS, line
        resumes = any(text.startswith("resume=") and text != "resume=auto" for text in arguments)
        if command in ("run", "compare") and not resumes and "own.yaml" not in arguments:
            multirun = [] if command == "run" else ["-m"]
            code = main(["run", *multirun, "--cfg", *(text for text in arguments if text != "--check")])
            assert code == 0, f"{line}: {capsys.readouterr().err}"
