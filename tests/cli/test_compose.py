"""Files, shipped experiments and overrides are composed into one validated configuration."""

from contextlib import suppress
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequel_core.algorithms import ALGORITHMS
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.backbones import MLPHParams
from sequel_core.experiment.aliases import SECTIONS, flatten, nest
from sequel_core.experiment.compose import compose
from sequel_core.experiment.overrides import experiments, request
from sequel_core.experiment.schema import EVALUATION, ExperimentConfig, choices, settings
from sequel_core.hparams import OptimizerHParams, TrainingHParams

FIXTURES = Path(__file__).parent / "fixtures"
CODE2, CODE3, CODE4 = (
    str(FIXTURES / name) for name in ("code2_ewc.yaml", "code3_mcsgd.yaml", "code4_lamaml.yaml")
)


def test_code_2_of_the_paper() -> None:
    config, notes = compose([CODE2])
    assert notes == []
    assert config.mode == "pytorch"
    assert config.algo == EWCHParams(ewc_lambda=1.0, lr_decay=0.8)
    assert config.benchmark == ("rotatedmnist", {"num_tasks": 20, "per_task_rotation": 9})
    assert config.backbone == MLPHParams(widths=(256, 256), dropout=0.2)
    assert config.num_classes == 10
    assert config.optimizer == OptimizerHParams(type="sgd", lr=0.01)
    assert config.training == TrainingHParams(batch_size=10, epochs_per_task=1)
    unset = dict.fromkeys(("group", "name", "tags", "mode"))
    assert config.logger == {"wandb": {"entity": "ENTITY", "project": "PROJECT", **unset}}
    assert config.version == "0.0.1"
    assert compose([CODE2, "mode=jax"]).config.mode == "jax"


def test_code_3_of_the_paper() -> None:
    config, notes = compose([CODE3])
    assert notes == []
    assert config.mode == "pytorch"
    assert config.algo == MCSGDHParams(
        per_task_memory_samples=100,
        lmc_policy="offline",
        lmc_interpolation="linear",
        lmc_lr=0.05,
        lmc_momentum=0.8,
        lmc_batch_size=64,
        lmc_init_position=0.1,
        lmc_line_samples=10,
        lmc_epochs=1,
        lr_decay=0.8,
    )
    assert config.backbone == MLPHParams(widths=(256, 256), dropout=0.2)
    assert config.optimizer == OptimizerHParams(lr=0.1, momentum=0.8)
    assert config.training == TrainingHParams(batch_size=64, eval_batch_size=1024)
    assert config.expected == {"avg_acc": 82.3}


def test_code_4_of_the_paper() -> None:
    config, notes = compose([CODE4])
    assert notes == []
    assert config.algo == LaMAMLHParams(
        glances=5,
        n_inner_updates=5,
        second_order=False,
        grad_clip_norm=2.0,
        learn_lr=True,
        lr_alpha=0.3,
        sync_update=False,
        mem_size=200,
    )
    assert config.expected == {"avg_acc": 77.42}


@pytest.mark.parametrize(
    ("name", "file"), [("mcsgd_rotatedmnist", CODE3), ("lamaml_rotatedmnist", CODE4)], ids=["3", "4"]
)
def test_shipped_experiments_equal_the_files_of_the_paper(name: str, file: str) -> None:
    ours, theirs = (flatten(compose([text]).config.plain()) for text in (f"+experiment={name}", file))
    documents = ("expected", "source", "comment", "version")
    differ = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert {key.partition(".")[0] for key in differ} <= {*documents}


def test_another_method_keeps_the_other_settings_of_code_3() -> None:
    config, notes = compose([CODE3, "algo=naive"])
    assert config.algo == NaiveHParams(lr_decay=0.8)
    assert config.optimizer == OptimizerHParams(lr=0.1, momentum=0.8)
    assert config.training == TrainingHParams(batch_size=64, eval_batch_size=1024)
    assert config.source == "mcsgd paper"
    assert config.expected == {}  # of another method
    (note,) = notes
    assert note.startswith("algo=naive in place of mcsgd: dropped the file's algo.per_task_memory_samples, ")
    assert note.endswith("expected.avg_acc")


