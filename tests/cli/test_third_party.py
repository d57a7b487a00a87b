"""Methods of installed packages under a short name, by their entry points, in both modes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra.core.config_store import ConfigStore

from sequel_core.cli import main
from sequel_core.experiment.compose import compose
from sequel_core.experiment.json_schema import json_schema
from sequel_core.experiment.schema import choices, settings
from sequel_core.runs.results import load_result
from tests.cli.conftest import Plugin
from tests.pages import ROOT, code_blocks, run_block

FIXTURES = Path(__file__).parent / "fixtures" / "third_party"
POINTS = {
    "sequel.algorithms": "settings:MagnitudeHParams",
    "sequel.algorithms.pytorch": "lightning:Magnitude",
    "sequel.algorithms.jax": "flax:magnitude",
}
PAGE = ROOT / "docs" / "guides" / "user-code.md"
BOTH = pytest.mark.parametrize("mode", ["pytorch", "jax"])
SMALL = ["benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.subset=60", "backbone.widths=[8]"]
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that installs the package into a folder on the path, with these entry points."""
    groups = ConfigStore.instance().repo
    monkeypatch.setitem(groups, "algo", dict(groups.get("algo", {})))

    def put(
        name: str = "magnitude", points: dict[str, str] = POINTS, package: str = "sequel-magnitude"
    ) -> Path:
        site = tmp_path / package
        shutil.copytree(FIXTURES, site)
        info = site / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        groups = [f"[{group}]\n{name} = sequel_magnitude.{value}\n" for group, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(groups))
        monkeypatch.syspath_prepend(site)
        for module in [key for key in sys.modules if key.partition(".")[0] == "sequel_magnitude"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.chdir(tmp_path)
        return site

    return put


def weights(run_dir: str) -> dict[str, np.ndarray]:
    with np.load(Path(run_dir) / "weights.npz") as arrays:
        return dict(arrays)


def test_a_run_by_name_gives_the_same_numbers_in_both_modes(install: Install) -> None:
    install()
    line = ["algo=magnitude", "algo.strength=50", *SMALL, "optimizer.lr=0.1", "training.dtype=float64", "-q"]
    for mode in ("pytorch", "jax"):
        assert main(["run", *line, f"mode={mode}", f"run_dir={mode}"]) == 0
    assert main(["run", *line, "algo.strength=0", "run_dir=zero"]) == 0
    assert main(["run", *line[2:], "algo=naive", "run_dir=naive"]) == 0
    torch, flax, zero, naive = map(weights, ("pytorch", "jax", "zero", "naive"))
    for path, array in torch.items():
        np.testing.assert_allclose(array, flax[path], rtol=1e-10, err_msg=path)
        np.testing.assert_array_equal(zero[path], naive[path])
        assert np.linalg.norm(array - naive[path]) > 1e-3 * np.linalg.norm(naive[path])
    assert load_result("jax").config["algo"] == {
        "name": "magnitude",
        "consolidate": "last",
        "lr_decay": 1.0,
        "min_lr": 0.0,
        "reset_optimizer": True,
        "strength": 50.0,
        "task_given": False,
    }


@BOTH
def test_a_run_is_resumed_from_its_configuration(install: Install, mode: str) -> None:
    install()
    line = ["algo=magnitude", *SMALL, f"mode={mode}", "checkpoint.every_n_steps=3", "-q"]
    assert main(["run", *line, "run_dir=straight"]) == 0
    shutil.copytree("straight", "cut")
    for name in ("summary.json", "weights.npz"):
        (Path("cut") / name).unlink()
    numbers = sorted((int(path.name) for path in Path("cut/checkpoints").iterdir()), reverse=True)
    shutil.rmtree(f"cut/checkpoints/{numbers[0]}")
    assert main(["run", "resume=cut", "-q"]) == 0
    for path, array in weights("straight").items():
        np.testing.assert_array_equal(weights("cut")[path], array)


def test_lightnings_checkpoint_is_read_with_the_settings_of_the_package(install: Install) -> None:
    install()
    assert main(["run", "algo=magnitude", "algo.strength=3", *SMALL, "-q", "run_dir=run"]) == 0
    import torch
    from sequel_magnitude.lightning import Magnitude  # type: ignore[import-not-found, unused-ignore]

    from sequel_benchmarks import RotatedDigits
    from sequel_lightning import MLP

    newest = max(Path("run/checkpoints").iterdir(), key=lambda path: int(path.name))
    digits = RotatedDigits(num_tasks=2, subset=60)
    net = MLP((8,), digits.num_classes, image_shape=digits.image_shape)
    module = Magnitude.load_from_checkpoint(
        newest / "lightning.ckpt", weights_only=True, net=net, optimizer=torch.optim.SGD, spec=digits.spec
    )
    assert module.algorithm_hparams.strength == 3
    np.testing.assert_array_equal(net.head.weight.detach().numpy().T, weights("run")["head/kernel"])


def test_learners_made_in_python_find_the_implementation(install: Install) -> None:
    install()
    import optax
    from sequel_magnitude.settings import MagnitudeHParams  # type: ignore[import-not-found, unused-ignore]

    from sequel_benchmarks import RotatedDigits
    from sequel_flax import MLP, make_learner
    from tests.examples.user_methods import MagnitudeHParams as Other

    digits = RotatedDigits(num_tasks=2, subset=60)
    made = make_learner(MagnitudeHParams(), MLP((8,), 10), optax.sgd(0.1), digits)
    assert made.hparams.name == "magnitude"
    with pytest.raises(ValueError, match="implementation is needed for magnitude, which is not built in"):
        make_learner(Other(), MLP((8,), 10), optax.sgd(0.1), digits)


def test_the_lists_the_schema_and_the_messages_name_it(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    assert choices("algo")[-1] == "magnitude"
    assert [spec.key for spec in settings("algo", "magnitude")][-1] == "strength"
    assert main(["list", "algo"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "algo=magnitude Importances are the squares of the weights." in text
    assert "(package sequel-magnitude 1.2; mode=pytorch or jax)" in text
    assert "algo.strength │ 1.0 │ >= 0 │ factor of the penalty" in text
    options = json_schema()["properties"]["algo"]["anyOf"]
    assert "magnitude" in options[0]["enum"]
    for line, message in (
        (["algo=magnitud"], "got 'magnitud'; did you mean magnitude?"),
        (["algo=magnitude", "algo.strenth=1"], "did you mean algo.strength (>= 0)?"),
        (["algo=magnitude", "algo.strength=-1"], "algo.strength must be >= 0, got -1.0"),
    ):
        assert main(["run", *line, "--cfg"]) == 2
        assert message in capsys.readouterr().err


def test_comparisons_and_sweeps(install: Install, numpy_plugin: Plugin) -> None:
    install()
    assert main(["compare", "algo=naive,magnitude", *SMALL, "mode=jax", "-q", "run_dir=compared"]) == 0
    assert main(["run", "-m", "algo=magnitude", "algo.strength=0,1", *SMALL, "-q", "run_dir=swept"]) == 0
    names = [config.algo.name for config in numpy_plugin.built]
    assert names == ["naive", "magnitude", "magnitude", "magnitude"]
    assert [vars(config.algo)["strength"] for config in numpy_plugin.built[2:]] == [0, 1]
    rows = Path("swept/sweep.csv").read_text().splitlines()
    assert [row.rpartition(",")[2] for row in rows[1:]] == ["finished"] * 2


def test_a_file_names_it(install: Install, tmp_path: Path) -> None:
    install()
    (tmp_path / "own.yaml").write_text("algo: {name: magnitude, strength: 2}\n")
    config, notes = compose(["own.yaml"])
    assert (config.algo.name, vars(config.algo)["strength"], notes) == ("magnitude", 2, [])
    config, notes = compose(["own.yaml", "algo=ewc"])
    assert notes == ["algo=ewc in place of magnitude: dropped the file's algo.strength"]


@pytest.mark.parametrize(("mode", "other"), [("pytorch", "jax"), ("jax", "pytorch")])
def test_a_method_for_one_framework(
    install: Install, mode: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    install(points={k: v for k, v in POINTS.items() if not k.endswith(other)})
    assert main(["run", "algo=magnitude", *SMALL, f"mode={mode}", "-q"]) == 0
    assert main(["run", "algo=magnitude", *SMALL, f"mode={other}", "-q"]) == 2
    assert capsys.readouterr().err == (
        f"sequel: algo=magnitude has no implementation for mode={other}: the package sequel-magnitude 1.2 "
        f"has no entry point in sequel.algorithms.{other}; set mode={mode}\n"
    )


@pytest.mark.parametrize(
    ("name", "points", "message"),
    [
        (
            "ewc",
            POINTS,
            "the method ewc of the package sequel-magnitude 1.2 has the name of a built-in method",
        ),
        ("der++", POINTS, r"the method der\+\+ of the package .* has the name of a built-in method; rename"),
        ("Magnitude", POINTS, "must be an identifier in lower case, got 'Magnitude' of the package"),
        (
            "other",
            POINTS,
            "must be a subclass of AlgorithmHParams whose name is 'other', got sequel_magnitude",
        ),
        (
            "magnitude",
            POINTS | {"sequel.algorithms": "settings:Nothing"},
            "cannot be loaded: importing sequel_magnitude.settings:Nothing failed with AttributeError",
        ),
    ],
    ids=["built in", "spelling", "upper case", "other name", "no such class"],
)
def test_packages_that_do_not_fit(install: Install, name: str, points: dict[str, str], message: str) -> None:
    install(name, points)
    with pytest.raises(ValueError, match=message):
        compose([f"algo={name}"])


def test_two_packages_with_the_same_name(install: Install) -> None:
    install()
    install(points=POINTS | {"sequel.algorithms": "lightning:Magnitude"}, package="sequel-other")
    with pytest.raises(
        ValueError, match=r"must have one method magnitude, got .*; uninstall one of the pack"
    ):
        compose(["algo=magnitude"])


def test_the_entry_points_of_the_page() -> None:
    (block,) = code_blocks(PAGE, "toml")
    groups = tomllib.loads(block)["project"]["entry-points"]
    assert groups == {group: {"magnitude": f"sequel_magnitude.{value}"} for group, value in POINTS.items()}


@pytest.mark.slow
def test_the_tests_of_the_page(install: Install, tmp_path: Path) -> None:
    install()
    names = run_block(PAGE, code_blocks(PAGE, "python")[-1])
    names["test_both_frameworks_end_with_the_same_weights"]()
    names["test_the_penalty_changes_the_weights_and_is_naive_finetuning_at_zero"]()
    names["test_frozen_parameters_and_resumed_runs"](tmp_path)


def test_nothing_of_a_package_is_imported_before_it_is_chosen(install: Install) -> None:
    site = install()
    code = (
        "import sys, sequel_core\n"
        "assert 'importlib.metadata' not in sys.modules and 'sequel_core.entry_points' not in sys.modules\n"
        "from sequel_core.experiment.compose import compose\n"
        "compose(['algo=ewc'])\n"
        "assert not any(name.startswith('sequel_magnitude') for name in sys.modules)\n"
        "compose(['algo=magnitude'])\n"
        "assert 'sequel_magnitude.settings' in sys.modules\n"
        "assert not {'torch', 'jax', 'sequel_magnitude.flax'} & sys.modules.keys()\n"
    )
    path = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    child = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
