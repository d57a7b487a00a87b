"""A seeded mutation fuzzer, and the checks that the command passes for any input."""

import contextlib
import copy
import datetime
import io
import math
import os
import random
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import yaml

from sequel_core.cli import main

SECONDS = 30  # time limit per input; the slowest takes about one second
GROWTH = 400 * 2**20  # memory limit per input in bytes

TOKENS = (
    b"[", b"{", b"}", b"]", b":", b"\n", b"\t", b"\0", b"\r", b",", b'"', b"'", b"- ", b"? ", b"#", b"---\n",
    b"...\n", b"&a ", b"*a", b"<<: *a", b"!!python/object/apply:os.abort []", b"!!set ", b"!!binary ",
    b"!!map ", b"!!timestamp ", b"!!float ", b"!!int ", b"!!omap ", b"%YAML 9.9\n", b"|\n", b">\n",
    b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"NaN", b"-Infinity", b"1e999", b"-1",
    b"0",
    b"9" * 400, b"9" * 5000, b"0x7fffffffffffffff", b"1:1:1", b"2001-99-99", b"null", b"true", b"${a}", b"${",
    b"${oc.env:HOME}", b"${oc.decode:'${a}'}", b"\\u0000", b"\\ud800", b"<script>", b"$x^{$", b"[red]x[/]",
    b"\x1b[31m", b"../../x", b"[" * 3000, b'{"a":' * 3000, b"x" * 5000,
)  # fmt: skip

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -1e-9,
    1e308, 5e-324, math.nan, math.inf, -math.inf, "", " ", "nan", "null", "1", "1e3", "ewc", "jax", "${a}",
    "x" * 5000, "${seed}", "${", "${oc.env:HOME}", "${oc.decode:1}", "../../x", "~", "~nobody-of-that-name",
    "/dev/null",
    "a.b", "a=b", "a,b", "ü", "\0", "\x1b[31m", "\N{LINE SEPARATOR}", "<script>", "$x^{$", r"$\frac$",
    "[red]x[/]", "[/]", "***", "_target_", b"\0\xff", datetime.date(2001, 1, 1),
    datetime.datetime(2001, 1, 1, 1, 1),
)  # fmt: skip

TARGETS = (
    "collections.OrderedDict", "math.pi", "nothing.here", "sequel_core", "", ".", "a..b", "builtins.dict",
    "json.dumps", "types.SimpleNamespace", "tests", "sequel_core.StreamCallback", 3, None, ["a"],
)  # fmt: skip

NUMBERS = tuple(repr(value).encode() for value in SCALARS if isinstance(value, int | float))


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes after one to four random changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, j = sorted((rng.randint(0, len(content)), rng.randint(0, len(content))))
        j = min(j, i + rng.choice((1, 4, 64, 10**9)))
        numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content))
        change = rng.randrange(10)
        if change == 0 and content:
            i = min(i, len(content) - 1)
            content = content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :]
        elif change == 1:
            content = content[:i] + rng.randbytes(j - i) + content[j:]
        elif change == 2:
            content = content[:i] + content[j:]
        elif change == 3:
            content = content[:j] + content[i:]
        elif change == 4:
            content = content[:i]
        elif change == 5 and numbers:
            number = rng.choice(numbers)
            value = rng.choice(TOKENS + NUMBERS)
            content = content[: number.start()] + value + content[number.end() :]
        elif change == 6:
            lines = content.split(b"\n")
            rng.shuffle(lines)
            content = b"\n".join(lines)
        elif change == 7 and rng.random() < 0.1:
            content = rng.randbytes(rng.randrange(300))
        else:
            content = content[:i] + rng.choice(TOKENS) + content[i:]
    return content


