"""A parser of arguments whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, with ValueError in place of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the message and the way to the help.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; see {self.prog} --help")
