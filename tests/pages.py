"""The documentation: README.md and the pages under docs/, their code blocks, headings and links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^```([^`\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NOT_PROSE = re.compile(
    r"^---\n.*?^---$|^(`{3,}|:{3,}).*?^\1$|^\|.*?$|^    .*?$|<!--.*?-->|^#+ .*?$", re.MULTILINE | re.DOTALL
)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def code_blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks of one language, in order.

    Empty lines come before the code, so that line numbers in tracebacks are those of the page.
    """
    text = page.read_text(encoding="utf-8")
    matches = (match for match in FENCE.finditer(text) if match[1] == language)
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in matches]


def run_block(page: Path, code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a Python block, with the global names that earlier blocks left, and return those that it leaves."""
    names = {"__name__": "__main__"} if names is None else names
    exec(compile(code, str(page), "exec", dont_inherit=True), names)  # pages have no __future__ imports
    return names


def commands(page: Path) -> list[str]:
    """Return the lines that start with `sequel`, of blocks for the shell and of indented ones."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in code_blocks(page, "sh") for line in block.splitlines()]
    lines += [line[4:] for line in FENCE.sub("", text).splitlines() if line.startswith("    ")]
    lines = [line.partition(" #")[0].strip().removeprefix(".venv/bin/") for line in lines]
    return [line for line in lines if line.startswith("sequel ")]


def sentences(page: Path) -> list[str]:
    """Return the sentences of a page, without code, tables, directives and headings; a link is its text."""
    text = NOT_PROSE.sub("\n\n", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`]+`", "CODE", re.sub(r"\[([^\]]*)\]\([^)\s]+\)", r"\1", text))
    parts = re.split(r"\n\s*\n|\n *(?:[-*]|\d+\.) |(?<=[.!?])[)*]*\s+", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def links(page: Path) -> list[str]:
    """Return the targets of the links that stay within the repository."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [target for target in LINK.findall(text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    titles = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def written_table(page: Path, mark: str) -> list[list[str]]:
    """Return the cells of the table between two comments of a page, including its two heading rows."""
    text = page.read_text(encoding="utf-8").partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0]
    return [line.strip("| ").split(" | ") for line in text.strip().splitlines() if line.startswith("|")]
