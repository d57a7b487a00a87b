"""Checkpoints on the disk: only complete and undamaged ones are used."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import sequel_core.runs.files
from sequel_core.runs.checkpoints import MANIFEST, RUN, Checkpoints, verify
from tests import disks

PARTS = {"weights.bin": 5000, "state/a.bin": 300, "state/deep/b.bin": 1, "state/empty": 0}


def write(path: Path) -> Callable[[], None]:
    """Write a learner's part; its last file is written by the returned function."""
    contents = {name: random.Random(f"{path.name} {name}").randbytes(size) for name, size in PARTS.items()}
    last, rest = contents.popitem()
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)

    def finish() -> None:
        (path / last).write_bytes(rest)

    return finish


def saved(run_dir: Path, count: int, keep: int = 2) -> Path:
    """Save `count` checkpoints; return their folder."""
    files = Checkpoints(run_dir, keep)
    for k in range(count):
        files.save(write, {"done": [k, "evaluate"]})
    files.close()
    return files.directory


def chosen(run_dir: Path) -> tuple[str, Any] | None:
    checkpoint = Checkpoints(run_dir).newest()
    return None if checkpoint is None else (checkpoint.path.name, checkpoint.run["done"])


def test_the_newest_checkpoint_holds_both_parts(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3)
    assert chosen(tmp_path) == ("3", [2, "evaluate"])
    for number in (2, 3):
        for name, size in PARTS.items():
            expected = random.Random(f"{number} {name}").randbytes(size)
            assert (folder / str(number) / name).read_bytes() == expected
    listed = json.loads((folder / "3" / MANIFEST).read_text())
    assert listed.keys() == {*PARTS, RUN}
    assert listed["state/empty"] == {
        "bytes": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",  # of nothing
    }
    assert Checkpoints(tmp_path).bytes() == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    files = Checkpoints(tmp_path)
    assert files.newest() is None
    files.clear()
    files.close()
    assert files.bytes() == 0
    assert not files.directory.exists()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    folder = saved(tmp_path, 5, keep)
    assert sorted(path.name for path in folder.iterdir()) == [str(k) for k in range(6 - keep, 6)]


def test_numbers_continue_after_a_restart(tmp_path: Path) -> None:
    saved(tmp_path, 12)
    folder = saved(tmp_path, 1)
    assert {path.name for path in folder.iterdir()} == {"12", "13"}
    assert chosen(tmp_path) == ("13", [0, "evaluate"])


def test_a_failed_write_in_the_background_raises_at_the_next_call(tmp_path: Path) -> None:
    files = Checkpoints(tmp_path)
    files.save(write, {"done": 1})

    def fails(path: Path) -> Callable[[], None]:
        def finish() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        write(path)
        return finish

    files.save(fails, {"done": 2})
    with pytest.raises(OSError, match="No space left on device"):
        files.save(write, {"done": 3})
    assert chosen(tmp_path) == ("1", 1)
    files.wait()  # the error was raised once
    files.save(fails, {"done": 4})
    with pytest.raises(OSError, match="No space left on device"):
        files.wait()
    files.save(fails, {"done": 5})
    with pytest.raises(OSError, match="No space left on device"):
        files.close()
    assert chosen(tmp_path) == ("1", 1)


@pytest.mark.parametrize("name", [RUN, MANIFEST])
def test_a_full_disk_at_the_last_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    saved(tmp_path, 2)
    wrote = sequel_core.runs.files.write_bytes

    def full(path: Path, content: bytes) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        wrote(path, content)

    monkeypatch.setattr(sequel_core.runs.files, "write_bytes", full)
    files = Checkpoints(tmp_path)
    files.save(write, {"done": 3})
    with pytest.raises(OSError, match="No space left on device"):
        files.close()
    assert chosen(tmp_path) == ("2", [1, "evaluate"])


def test_a_value_that_is_not_plain_raises(tmp_path: Path) -> None:
    files = Checkpoints(tmp_path)
    files.save(write, {"done": object()})
    with pytest.raises(ValueError, match=r"run\.done must be a plain value"):
        files.close()
    assert chosen(tmp_path) is None


