"""This file owns what a sweep takes of Hydra's plugins: the settings of a launcher, and a sweeper that is handed our way to run points."""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from softmoe_train.config import ConfigError

LAUNCHERS = {"basic": None, "submitit_slurm": "hydra-submitit-launcher"}  # what each needs installed
SWEEPERS = {"basic": None, "optuna": "hydra-optuna-sweeper"}
PLUGINS = {"hydra-submitit-launcher": "hydra_submitit_launcher", "hydra-optuna-sweeper": "hydra_optuna_sweeper"}
SIGNAL_SECONDS = (
    180  # before the time limit, as in launch/slurm.sbatch; the plugin's 120 are all taken by checkpoint.grace
)
Values = Callable[[list[list[str]]], list[float | None]]


def plugin_problems(launcher: str, sweeper: str) -> list[str]:
    """Why these cannot be used here."""
    problems = []
    for key, chosen, known in (("hydra/launcher", launcher, LAUNCHERS), ("hydra/sweeper", sweeper, SWEEPERS)):
        package = known.get(chosen)
        if chosen not in known:
            more = (
                "; leave it out: the sweep then runs on this machine, as many workers at a time as sweep.processes says"
                if chosen in ("submitit_local", "joblib")
                else ""
            )
            problems.append(f"{key}={chosen}: a sweep takes {' or '.join(known)}{more}")
        elif package is not None and not _is_installed(PLUGINS[package]):
            problems.append(
                f'{key}={chosen} needs {package}; pip install "softmoe-train[sweep]", or pip install {package}'
            )
    return problems


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:
        return False


def launcher_settings(words: list[str]) -> dict[str, Any]:
    """The launcher's own settings with these overrides on top; raises ConfigError."""
    config, _ = _composed([word for word in words if "sweeper" not in word.partition("=")[0]])
    settings = OmegaConf.to_container(config.hydra.launcher, resolve=False)
    assert isinstance(settings, dict), settings
    given = any(word.startswith("hydra.launcher.signal_delay_s=") for word in words)
    return {
        **{str(key): value for key, value in settings.items()},
        **({} if given else {"signal_delay_s": SIGNAL_SECONDS}),
    }


class PointFailedError(RuntimeError):
    """More points have failed than the sweeper bears."""


def keys_that_vary(overrides: list[str]) -> list[str]:
    """The keys that are given more than one value: several, a range, an interval."""
    parser = OverridesParser.create()
    varied = []
    for override in overrides:
        with suppress(HydraException):  # told when it is composed
            parsed = parser.parse_override(override)
            varied += [parsed.key_or_group] if parsed.is_sweep_override() else []
    return varied


def search(words: list[str], folder: Path, arguments: list[str], values: Values) -> None:
    """Have a sweeper choose points until it is done: `values` runs a batch of them and returns what each came to, None of one that failed.

    Raises ConfigError where its settings cannot be, PointFailedError where it gives up.
    """
    config, context = _composed(
        [word for word in words if "launcher" not in word.partition("=")[0]], f"hydra.sweep.dir={folder}"
    )
    plugins = Plugins.instance()
    usual = plugins.instantiate_launcher
    plugins.instantiate_launcher = lambda **_: _Values(values)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        sweeper: Sweeper = plugins.instantiate_sweeper(
            config=config, hydra_context=context, task_function=lambda _: None
        )
    finally:
        plugins.instantiate_launcher = usual
    sweeper.sweep(arguments)


class _Values(Launcher):
    """Our way to run points, as a Hydra launcher."""

    def __init__(self, values: Values) -> None:
        self._values = values

    def setup(self, **_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """There is nothing of Hydra's to set up: no working directory is changed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run them, and return what they came to."""
        found = []
        for value in self._values([list(words) for words in job_overrides]):
            job = JobReturn(status=JobStatus.COMPLETED if value is not None else JobStatus.FAILED)
            job.return_value = value if value is not None else PointFailedError("this point has no value")
            found.append(job)
        return found


def _composed(words: list[str], *more: str) -> tuple[DictConfig, HydraContext]:
    """Hydra's own configuration with these overrides, and what its plugins are handed with it."""
    try:
        with initialize(config_path=None, version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
            return compose(overrides=[*words, *more], return_hydra_config=True), context
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([f"{' '.join(words)}: {str(error).partition(chr(10))[0]}"]) from None
