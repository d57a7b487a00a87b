"""Fuzzed experiment files and command lines."""

import random
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sequel_core.experiment.aliases import SECTIONS
from sequel_core.experiment.schema import choices, settings
from tests.hostile.fuzzing import Dumper, Sandbox, altered, hostile, inputs, mutated

ROOT = Path(__file__).parents[2]
FILES = [
    *sorted((ROOT / "configs" / "experiment").glob("*.yaml")),
    *sorted((ROOT / "tests" / "cli" / "fixtures").glob("*.yaml")),  # the files of the paper
]
LINES = (
    "algo=er", "algo=mcsgd", "algo=kcl", "algo.task_given=true", "mode=jax", "seed=3", "optimizer=adam",
    "backbone=cnn",
    "backbone.widths=[8,8]", "algo.lr_decay=0.5", "optimizer.lr_decay=0.5", "training.epochs_per_task=[1,2]",
    "training.batch_size=7", "benchmark=splitdigits", "benchmark.class_order=[1,0]", "logger=[csv,jsonl]",
    "logger=null", "wandb.tags=[a]", "callbacks._target_=collections.OrderedDict", "trainer.devices=2",
    "evaluate_on=validation", "evaluate_every=10", "expected.avg_acc=3", "+experiment=naive_rotateddigits",
    "comment=x", "training={batch_size: 3}", "algo={name: si}", "checkpoint.keep=0", "resume=auto",
    "resume=nowhere", "checkpoint={every_minutes: 1}", "seed=range(3)", "algo=naive,er", "data_dir=x",
    "seed=range(1000000000)", "seed=shuffle(range(1000000000))", "optimizer.lr=range(0,1,0)",
    "training.seed=range(999)", "optimizer.lr=range(0.1,99,0.1)",
)  # fmt: skip


@inputs(quick=60)
def test_changed_bytes_of_a_file(sandbox: Sandbox, seeds: range) -> None:
    file = sandbox.given / "experiment.yaml"

    def prepare(rng: random.Random) -> list[str]:
        file.write_bytes(mutated(rng.choice(FILES).read_bytes(), rng))
        return ["run", str(file), rng.choice(("--cfg", "--check"))]

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))


@inputs(quick=60)
def test_changed_values_of_a_file(sandbox: Sandbox, seeds: range) -> None:
    file = sandbox.given / "experiment.yaml"
    shipped = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES]

    def prepare(rng: random.Random) -> list[str]:
        file.write_text(yaml.dump(altered(rng.choice(shipped), rng), Dumper=Dumper), encoding="utf-8")
        line = rng.sample(LINES, rng.choice((0, 0, 1)))
        return ["run", str(file), *line, rng.choice(("--cfg", "--check", "--check"))]

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))


@inputs(quick=60)
def test_changed_bytes_of_a_command_line(sandbox: Sandbox, seeds: range) -> None:
    def prepare(rng: random.Random) -> list[str]:
        line = []
        for text in rng.sample(LINES, rng.randint(1, 4)):
            if rng.random() < 0.3:
                text = f"{text.partition('=')[0]}={hostile(rng)}"
            elif rng.random() < 0.6:
                text = mutated(text.encode(), rng).decode(errors="surrogateescape").replace("\0", "")
            line.append(text)
        return ["run", *line, rng.choice(("--cfg", "--check")), *rng.choice(([], ["-m"]))]

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300) | st.integers(),
    st.floats(-2, 2) | st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(-1, 99), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.sampled_from(["${seed}", "${algo.name}", "${nothing}", "1e-3", "x" * 300]),
)


def section(name: str) -> st.SearchStrategy[Any]:
    """Generate settings of a section; some keys belong to other sections and some values are invalid."""

    def values(choice: str) -> st.SearchStrategy[dict[str, Any]]:
        keys = [spec.key for spec in settings(name, choice)] + ["width", "data_dir", "_target_"]
        named = {} if not choice else {SECTIONS[name]: st.just(choice)}
        others = st.dictionaries(st.sampled_from(keys), JUNK, max_size=3)
        return st.builds(lambda name, other: {**other, **name}, st.fixed_dictionaries(named), others)

    return st.sampled_from(choices(name)).flatmap(values) if name in SECTIONS else values("")


WHOLE = st.fixed_dictionaries(
    {},
    optional={
        **{name: section(name) | JUNK for name in (*SECTIONS, "training", "checkpoint", "trainer", "jax")},
        **dict.fromkeys(("mode", "seed", "logger", "callbacks", "wandb", "expected", "evaluate_on"), JUNK),
        "evaluate_every": JUNK,
        "source": JUNK,
    },
)


@inputs(quick=60)
def test_arbitrary_settings(sandbox: Sandbox, seeds: range) -> None:
    file = sandbox.given / "experiment.yaml"

    @hypothesis_settings(max_examples=len(seeds))
    @given(WHOLE)
    def check(values: dict[str, Any]) -> None:
        file.write_text(yaml.dump(values, Dumper=Dumper, allow_unicode=True), encoding="utf-8")
        sandbox.run(["run", str(file), "--check"])

    check()