def hostile(rng: random.Random) -> Any:
    """Return a value that few settings accept."""
    choice = rng.randrange(12)
    if choice == 0:
        return [hostile(rng) for _ in range(rng.randrange(4))]
    if choice == 1:
        return {str(hostile(rng))[:40]: hostile(rng) for _ in range(rng.randrange(4))}
    if choice == 2:
        return {"_target_": rng.choice(TARGETS), rng.choice(("a", "_partial_", "seed", "name")): hostile(rng)}
    if choice == 3 and rng.random() < 0.1:
        value: Any = 1
        for _ in range(rng.choice((20, 150))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(SCALARS)


def altered(value: Any, rng: random.Random) -> Any:
    """Return a copy of nested values; one to three of them are replaced, renamed, removed or copied."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return hostile(rng)
        owner, key = rng.choice(places)
        change = rng.randrange(7)
        if change == 0:
            del owner[key]
        elif change == 1 and isinstance(owner, dict):
            name = str(key)
            i = rng.randrange(len(name) + 1)
            owner[name[:i] + rng.choice(("", "s", ".", " ", "${")) + name[i + 1 :]] = owner.pop(key)
        elif change == 2 and isinstance(owner, dict):
            other = rng.choice((str(hostile(rng))[:60], "file", "run_dir", "hydra", "defaults", "logger"))
            owner[other] = hostile(rng)
        elif change == 3:
            source, name = rng.choice(places)
            if name in source if isinstance(source, dict) else name < len(source):
                owner[key] = copy.deepcopy(source[name])
        else:
            owner[key] = hostile(rng)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key of every nested value."""
    keys: Sequence[Any] = range(len(value)) if isinstance(value, list) else ()
    if isinstance(value, dict):
        keys = list(value)
    for key in keys:
        yield value, key
        yield from _places(value[key])


class Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """A dumper that writes no YAML aliases."""

    def ignore_aliases(self, data: object) -> bool:
        """Return True: write repeated values in full."""
        return True


def inputs(quick: int, full: int = 10_000) -> pytest.MarkDecorator:
    """Parametrize a test with `seeds`: `quick` seeds by default, and `full` others if slow tests run."""
    slow = pytest.param(range(quick, quick + full), marks=pytest.mark.slow)
    return pytest.mark.parametrize("seeds", [range(quick), slow], ids=["quick", "full"])


class TooSlowError(BaseException):
    """Raised after `SECONDS`; a BaseException, so that no handler of the command catches it."""


class Answer(NamedTuple):
    """Exit code and output of the command."""

    code: int
    out: str
    err: str


class Sandbox:
    """A folder for the inputs, next to files and folders that must not change."""

    def __init__(self, root: Path) -> None:
        self.root, self.given, self.here = root, root / "given", root / "here"
        self.given.mkdir()
        self.here.mkdir()  # the working directory
        (root / "precious").mkdir()
        (root / "precious" / "results.txt").write_text("years of work")
        (root / "results.txt").write_text("years of work")

    def fuzz(self, seeds: range, prepare: Callable[[random.Random], Sequence[str]]) -> list[int]:
        """Run the command on one input per seed, check each run, and return the exit codes.

        `prepare` writes the files of the input and returns the command line.
        """
        codes: list[int] = []
        failures: dict[str, str] = {}
        for seed in seeds:
            arguments = prepare(random.Random(seed))
            try:
                codes.append(self.run(arguments).code)
            except (Exception, TooSlowError) as error:
                *_, last = traceback.walk_tb(error.__traceback__)
                place = f"{type(error).__name__} at {last[0].f_code.co_filename}:{last[1]}"
                failures.setdefault(place, f"{error} for input {seed}: sequel {' '.join(arguments)}"[:1000])
        assert not failures, "\n".join(f"{place}: {failure}" for place, failure in failures.items())
        return codes

    def run(self, arguments: Sequence[str], touches: Path | None = None) -> Answer:
        """Run the command in this process and check its exit code, messages and files.

        Files may only be created or changed below `touches`, by default the folder for the inputs.
        """
        before = self._outside(touches or self.given)
        out, err = _terminal("strict"), _terminal("backslashreplace")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limits():
            code = main(arguments)
        answer = Answer(code, _text(out), _text(err))
        lines = answer.err.splitlines()
        assert code in (0, 1, 2), answer
        assert len(lines) <= 1, answer
        assert len(lines) == 1 or code == 0, answer
        assert all(line.startswith("sequel: ") for line in lines), answer
        assert "Traceback" not in answer.out + answer.err, answer
        assert self._outside(touches or self.given) == before
        return answer

    def _outside(self, touches: Path) -> dict[str, Any]:
        entries = {}
        for folder, below, files in os.walk(self.root):
            below[:] = [name for name in below if Path(folder, name) != touches]
            for name in (*below, *files):
                path = Path(folder, name)
                content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
                entries[str(path)] = (path.lstat().st_mode, content)
        return entries


def _terminal(errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer: Any = stream.buffer
    return str(buffer.getvalue().decode())


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Raise TooSlowError after `SECONDS`; on Linux also fail if the memory grows by `GROWTH`."""

    def stop(_: int, frame: FrameType | None) -> None:
        raise TooSlowError

    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    measured = status.is_file() and os.access(reset, os.W_OK)
    if measured:
        reset.write_text("5")  # reset the peak to the current use
        before = _kibibytes(status)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    if measured:
        grown = 1024 * (_kibibytes(status) - before)
        assert grown < GROWTH, f"{grown} bytes of memory"


def _kibibytes(status: Path) -> int:
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])  # type: ignore[index]