def test_another_method_keeps_the_other_settings_of_code_4() -> None:
    config, _ = compose([CODE4, "algo=ewc"])
    assert config.backbone == MLPHParams(widths=(100, 100))
    assert config.benchmark.arguments == {"per_task_rotation": 9, "num_tasks": 20, "subset": 1000}
    assert config.training == TrainingHParams(eval_batch_size=10000, epochs_per_task=1)


def test_the_command_line_overrides_the_file_and_the_file_overrides_the_groups() -> None:
    line = [CODE3, "algo=naive", "benchmark.batch_size=32", "optimizer.lr=0.5", "backbone.width=64"]
    config = compose(line).config
    assert (config.training.batch_size, config.training.eval_batch_size) == (32, 1024)
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.5, 0.8)
    assert config.backbone == MLPHParams(widths=(64, 64), dropout=0.2)
    assert compose([CODE2, "training.batch_size=7"]).config.training.batch_size == 7
    assert compose([CODE2, "optimizer.lr=1", "optimizer.lr=2"]).config.optimizer.lr == 2


@pytest.mark.parametrize(
    ("line", "same"),
    [
        (["mode=lightning"], ["mode=pytorch"]),
        (["mode=torch"], ["mode=pytorch"]),
        (["mode=flax"], ["mode=jax"]),
        (["seed=3"], ["training.seed=3"]),
        (["training.epoch_per_task=3"], ["training.epochs_per_task=3"]),
        (["optimizer.lr_decay=0.5"], ["algo.lr_decay=0.5"]),
        (["optimizer.lr_decay=0.5", "algo.lr_decay=0.5"], ["algo.lr_decay=0.5"]),
        (["optimizer.learning_rate=0.5"], ["optimizer.lr=0.5"]),
        (["benchmark.batch_size=5"], ["training.batch_size=5"]),
        (["benchmark.eval_batch_size=5"], ["training.eval_batch_size=5"]),
        (["algo.name=EWC"], ["algo=ewc"]),
        (["optimizer.type=adam"], ["optimizer=adam"]),
        (["algo=der++"], ["algo=derpp"]),
        (["algo=stablesgd"], ["algo=stable_sgd"]),
        (["algo=er", "algo.memory_size=50"], ["algo=er", "algo.mem_size=50"]),
        (
            ["algo={name: agem, per_task_memory_samples: 250, memory_batch_size: 9, memory_group_by: task}"],
            ["algo={name: agem, per_task_memory_samples: 250, mem_batch_size: 9, memory: task_quota}"],
        ),
        (["algo=er", "algo.memory_group_by=class"], ["algo=er", "algo.memory=class_quota"]),
        (["algo=agem", "algo.memory=uniform"], ["algo=agem", "algo.memory=task_quota"]),
        (["+optimizer.weight_decay=0.1"], ["++optimizer.weight_decay=0.1"]),
        (["algo={name: ewc, ewc_lambda: 2}"], ["algo=ewc", "algo.ewc_lambda=2"]),
        (["backbone.n_hidden_layers=3", "backbone.width=8"], ["backbone.widths=[8,8,8]"]),
        (["backbone.n_hidden_layers=3"], ["backbone.widths=[256,256,256]"]),
        (["backbone.width=8"], ["backbone.widths=[8,8]"]),
        (
            ["backbone.widths=[8,8]", "backbone.width=8", "backbone.n_hidden_layers=2"],
            ["backbone.widths=[8,8]"],
        ),
        (["seed=4", "benchmark.seed=${seed}"], ["seed=4", "benchmark.seed=4"]),
        (["wandb.project=a", "wandb=null"], []),
        (["experiment=ewc_rotatedmnist"], ["+experiment=ewc_rotatedmnist"]),
        (["hydra.verbose=true"], []),
    ],
)
def test_spellings(line: list[str], same: list[str]) -> None:
    assert compose(line) == compose(same)


def test_a_composed_configuration_can_be_composed_again(tmp_path: Path) -> None:
    import yaml

    line = [
        CODE2,
        "optimizer=adam",
        "evaluate_every=30",
        "training.epochs_per_task=[1,2]",
        "trainer.devices=2",
    ]
    config = compose(line).config
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(config.plain()))
    again = compose([str(file)]).config
    assert again.plain() == config.plain()
    assert again.training.epochs_per_task == (1, 2)
    assert again.trainer == {"devices": 2}


