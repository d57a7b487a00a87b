"""Published tables in a report; the verdicts are those of tests/core/test_statistics.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from sequel_core.report import write_report
from sequel_core.report.published import read_published
from tests.report.directories import ONE, write_run

ROW: dict[str, Any] = {
    "settings": [],
    "location": "table 1",
    "evidence": "verified",
    "spread": 1.0,
    "runs": 5,
}


def measured(values: list[float], **changes: Any) -> dict[str, Any]:
    one = {
        "values": {str(k): v for k, v in enumerate(values)},
        "failures": [],
        "margin": 1.5,
        "seconds": 40.0,
    }
    return {"jax": one | changes}


TABLE: dict[str, Any] = {
    "table": "paper",
    "title": "A paper <b>1</b>",
    "source": "https://example.org",
    "protocol": "two\nrotations",
    "masks": "none",
    "versions": {"numpy": "2.0"},
    "rows": {
        "er": {**ROW, "value": 80.0, "measured": measured([80.0, 80.2, 79.9])},
        "der": {**ROW, "value": 70.0, "cause": "the memory", "measured": measured([80.0, 80.2, 79.9])},
        "si": {**ROW, "value": 80.0, "measured": measured([], failures=["seed 0 diverged"])},
        "agem": {
            **ROW,
            "value": None,
            "not_expressible": "no setting",
            "measured": {},
            "evidence": "recalled",
        },
    },
}


def test_tables_are_shown_with_verdicts_and_causes(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", ONE)
    (tmp_path / "runs" / "table.json").write_text(json.dumps(TABLE))
    study = write_report([tmp_path / "runs"], tmp_path / "report.html", markdown=tmp_path / "report.md")
    assert study.notes == []
    text = (tmp_path / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["er", "equivalent", "80.03 (0.15)", "79.65 to 80.41", "80 (1)", "0.03", "1.5"] in [
        row[:7] for row in rows
    ]
    assert ["der", "different, above", "80.03 (0.15)", "79.65 to 80.41", "70 (1)", "10.03", "1.5"] in [
        row[:7] for row in rows
    ]
    assert ["si", "seed 0 diverged", "-", "-", "80 (1)", "-", "1.5", "JAX", "0", "40"] in rows
    assert ["agem (recalled)", "cannot be expressed", "-", "-", "-", "-", "-", "-", "-", "-"] in rows
    assert "- der: cause: the memory\n" in text
    assert "- masks: none\n" in text
    page = (tmp_path / "report.html").read_text()
    assert '<span class="badge equivalent">equivalent</span>' in page
    assert '<span class="badge different">different, above</span>' in page
    assert "A paper &lt;b&gt;1&lt;/b&gt;" in page
    assert '<a href="#published">' in page


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "table.json is damaged: "),
        ("{}", "table.json is damaged: 'rows'"),
        (json.dumps({**TABLE, "title": 1}), "table.json is damaged: title: Input should be a valid string"),
        (json.dumps({**TABLE, "rows": {"er": 1}}), "table.json is damaged: "),
        (json.dumps({**TABLE, "rows": {"er": {**ROW, "value": 1, "measured": {"jax": []}}}}), "is damaged: "),
    ],
    ids=["no JSON", "no rows", "title", "row", "measured"],
)
def test_a_damaged_table_is_skipped(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(content)
    notes: list[str] = []
    assert read_published([tmp_path], notes) == []
    assert reason in notes[0]
    assert len(notes) == 1


def test_a_report_notes_a_damaged_table(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", ONE)
    (tmp_path / "runs" / "table.json").write_text("{}")
    [note] = write_report([tmp_path / "runs"], tmp_path / "report.html").notes
    assert "table.json is damaged" in note
    assert "Published tables" not in (tmp_path / "report.html").read_text()
