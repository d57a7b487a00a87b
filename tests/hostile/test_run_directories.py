"""Run directories with contents that no run has written."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment

from sequel_core.report import page
from tests.hostile.fuzzing import Dumper, Sandbox, altered, inputs, mutated
from tests.report.directories import write_run

Report = Callable[[random.Random], list[str]]
DRAWN = 100  # one report in so many has its figures drawn, which takes a second or two


@pytest.fixture
def run(sandbox: Sandbox) -> Path:
    within = [(10, 0, 0.4, True), (20, 0, 0.9, False), (40, 0, 0.5, False), (40, 1, 0.8, False)]
    return write_run(sandbox.given / "run", evaluations=within, settings={"comment": "a note"})


@pytest.fixture
def report(sandbox: Sandbox, run: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """The command line of a report; the page is compiled once, and figures are drawn occasionally."""
    draw = page._svg
    compiled: list[Environment] = []

    def once(**options: Any) -> Environment:
        compiled.extend([] if compiled else [Environment(**options)])
        return compiled[0]

    def line(rng: random.Random) -> list[str]:
        monkeypatch.setattr(page, "_svg", draw if rng.random() * DRAWN < 1 else lambda *_: "")
        return ["report", str(run), "-o", str(sandbox.given / "report.html")]

    monkeypatch.setattr(page, "Environment", once)
    return line


@inputs(quick=150)
def test_bytes_of_any_file(sandbox: Sandbox, run: Path, report: Report, seeds: range) -> None:
    kept = {path: path.read_bytes() for path in run.iterdir()}

    def prepare(rng: random.Random) -> list[str]:
        for path, content in kept.items():
            path.write_bytes(content)
        for path in rng.sample(sorted(kept), rng.choice((1, 1, 2, 4))):
            path.write_bytes(mutated(kept[path], rng))
        return report(rng)

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))


@inputs(quick=150)
def test_values_of_a_summary(sandbox: Sandbox, run: Path, report: Report, seeds: range) -> None:
    file = run / "summary.json"
    whole = file.read_bytes()

    def prepare(rng: random.Random) -> list[str]:
        content = json.dumps(altered(json.loads(whole), rng), default=str).encode()
        file.write_bytes(mutated(content, rng) if rng.random() < 0.2 else content)
        return report(rng)

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))


@inputs(quick=100)
def test_values_of_a_configuration(sandbox: Sandbox, run: Path, report: Report, seeds: range) -> None:
    """Read for a report, or given to `sequel run` as a file."""
    file = run / "config.yaml"
    whole = yaml.safe_load(file.read_text())

    def prepare(rng: random.Random) -> list[str]:
        file.write_text(yaml.dump(altered(whole, rng), Dumper=Dumper), encoding="utf-8")
        return report(rng) if rng.random() < 0.5 else ["run", str(file), "--cfg"]

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))