def test_every_choice_has_a_group_file_and_every_default_is_valid() -> None:
    for section in SECTIONS:
        for name in choices(section):
            compose([f"{section}={name}"])
    assert compose([]).config.plain() == ExperimentConfig().plain()


@pytest.mark.parametrize("name", experiments())
def test_shipped_experiments_compose_and_are_named_after_method_and_benchmark(name: str) -> None:
    config, notes = compose([f"+experiment={name}"])
    assert name == f"{config.algo.name}_{config.benchmark.name}"
    assert notes == []
    assert compose([f"experiment={name}", "mode=jax"]).config.mode == "jax"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("naive_rotatedmnist", 46.3),
        ("ewc_rotatedmnist", 48.5),
        ("er_rotatedmnist", 69.2),
        ("stable_sgd_rotatedmnist", 70.8),
    ],
)
def test_published_numbers(name: str, expected: float) -> None:
    assert compose([f"+experiment={name}"]).config.expected["avg_acc"] == expected


@pytest.mark.parametrize("name", experiments())
def test_a_shipped_experiment_has_a_source(name: str) -> None:
    text = resources.files("sequel_configs").joinpath("experiment", f"{name}.yaml").read_text()
    for word in ("Paper: ", f"Command: sequel run +experiment={name}\n", "Running time: ", "Expected: "):
        assert f"\n# {word}" in text
    assert "@" not in text.removeprefix("# @package _global_")


