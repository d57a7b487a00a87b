"""The reference pages: public names by their docstrings, and the help of commands.

- `{api} sequel_core`, with a name per line: what `sequel_core` exports under these names.
- `{usage} run`: what `sequel run --help` prints.
- `{json} experiment`: the JSON schema of experiment files; also of `published` and `measured` tables.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from inspect import isclass, ismodule
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sequel_core.cli import main
from sequel_core.experiment.json_schema import json_schema
from sequel_core.experiment.measured import MeasuredTable
from sequel_core.experiment.published import PublishedTable
from sequel_core.hparams import AlgorithmHParams

SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {
    "experiment": json_schema,
    "published": PublishedTable.model_json_schema,
    "measured": MeasuredTable.model_json_schema,
}
MARKUP = re.compile(r"(?<!\\)([*|]|_(?!\w))")


def directive_of(package: str, name: str) -> str:
    """Return the reStructuredText that documents a public name."""
    item, path = getattr(import_module(package), name), f"{package}.{name}"
    if ismodule(item):
        return f".. automodule:: {path}"
    if isinstance(item, dict):
        keys = ", ".join(f"``{key}``" for key in item)
        return f".. py:data:: {path}\n\n   A dict with the keys {keys}."
    home, _, _ = item.__module__.partition(".")
    if home != package.partition(".")[0]:
        return f".. py:class:: {path}\n\n   This is :py:class:`{home}.{name}`."
    if not isclass(item):
        return f".. autofunction:: {path}"
    members = "" if issubclass(item, AlgorithmHParams) else "\n   :members:"
    return f".. autoclass:: {path}{members}"


def documented(package: str, names: list[str]) -> str:
    """Return the reStructuredText that documents public names."""
    return "\n\n".join(directive_of(package, name) for name in names)


def usage(command: str) -> str:
    """Return what a command prints for `--help`."""
    output = io.StringIO()
    with redirect_stdout(output), patch.dict(os.environ, COLUMNS="90"):
        main([command, "--help"])
    return f"```text\n{output.getvalue()}```"


def escaped(line: str) -> str:
    """Return a line of prose, in which only backticks have a meaning, as reStructuredText."""
    parts = line.split("`")
    parts[::2] = [MARKUP.sub(r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def as_text(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring: indented blocks before the sections are shown as they are."""
    result: list[str] = []
    literal = example = False
    section = False
    for line in lines:
        indented = line.startswith("    ")
        if re.fullmatch(r"[A-Z][a-z]+:", line):
            section, example = True, line.startswith("Example")
        if line and not indented:
            literal = False
        if indented and not section and not literal and (not result or not result[-1]):
            result += ["::", ""]
            literal = True
        result.append(line if literal or example else escaped(line))
    lines[:] = result


def skip(app: Any, what: str, name: str, item: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples and the settings of pydantic, which have no text of their own."""
    field = str(getattr(item, "__doc__", "")).startswith("Alias for field number")
    return True if field or name == "model_config" else None


def readable(
    app: Any, what: str, name: str, item: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write an ellipsis for a default that is no expression, such as a function: Sphinx cannot parse it."""
    return signature and re.sub(r"<(?:[^<>]|<[^<>]*>)*>", "...", signature), returns


def write_schemas(app: Any, error: Exception | None) -> None:
    """Put the JSON schemas into the site."""
    folder = Path(app.outdir) / "schemas"
    folder.mkdir(exist_ok=True)
    for name, schema in SCHEMAS.items():
        text = json.dumps(schema(), indent=2, default=str)
        (folder / f"{name}.schema.json").write_text(text + "\n", encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Add the directives and the treatment of docstrings; Sphinx calls this."""
    from sphinx.util.docutils import SphinxDirective

    class Api(SphinxDirective):
        required_arguments, has_content = 1, True

        def run(self) -> list[Any]:
            self.env.note_reread()  # docstrings are not files of the documentation
            text = documented(self.arguments[0], list(self.content))
            return self.parse_text_to_nodes(f"````{{eval-rst}}\n{text}\n````")

    class Usage(SphinxDirective):
        required_arguments = 1

        def run(self) -> list[Any]:
            self.env.note_reread()
            return self.parse_text_to_nodes(usage(self.arguments[0]))

    app.add_directive("api", Api)
    app.add_directive("usage", Usage)
    app.connect("autodoc-process-docstring", as_text, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", readable)
    app.connect("build-finished", write_schemas)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
