"""Figures as SVG elements of an HTML page, with CSS variables as colours, tooltips and no external URLs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sequel_core.report.figures import LIGHT, figure_style

_THEME = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
_HEX = re.compile(r"#[0-9a-f]{6}")
_DECIMALS = re.compile(r"(\.\d\d)\d+")
_ZERO_ROTATION = re.compile(r"rotate\(-0 [^)]*\)")


def inline_svg(figure: Figure, prefix: str) -> str:
    """Return a figure as an `<svg>` element without namespaces, for a page with several figures.

    It differs from what matplotlib writes:

    - there is no style sheet and no metadata;
    - groups have no ids, and all other ids start with the prefix;
    - the colours of `sequel_core.report.figures.LIGHT` are CSS variables;
    - a `gid` made by `sequel_core.report.figures.tips` is replaced by `<title>` elements.

    Args:
        figure: the figure; its background becomes transparent.
        prefix: start of all ids, unique in the page.

    Returns:
        The element as text.

    Example:
        >>> from sequel_core.report.figures import heat_map
        >>> svg = inline_svg(heat_map([[0.9]], width=6), prefix="first-")
        >>> svg[:12], "<title>accuracy on task 1 after task 1: 90.00 %</title>" in svg
        ('<svg viewBox', True)
    """
    file = io.StringIO()
    figure.patch.set_visible(False)
    with figure_style():
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})  # savefig lays figures out twice
    root = ElementTree.fromstring(file.getvalue())
    for element in list(root.iter()):
        element.tag = _local(element.tag)
        for child in list(element):
            if _local(child.tag) in ("metadata", "style"):
                element.remove(child)
    for element in list(root.iter()):
        identity = element.get("id", "")
        element.attrib = {_local(key): _value(_local(key), value, prefix) for key, value in element.items()}
        if element.tag == "g":
            element.attrib.pop("id", None)
        if element.tag != "text":
            element.text = None
        element.tail = None
        if element.tag == "g" and identity.startswith("["):
            _add_titles(element, json.loads(identity))
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode")


def _add_titles(group: ElementTree.Element, texts: Sequence[str]) -> None:
    """Add one title to each marker of a group, or to a group without markers."""
    markers = [element for element in group.iter() if _local(element.tag) == "use"]
    for element, text in zip(markers or [group], texts, strict=True):
        title = ElementTree.Element("title")
        title.text = text
        element.insert(0, title)


def _local(name: str) -> str:
    """Return a name without its namespace: `href` of `{...}href`."""
    return name.rpartition("}")[2]


def _value(key: str, value: str, prefix: str) -> str:
    """Return an attribute's value with prefixed ids, themed colours and two decimals."""
    if key == "id":
        return prefix + value
    if key == "href":
        return value.replace("#", f"#{prefix}", 1) if value.startswith("#") else value.replace("\n", "")
    if key == "clip-path":
        return value.replace("#", f"#{prefix}")
    if key in ("style", "fill", "stroke"):
        themed = _HEX.sub(lambda match: _THEME.get(match[0], match[0]), value)
        return themed.replace("url(#", f"url(#{prefix}")
    if key == "transform":
        return _ZERO_ROTATION.sub("", value)
    return _DECIMALS.sub(r"\1", value.replace("\n", "")).strip()