ALGOS = ", ".join(ALGORITHMS)
BAD = [
    ([CODE3, "algo.lmc_line_samples=1"], "algo.lmc_line_samples must be >= 2 and <= 1000, got 1"),
    ([CODE3, "algo.lmc_policy=on"], "algo.lmc_policy must be one of offline, online, got 'on'"),
    ([CODE3, "algo.lmc_interpolation=bezier"], "algo.lmc_interpolation must be one of linear, got 'bezier'"),
    ([CODE4, "algo.alpha_init=0"], "algo.alpha_init must be > 0, got 0.0"),
    ([CODE4, "algo.second_oder=true"], "algo.second_oder is not a setting of lamaml; did you mean "
     "algo.second_order"),
    (["algo=ewcc"], f"algo must be one of {ALGOS}, got 'ewcc'; did you mean ewc?"),
    (["algo=si", "algo.xi=0"], "algo.xi must be > 0, got 0.0"),
    (["algo=der", "algo.alpha=-1"], "algo.alpha must be >= 0, got -1.0"),
    (["algo=derpp", "algo.beta=-0.5"], "algo.beta must be >= 0, got -0.5"),
    (["algo=er", "algo.mem_size=2.5"], "algo.mem_size must be a whole number >= 0, got 2.5"),
    (["algo=agem", "algo.memory=reservoir"],
     "algo.memory must be one of ring, task_quota, class_quota, got 'reservoir'"),
    (["algo=er", "algo.mem_sise=3"],
     "algo.mem_sise is not a setting of er; did you mean algo.mem_size (>= 0)?"),
    (["algo=ewc", "algo.mem_size=3"],
     "algo.mem_size is not a setting of ewc; it belongs to agem, gem, er, er_ace, mir, der, derpp"),
    (["mode=jaxx"], "mode must be one of pytorch, jax, got 'jaxx'; did you mean jax?"),
    (
        ["algo=ewc", "algo.ewc_lamda=1"],
        "algo.ewc_lamda is not a setting of ewc; did you mean algo.ewc_lambda (>= 0)?",
    ),
    (["algo=ewc", "algo.ewc_lambda=-1"], "algo.ewc_lambda must be >= 0, got -1.0"),
    (["algo=ewc", "algo.ewc_lambda=a"], "algo.ewc_lambda must be a number >= 0, got 'a'"),
    (["algo.ewc_lambda=1"], "algo.ewc_lambda is not a setting of naive; it belongs to ewc"),
    (["ewc_lambda=1"], "ewc_lambda is not a setting; did you mean algo.ewc_lambda?"),
    (["optimiser.lr=1"], "optimiser is not a setting; did you mean optimizer?"),
    (["optimizer.beta1=0.5"], "optimizer.beta1 is not a setting of sgd; it belongs to adam, adamw"),
    (["optimizer.lr=-0.1"], "optimizer.lr must be >= 0, got -0.1"),
    (["optimizer.nesterov=true"], "optimizer.nesterov needs momentum > 0, got momentum=0.0"),
    (["training.batch_size=0"], "training.batch_size must be >= 1, got 0"),
    (["training.batch_sise=1"], "training.batch_sise is not a setting of training; "
     "did you mean training.batch_size (>= 1)?"),
    (["training=5"], "training must be a group of settings, got 5"),
    (["backbone.width=0"], "backbone.width must be >= 1 and <= 100000, got 0"),
    (
        ["backbone.width=8", f"backbone.n_hidden_layers={10**30}"],
        "backbone.n_hidden_layers must be >= 1 and <= 1000, got 1000",
    ),
    (["backbone.widths=1", "backbone.n_hidden_layers=2"], "backbone.widths must be a list, got 1"),
    (
        ["backbone.widths=[[1],2]", "backbone.n_hidden_layers=2"],
        "backbone.widths must be a whole number >= 1 and <= 100000, got [1]",
    ),
    (["backbone.dropout=1"], "backbone.dropout must be >= 0 and < 1, got 1.0"),
    (
        ["backbone.widths=[8,8]", "backbone.width=9"],
        "backbone.widths and backbone.width differ: [8, 8] and 9; give one of them",
    ),
    (
        ["algo.lr_decay=0.5", "optimizer.lr_decay=0.4"],
        "algo.lr_decay and optimizer.lr_decay differ: 0.5 and 0.4; give one of them",
    ),
    (
        ["benchmark.batch_size=5", "training.batch_size=6"],
        "training.batch_size and benchmark.batch_size differ: 6 and 5; give one of them",
    ),
    (["benchmark=mnist"], "benchmark must be one of splitmnist, permutedmnist, rotatedmnist, splitdigits, "
     "permuteddigits, rotateddigits, splitcifar10, splitcifar100, splittinyimagenet, splitimagefolder, wine, "
     "breastcancer, diabetes, markovchains, got 'mnist'; did you mean splitmnist?"),
    (["benchmark.num_task=3"], "benchmark.num_task is not a setting of rotateddigits; "
     "did you mean benchmark.num_tasks (>= 1 and <= 10000)?"),
    (["benchmark.num_tasks=a"], "benchmark.num_tasks must be a whole number >= 1 and <= 10000, got 'a'"),
    (["benchmark.rotation=fixd"], "benchmark.rotation must be one of fixed, bins, uniform, got 'fixd'; "
     "did you mean fixed?"),
    (["benchmark.angles=3"], "benchmark.angles must be a list, got 3"),
    (["wandb.projekt=a"],
     "logger.wandb.projekt is not a setting of wandb; did you mean logger.wandb.project?"),
    (["wandb.mode=a"], "logger.wandb.mode must be online, offline or disabled, got 'a'"),
    (["mode=jax", "trainer.precision=16"], "trainer.precision is a setting of Lightning's Trainer, got 16 "
     "with mode=jax; leave it out or set mode=pytorch"),
    (["trainer.device=2"], "trainer.device is not a setting of trainer; did you mean trainer.devices (>= -1"),
    (["evaluate_every=0"], "evaluate_every must be >= 1, got 0"),
    (["evaluate_on=train"], "evaluate_on must be one of test, validation, got 'train'"),
    (["evaluate_future=1"], "evaluate_future must be true or false, got 1"),
    (["expected.avg_acc=0.5e3"], "expected.avg_acc must be >= 0 and <= 100, got 500.0"),
    (["algo=naive,ewc"], "algo=naive,ewc has several values; use `sequel run -m` to sweep over them"),
    (["~optimizer.lr"], "~optimizer.lr would delete a setting; give it a value instead, "
     "for example key=null"),
    (["experiment=ewc_rotated"], "experiment must be one of "),
    ([CODE2, CODE3], "give one FILE, got "),
    ([CODE2, "experiment=ewc_rotatedmnist"], "give a FILE or experiment=NAME, got both: "),
    (["file=no.yaml"], "file must be a readable file, got no.yaml (No such file or directory)"),
    (["no.yaml"], "no.yaml is neither a file nor an override such as algo=ewc"),
    (["ewc_rotatedmnist"], "ewc_rotatedmnist is neither a file nor an override such as algo=ewc; "
     "did you mean +experiment=ewc_rotatedmnist?"),
    (["a b=c=}"], "cannot read the override 'a b=c=}': "),
    (["optimizer.lr=${nothing}"], "Interpolation key 'nothing' not found"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"), BAD, ids=[" ".join(Path(text).name for text in line) for line, _ in BAD]
)
def test_an_error_is_one_line(line: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        compose(line)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("algo: [", "is not a YAML file of settings"),
        ("- a\n- b\n", "must hold settings such as `algo:`, got a list"),
        ("run_dir: a\n", "cannot set run_dir; give it on the command line"),
        ("algo:\n  name: ewc\n  name: naive\n", "is not a YAML file of settings"),
        ("algo: 3\n", "algo must be a name or settings with `name`, got 3"),
        ("defaults: [a]\n", "defaults is not a setting"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        compose([str(file)])


def test_a_file_may_be_empty_or_use_short_forms(tmp_path: Path) -> None:
    file = tmp_path / "a file, it's here.yaml"
    file.write_text("")
    assert compose([str(file)]) == compose([])
    file.write_text("algo: ewc\noptimizer: adam\n")
    assert compose([str(file)]) == compose(["algo=ewc", "optimizer=adam"])


KEYS = sorted(
    {
        f"{section}.{spec.key}"
        for section in SECTIONS
        for name in choices(section)
        for spec in settings(section, name)
    }
    | {f"training.{spec.key}" for spec in settings("training")}
    | {
        "mode",
        "seed",
        "algo",
        "benchmark",
        "backbone",
        "optimizer",
        "training",
        "wandb",
        "logger",
        "backbone.width",
        *EVALUATION,
    }
)
VALUES = st.one_of(
    st.integers(-3, 300).map(str),
    st.floats(-2, 2).map(str),
    st.sampled_from(
        ["null", "true", "[1,2]", "{a: 1}", "ewc", "''", "nan", "inf", "${seed}", "1e-3", "adam", "'x y'"]
    ),
    st.text(max_size=6),
)


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "+", "++", "~"]), st.sampled_from(KEYS) | st.text(max_size=8), VALUES)
    )
)
def test_any_overrides_compose_or_raise_a_one_line_error(line: list[tuple[str, str, str]]) -> None:
    with suppress(ValueError):
        config = compose([f"{prefix}{key}={value}" for prefix, key, value in line]).config
        assert config.training.batch_size >= 1


SWEEPS = st.sampled_from(["1,2", "a,b", "choice(1,2)", "range(3)", "glob(*)", "interval(0,1)", "naive,der++"])
PLACES = st.sampled_from(["run_dir", "file", "experiment", "hydra.verbose", "algo@x", "algo.name"])
LINES = st.tuples(st.sampled_from(["", "+", "++"]), st.sampled_from(KEYS) | PLACES, VALUES | SWEEPS)


@given(st.lists(LINES, max_size=4))
def test_any_sweep_is_read_or_raises_a_one_line_error(line: list[tuple[str, str, str]]) -> None:
    with suppress(ValueError):
        asked = request([f"{prefix}{key}={value}" for prefix, key, value in line], sweep=True)
        assert all("=" in text for text in asked.overrides)


@given(
    st.dictionaries(st.from_regex(r"[a-z]{1,3}(\.[a-z]{4,6})?", fullmatch=True), st.integers(), max_size=5)
)
def test_nest_and_flatten_are_inverse(flat: dict[str, int]) -> None:
    tops = {key for key in flat if "." not in key}
    flat = {key: value for key, value in flat.items() if "." not in key or key.partition(".")[0] not in tops}
    assert flatten(nest(flat)) == flat
