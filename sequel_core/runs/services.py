"""Weights & Biases and Comet: credentials, modes, and what must not be sent to them."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MASK = "***"
"""Replaces a secret."""

MODES = {"wandb": ("online", "offline", "disabled"), "comet": ("online", "offline")}
PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}
NO_PATCHES = "COMET_DISABLE_AUTO_LOGGING"
LOGINS = {"wandb": "WANDB_API_KEY or run `wandb login`", "comet": "COMET_API_KEY or run `comet login`"}

_SECRET = re.compile(
    r"(^|_)(api_?key|access_?key|private_?key|token|pass(word|wd|phrase)|secret|credentials?)(_|$)", re.I
)
_LOGIN_IN_ADDRESS = re.compile(r"://[^/@\s]+@")
_MIN_SECRET_LENGTH = 8  # shorter values of the environment occur in ordinary text


def masked(value: Any, key: str = "") -> Any:
    """Return plain values with possible secrets replaced by `***`.

    Three things are replaced: text and integers under a key such as `api_key`, `token` or `password`; the
    values of environment variables with such names, wherever they occur in a text; and the login in a URL.

    Args:
        value: mappings, lists, text, numbers; a value of another type is returned unchanged.
        key: of the value in its mapping.

    Example:
        >>> masked({"api_key": "abc", "url": "https://me:abc@example.org"})
        {'api_key': '***', 'url': 'https://***@example.org'}
    """
    if isinstance(value, Mapping):
        return {k: masked(v, key if _is_secret(key) else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, key) for item in value]
    if _is_secret(key) and isinstance(value, str | int) and not isinstance(value, bool):
        return MASK
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if len(secret) >= _MIN_SECRET_LENGTH and _is_secret(name):
                value = value.replace(secret, MASK)
        return _LOGIN_IN_ADDRESS.sub(f"://{MASK}@", value)
    return value


def _is_secret(key: str) -> bool:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).replace("-", "_")
    return _SECRET.search(words) is not None


def check_service(name: str, settings: Mapping[str, Any]) -> None:
    """Check the settings of the logger `wandb` or `comet`.

    Args:
        name: `"wandb"` or `"comet"`.
        settings: entity or workspace, project, group, name, tags, mode.

    Raises:
        ValueError: a value has the wrong type, the mode is unknown, the package is not installed, or online
            mode has no credentials.
    """
    _check_types(name, settings)
    mode = settings.get("mode")
    if mode not in (None, *MODES[name]):
        *others, last = MODES[name]
        raise ValueError(f"logger.{name}.mode must be {', '.join(others)} or {last}, got {mode!r}")
    if find_spec(PACKAGES[name]) is None:
        raise ValueError(
            f"logger={name} needs the package {PACKAGES[name]}, which is not installed; install it with: "
            f"pip install 'sequel-cl[{name}]'"
        )
    if service_mode(name, settings) == "online" and not _has_credentials(name):
        raise ValueError(
            f"logger.{name}.mode=online needs credentials, got none; set {LOGINS[name]}, or set "
            f"logger.{name}.mode=offline"
        )


def _check_types(name: str, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key == "tags":
            valid = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
            rule = "a list of text such as [a,b]"
        else:
            valid, rule = isinstance(value, str), "text, a number in quotes"
        if value is not None and not valid:
            raise ValueError(f"logger.{name}.{key} must be {rule}, got {value!r}")


def service_mode(name: str, settings: Mapping[str, Any]) -> str:
    """Return the mode of a service; if none is set, online if there are credentials, else offline."""
    mode = settings.get("mode") or (os.environ.get("WANDB_MODE") if name == "wandb" else None)
    return str(mode or ("online" if _has_credentials(name) else "offline"))


def _has_credentials(name: str) -> bool:
    if name == "comet":
        if os.environ.get("COMET_API_KEY"):
            return True
        config = _comet().config
        return config.get_api_key(None, config.get_config()) is not None
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _comet() -> Any:
    """Import Comet's library without letting it patch other libraries, which only this variable prevents."""
    previous = os.environ.get(NO_PATCHES)
    os.environ[NO_PATCHES] = "1"
    try:
        import comet_ml
    finally:
        if previous is None:
            del os.environ[NO_PATCHES]
        else:
            os.environ[NO_PATCHES] = previous
    return comet_ml


def wandb_arguments(settings: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the arguments of `wandb.init` for a run with its files in `<run_dir>/wandb`.

    The command line, the output of the program, its code and its git repository are not sent, because each
    may contain a secret.
    """
    from wandb import Settings

    earlier = sorted((run_dir / "wandb").glob("*run-*-*"))  # there are some if the run is resumed
    return {
        **({"id": earlier[-1].name.rpartition("-")[2], "resume": "allow"} if earlier else {}),
        "dir": os.fspath(run_dir),
        "project": os.environ.get("WANDB_PROJECT", "uncategorized"),
        **{key: value for key, value in settings.items() if value is not None},
        "mode": service_mode("wandb", settings),
        "settings": Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            quiet=True,
            save_code=False,
            x_disable_meta=True,
        ),
    }


def abandon_wandb() -> None:
    """Shut down W&B's service process after it has died; otherwise the next run and the exit would fail."""
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown(exit_code=1)


def comet_experiment(settings: Mapping[str, Any], run_dir: Path) -> Any:
    """Start a Comet experiment; in offline mode its archive is written to `<run_dir>/comet`.

    The command line, the output of the program, its code, its git repository and the machine are not sent,
    because each may contain a secret.
    """
    comet = _comet()
    private = ("log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "parse_args")
    automatic = ("auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_log_co2")
    return comet.start(
        workspace=settings.get("workspace"),
        project=settings.get("project"),
        mode="create",
        online=service_mode("comet", settings) == "online",
        experiment_config=comet.ExperimentConfig(
            name=settings.get("name") or run_dir.name,
            tags=settings.get("tags"),
            offline_directory=os.fspath(run_dir / "comet"),
            display_summary_level=0,
            **dict.fromkeys((*private, *automatic), False),
        ),
    )
