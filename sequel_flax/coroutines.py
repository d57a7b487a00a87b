"""Functions that take turns: each runs in a thread of its own until it asks for something."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax


class Finished(NamedTuple):
    """The end of a coroutine.

    Args:
        result: What the function returned, or the exception that it raised.

    Example:
        >>> Finished(3).result
        3
    """

    result: Any


class Coroutine:
    """Runs a function until it calls `ask`, and then until its next call.

    Only one of the caller and the function runs at a time. The thread uses 64 bits in JAX if the caller does.

    Args:
        function: A function without arguments.

    Example:
        >>> turns = Coroutine(lambda: turns.ask("question") + 1)
        >>> turns.resume()
        'question'
        >>> turns.resume(2).result
        3
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._questions: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        wide = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._run, args=(function, wide), daemon=True)

    def resume(self, answer: Any = None) -> Any:
        """Give the answer to the last question, and return the next question.

        Args:
            answer: The answer. `ask` raises it if it is an exception. It is ignored in the first call.

        Returns:
            The argument of `ask`, or `Finished`.
        """
        if self._thread.is_alive():
            self._answers.put(answer)
        else:
            self._thread.start()
        return self._questions.get()

    def ask(self, question: Any) -> Any:
        """Return the answer of the caller of `resume`; called by the function.

        Args:
            question: The question.

        Raises:
            BaseException: The answer, if it is an exception.
        """
        self._questions.put(question)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _run(self, function: Callable[[], Any], wide: bool) -> None:
        try:
            with jax.enable_x64(wide):
                result = function()
        except BaseException as error:  # the caller decides what it means
            result = error
        self._questions.put(Finished(result))
