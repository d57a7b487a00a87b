"""Files and command lines of settings that nobody should write."""

import random
from pathlib import Path

import yaml

from tests.hostile.fuzzing import Dumper, Sandbox, altered, hostile, inputs, mutated

ROOT = Path(__file__).parents[2]
FILES = [
    *sorted((ROOT / "configs" / "experiment").glob("*.yaml")),
    *sorted((ROOT / "tests" / "cli" / "fixtures").glob("*.yaml")),  # the paper's own
]
LINES = (
    "algo=er", "algo=mcsgd", "algo=kcl", "mode=jax", "seed=3", "optimizer=adam", "backbone=cnn",
    "backbone.widths=[8,8]", "algo.lr_decay=0.5", "optimizer.lr_decay=0.5", "training.epochs_per_task=[1,2]",
    "training.batch_size=7", "benchmark=splitdigits", "benchmark.class_order=[1,0]", "logger=[csv,jsonl]",
    "logger=null", "wandb.tags=[a]", "callbacks._target_=collections.OrderedDict", "trainer.devices=2",
    "evaluate_on=validation", "evaluate_every=10", "expected.avg_acc=3", "+experiment=naive_rotateddigits",
    "comment=x", "training={batch_size: 3}", "algo={name: si}", "checkpoint.keep=0", "resume=auto",
    "resume=nowhere", "checkpoint={every_minutes: 1}", "seed=range(3)", "algo=naive,er", "data_dir=x",
)  # fmt: skip


@inputs(quick=100)
def test_bytes_of_a_file(sandbox: Sandbox, seeds: range) -> None:
    file = sandbox.given / "experiment.yaml"

    def prepare(rng: random.Random) -> list[str]:
        file.write_bytes(mutated(rng.choice(FILES).read_bytes(), rng))
        return ["run", str(file), rng.choice(("--cfg", "--check"))]

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))


@inputs(quick=100)
def test_values_of_a_file(sandbox: Sandbox, seeds: range) -> None:
    file = sandbox.given / "experiment.yaml"
    shipped = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES]

    def prepare(rng: random.Random) -> list[str]:
        file.write_text(yaml.dump(altered(rng.choice(shipped), rng), Dumper=Dumper), encoding="utf-8")
        line = rng.sample(LINES, rng.choice((0, 0, 1)))
        return ["run", str(file), *line, rng.choice(("--cfg", "--check", "--check"))]

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))


@inputs(quick=100)
def test_bytes_of_a_command_line(sandbox: Sandbox, seeds: range) -> None:
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
