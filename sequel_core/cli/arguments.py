"""An argument parser with one-line errors."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the message and the way to the help.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; see {self.prog} --help")
