"""What a stream is scored with."""

from __future__ import annotations

from typing import NamedTuple


class Score(NamedTuple):
    """The number that is measured on each task, and its direction.

    Args:
        name: lower case, words separated by spaces; `"accuracy"`, `"squared error"`.
        higher_is_better: whether a higher score is better.
        fraction: whether scores are in [0, 1]; they are then shown in percent.

    Example:
        >>> error = Score("squared error", higher_is_better=False, fraction=False)
        >>> error.key
        'squared_error'
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    fraction: bool = True

    @property
    def key(self) -> str:
        """The name in files and in the tags of loggers: words separated by underscores."""
        return self.name.replace(" ", "_")