@pytest.mark.parametrize("stage", ["learner", "background", "run", "manifest"])
def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(tmp_path: Path, stage: str) -> None:
    saved(tmp_path, 1)
    code = f"""
import os, signal, sys
from pathlib import Path
from sequel_core.runs import checkpoints
from tests.core.test_checkpoints import write
stage, files = {stage!r}, checkpoints.Checkpoints(Path({str(tmp_path)!r}))
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
def dying(path):
    finish = write(path)
    if stage == "learner": die()
    return die if stage == "background" else finish
wrote = os.fsync
def fsync(number):
    if stage + ".json" in os.readlink(f"/proc/self/fd/{{number}}"): die()
    wrote(number)
os.fsync = fsync
files.save(dying, {{"done": 2}})
files.close()
"""
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    assert (tmp_path / "checkpoints" / "2").is_dir()
    assert chosen(tmp_path) == ("1", [0, "evaluate"])
    files = Checkpoints(tmp_path)
    checkpoint = files.newest()
    assert checkpoint is not None
    files.clear(checkpoint.path)
    assert [path.name for path in files.directory.iterdir()] == ["1"]
    files.save(write, {"done": 2})
    files.close()
    assert chosen(tmp_path) == ("2", 2)


def damages() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """Yield the name of a file, the error about it, and a function that damages it."""
    rng = random.Random(0)
    for name in (*PARTS, RUN):
        yield name, "is missing", lambda file: file.unlink()
        yield name, "differs", lambda file: file.write_bytes(file.read_bytes() + b"\0")
        if PARTS.get(name, 99):
            for _ in range(10):
                yield name, "differs", partial(flip, place=rng.random(), bit=rng.randrange(8))
                yield name, "differs", partial(cut, place=rng.random())
    yield "new.bin", "is not in the manifest", lambda file: file.write_bytes(b"")
    yield "state/deep/new.bin", "is not in the manifest", lambda file: file.write_bytes(b"x")


def flip(file: Path, place: float, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(content)


def cut(file: Path, place: float) -> None:
    file.write_bytes(file.read_bytes()[: int(place * file.stat().st_size)])


def test_every_damage_is_detected_and_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2)
    shutil.copytree(folder / "2", tmp_path / "whole")
    for name, what, damage in damages():
        shutil.rmtree(folder / "2")
        shutil.copytree(tmp_path / "whole", folder / "2")
        damage(folder / "2" / name)
        with pytest.raises(ValueError, match=rf"checkpoint .*2 is damaged: {name} {what}$"):
            verify(folder / "2")
        with pytest.warns(UserWarning, match=rf"{name} {what}; an older checkpoint is used, if there is one"):
            assert chosen(tmp_path) == ("1", [0, "evaluate"])


NESTED = b'{"run.json": ' * 900 + b"1" + b"}" * 900


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"a": 1}', b"\xff\xfe", b"[" * 100_000, NESTED],
    ids=["empty", "cut", "list", "null", "other", "binary", "deep", "deep mapping"],
)
def test_a_damaged_manifest(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path, 2)
    (folder / "2" / MANIFEST).write_bytes(content)
    with pytest.warns(UserWarning, match=rf"checkpoint .*2 is damaged: .*{MANIFEST}"):
        assert chosen(tmp_path) == ("1", [0, "evaluate"])


def test_a_manifest_that_is_cut_or_has_a_flipped_bit(tmp_path: Path) -> None:
    """A flipped bit either makes it invalid or names a file that does not exist."""
    folder = saved(tmp_path, 1)
    manifest = folder / "1" / MANIFEST
    whole = manifest.read_bytes()
    rng = random.Random(1)
    for _ in range(60):
        manifest.write_bytes(whole)
        flip(manifest, rng.random(), rng.randrange(8)) if rng.random() < 0.5 else cut(manifest, rng.random())
        if json_or_none(manifest) != json.loads(whole):
            with pytest.raises(ValueError, match=r"checkpoint .*1 is damaged: "):
                verify(folder / "1")


