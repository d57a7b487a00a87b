"""Settings of the documentation site: `make docs`."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from ipython_pygments_lexers import IPython3Lexer
from latex2mathml.converter import convert
from pygments.lexer import bygroups, inherit, using
from pygments.lexers.shell import BashLexer
from pygments.token import Operator
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "SequeL"
author = "The SequeL authors"
html_show_copyright = False
version = release = version_of("sequel-cl")

extensions = [
    "myst_nb",  # Markdown pages, and notebooks that are executed
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "docs._ext.api",  # public names, commands and schemas
    "docs._ext.generated",  # tables from the code and from committed results
]
autodoc_member_order = "bysource"
default_role = "code"  # of single backticks in docstrings
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures, most of them of other packages
suppress_warnings = ["ref.python"]  # types in signatures that both plug-ins have
exclude_patterns = ["**/.ipynb_checkpoints"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # the anchors of GitHub
nb_execution_raise_on_error = True
nb_execution_timeout = 120  # seconds of a cell
nb_execution_in_temp = True  # tutorials write run directories
nb_merge_streams = True
nb_output_stderr = "remove"  # Lightning's advice and its messages on devices
copybutton_prompt_text = "!"  # of shell commands in notebooks
copybutton_line_continuation_character = "\\"

html_theme = "sphinx_book_theme"
html_title = f"SequeL {release}"
html_theme_options = {"show_navbar_depth": 1, "use_download_button": False, "navbar_persistent": []}
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"


def visit_math(translator: Any, node: nodes.Node) -> None:
    """Write an equation as MathML, which browsers show without a script or a font from elsewhere."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    mathml = convert(node.astext(), display=display)
    if display == "block":  # the arrow keys scroll what has the focus
        mathml = mathml.replace("<math", '<math tabindex="0"', 1)
    translator.body.append(mathml)
    raise nodes.SkipNode


class NotebookLexer(IPython3Lexer):  # type: ignore[misc]
    """IPython's lexer, which also takes shell commands of several lines."""

    tokens: ClassVar = {"root": [(r"^(!)((?:.*\\\n)*.*\n)", bygroups(Operator, using(BashLexer))), inherit]}


def setup(app: Sphinx) -> None:
    """Make `html_math_renderer` and the lexer known to Sphinx."""
    app.add_lexer("ipython3", NotebookLexer)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
