"""Checks the built documentation without a network: `python -m tests.site build/docs`.

Every link within the site leads to a file and an anchor, a page loads nothing from elsewhere, and every
public name has an anchor.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

PUBLIC = (
    "sequel_core",
    "sequel_core.report",
    "sequel_core.testing",
    "sequel_lightning",
    "sequel_lightning.attach",
    "sequel_lightning.backbones",
    "sequel_flax",
    "sequel_flax.backbones",
    "sequel_benchmarks",
)
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src"}


class Page(HTMLParser):
    """The links, the loaded files and the anchors of an HTML file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in LOADS and LOADS[tag] in values and values.get("rel") != "canonical":
            self.loads.append(values[LOADS[tag]])


def problems(site: Path) -> list[str]:
    """Return a line for each broken link and each file that is loaded from elsewhere."""
    files = (path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts)
    pages = {path: Page(path) for path in files}
    messages = [] if pages else [f"{site}: no pages"]
    for path, page in pages.items():
        name = path.relative_to(site)
        messages += [f"{name} loads {link}" for link in page.loads if urlsplit(link).netloc]
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                messages.append(f"{name}: no file {link}")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                messages.append(f"{name}: no anchor {link}")
    return messages + unknown_names(set().union(*(page.anchors for page in pages.values())))


def unknown_names(anchors: set[str]) -> list[str]:
    """Return a line for each public name that has no anchor, under its package or the one above."""
    messages = []
    for package in PUBLIC:
        for name in import_module(package).__all__:
            paths = f"{package}.{name}", f"{package.partition('.')[0]}.{name}", f"module-{package}.{name}"
            if anchors.isdisjoint(paths):
                messages.append(f"no anchor for {package}.{name}")
    return messages


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]).resolve())
    print("\n".join(lines) or "No broken links")
    sys.exit(bool(lines))