def json_or_none(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", "{", "[" * 100_000], ids=["list", "null", "3", "cut", "deep"]
)
def test_an_invalid_orchestrators_part_with_a_matching_manifest(tmp_path: Path, content: str) -> None:
    folder = saved(tmp_path, 2)
    rewritten(folder / "2", content)
    with pytest.warns(UserWarning, match=rf"checkpoint .*2 is damaged: {RUN} "):
        assert chosen(tmp_path) == ("1", [0, "evaluate"])


def test_a_checkpoint_of_another_format(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    rewritten(folder / "1", '{"format": 2}')
    with pytest.raises(ValueError, match=r"checkpoint .*1 has format 2, this version reads 1"):
        Checkpoints(tmp_path).newest()


def rewritten(path: Path, content: str) -> None:
    """Replace the orchestrator's part and update the manifest."""
    (path / RUN).write_text(content)
    listed = json.loads((path / MANIFEST).read_text())
    listed[RUN] = {"bytes": len(content), "sha256": sha256(content.encode()).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(listed))


def test_no_complete_checkpoint_is_left(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2)
    (folder / "1" / MANIFEST).unlink()
    (folder / "2" / "weights.bin").unlink()
    with pytest.warns(UserWarning, match=r"weights\.bin is missing"):
        assert chosen(tmp_path) is None
    files = Checkpoints(tmp_path)
    files.clear()
    assert not list(folder.iterdir())
    files.save(write, {"done": 1})
    files.close()
    assert chosen(tmp_path) == ("1", 1)


def test_clear_removes_newer_and_incomplete_checkpoints(tmp_path: Path) -> None:
    folder = saved(tmp_path, 4, keep=3)
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    files = Checkpoints(tmp_path)
    files.clear(folder / "3")
    assert {path.name for path in folder.iterdir()} == {"2", "3"}
    files.save(write, {"done": 4})
    files.close()
    assert chosen(tmp_path) == ("4", 4)


@pytest.mark.parametrize("name", ["7", "007", "²", "\N{ARABIC-INDIC DIGIT SEVEN}", ".DS_Store", "notes.txt"])
@pytest.mark.parametrize("file_type", ["file", "folder", "link"])
def test_foreign_files_among_the_checkpoints(tmp_path: Path, name: str, file_type: str) -> None:
    """They are not used and do not interfere; files without a number and targets of links are kept."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run_dir.mkdir()
    elsewhere.mkdir()
    (elsewhere / MANIFEST).write_text("years of work")
    folder = saved(run_dir, 1)
    if file_type == "file":
        (folder / name).write_text("x")
    elif file_type == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(elsewhere)
    files = Checkpoints(run_dir, keep=1)
    checkpoint = files.newest()
    assert checkpoint is not None
    assert checkpoint.path.name == "1"
    files.clear(checkpoint.path)
    for k in (2, 3):
        files.save(write, {"done": k})
    files.close()
    assert chosen(run_dir) == ("3", 3)
    assert os.path.lexists(folder / name) == (name not in ("7", "007"))
    assert (elsewhere / MANIFEST).read_text() == "years of work"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "disk", kibibytes=64) as disk:
        yield disk


def test_a_full_disk(small_disk: Path) -> None:
    """Each checkpoint takes 5.3 kB in at least four blocks, so the disk is full before the tenth."""
    files = Checkpoints(small_disk, keep=100)
    done = 0
    with pytest.raises(OSError, match="No space left on device"):  # noqa: PT012 - at which one depends on blocks
        for done in range(1, 100):
            files.save(write, {"done": done})
            files.wait()
    files.close()
    assert 1 < done < 10
    assert chosen(small_disk) == (str(done - 1), done - 1)
    for number in range(1, done):
        assert verify(files.directory / str(number))["done"] == number
    again = Checkpoints(small_disk, keep=1)
    again.clear(files.directory / "1")
    again.save(write, {"done": 2})  # there is room again
    again.close()
    assert chosen(small_disk) == ("2", 2)


def test_a_read_only_disk(small_disk: Path) -> None:
    saved(small_disk, 2)
    with disks.write_protected(small_disk):
        assert chosen(small_disk) == ("2", [1, "evaluate"])
        files = Checkpoints(small_disk)
        with pytest.raises(OSError, match="Read-only file system"):
            files.save(write, {"done": 3})
        files.close()
        assert chosen(small_disk) == ("2", [1, "evaluate"])
