"""`sequel schema`: the JSON schema of experiment files."""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from sequel_core.cli.arguments import Parser

DESCRIPTION = """Print the JSON schema of experiment files.

Editors use it to complete and to check them. It lists the settings of each algorithm, benchmark,
backbone, ... with their meaning, range and default. With the YAML language server:

  sequel schema > sequel.schema.json

and in the first line of an experiment file:

  # yaml-language-server: $schema=sequel.schema.json
"""


def main(args: Sequence[str]) -> int:
    """Print the schema."""
    Parser(
        prog="sequel schema", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    ).parse_args(args)
    from sequel_core.experiment.json_schema import json_schema  # not needed for --help

    print(json.dumps(json_schema(), indent=2, default=str))
    return 0
