"""This file owns how a run goes to W&B: in which mode it starts there, and what W&B learns of it before its first metric."""

import contextlib
import math
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

from softmoe_train.observe.code_version import checkout, code_version
from softmoe_train.observe.run_files import Line
from softmoe_train.observe.wandb_file import steps_on_disk
from softmoe_train.observe.wandb_run import RowNumbers, WandbConfig, WandbRun, first_line
from softmoe_train.redact import without_secrets

FLUSH_SECONDS = 2.0  # how much of the W&B file a kill may take; what it takes is sent again from metrics.jsonl
INIT_SECONDS = 30.0
FINISH_SECONDS = (
    20.0  # a preempted run has little time; what is not uploaded by then stays in the folder for `wandb sync`
)


def start_wandb(
    config: WandbConfig,
    run_dir: Path,
    *,
    wandb_id: str,
    name: str,
    run_config: Mapping[str, Any],
    written: list[Line],
    taken_back: Sequence[tuple[int, int]],
    warn: Callable[[str], None],
) -> WandbRun | None:
    """The W&B run of this folder, brought up to date with `written` (the lines that a resume kept), or None.

    It never prompts and never raises: without the library or a login, or with the service down, it warns once and falls
    back to offline, then to None.
    """
    if config.mode == "disabled":
        return None
    try:
        # Imported here because it costs 0.3 s, and only rank 0 of a run that wants W&B is to pay that.
        import wandb
        import wandb.proto.wandb_internal_pb2 as wandb_records

        wandb.setup(settings=wandb.Settings(silent=True))  # before it has credentials to announce
    except Exception as error:  # a broken installation raises more than ImportError
        warn(
            f"W&B is off: the library does not load ({first_line(error)}); "
            "`pip install wandb`, or observe.wandb.mode=disabled"
        )
        return None
    for mode in modes_to_try(wandb, config.mode, warn):
        try:
            has_offline, has_any = steps_on_disk(run_dir / "wandb", wandb_id, wandb_records)
            run = init_run(wandb, config, mode, run_dir, wandb_id, name, run_config)
        except Exception as error:  # init raises anything from usage to protocol errors
            warn(f"W&B {mode} did not start ({first_line(error)}); training goes on, metrics.jsonl has everything")
            with contextlib.suppress(Exception):
                wandb.teardown()  # its service still holds the run's id, and would refuse it to the next mode
            continue
        # The service knows what it has; offline pieces are for `wandb sync` to bring. Offline, all pieces count as had.
        has_through = max(has_offline, run.step - 1) if mode == "online" else has_any
        wandb_run = WandbRun(wandb, run, has_through, RowNumbers(taken_back), warn)
        for line in written:
            wandb_run.send(*unpack(line))
        return wandb_run
    return None


def modes_to_try(wandb: ModuleType, mode: str, warn: Callable[[str], None]) -> list[Literal["online", "offline"]]:
    """The modes to start W&B in, best first; online only with credentials, because W&B would prompt without them."""
    if mode == "offline":
        return ["offline"]
    logged_in = is_logged_in(wandb)
    if mode == "online" and not logged_in:
        warn(
            "observe.wandb.mode=online but W&B is not logged in: writing offline; "
            "`wandb login` now, and `wandb sync` the folder later"
        )
    if mode == "auto":
        match os.environ.get("WANDB_MODE"):
            case "disabled":
                return []
            case "offline" | "dryrun":
                return ["offline"]
    return ["online", "offline"] if logged_in else ["offline"]


def is_logged_in(wandb: ModuleType) -> bool:
    """Whether W&B would find credentials without asking: in the environment, its settings, or a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        settings = wandb.setup().settings
        if settings.api_key:
            return True
        host = urlsplit(settings.base_url).netloc
        places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
        path = next((p for p in (Path(place).expanduser() for place in places) if p.exists()), None)
        return path is not None and bool(netrc.netrc(str(path)).authenticators(host))
    except Exception:  # an unreadable file is no login
        return False


def init_run(
    wandb: ModuleType,
    config: WandbConfig,
    mode: Literal["online", "offline"],
    run_dir: Path,
    wandb_id: str,
    name: str,
    run_config: Mapping[str, Any],
) -> Any:
    """Start or continue the W&B run `wandb_id`, with `step` as the axis of every metric; `images_seen` is on every row to choose instead."""
    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",  # our standard output stays ours: neither wrapped nor uploaded
        "disable_code": True,  # neither sources nor a patch of what was changed in them
        # The commit is that of this package, not of the folder that the run was started in.
        "disable_git": checkout() is None,
        "git_root": None if checkout() is None else str(checkout()),
        "x_transaction_log_flush_interval": FLUSH_SECONDS,
        "init_timeout": INIT_SECONDS,
        "login_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
    }
    # Older releases know fewer of these, and refuse what they do not know.
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group,
        job_type=config.job_type,
        tags=config.tags,
        dir=str(run_dir),
        id=wandb_id,
        name=name,
        resume="allow",
        mode=mode,
        config={**without_secrets(run_config), "code": code_version()},
        settings=settings,
        # The config of a resumed run may differ (steps, layout): W&B is to hold the newest.
        allow_val_change=True,
    )
    run.define_metric("step", summary="last")
    run.define_metric("images_seen", summary="last")
    run.define_metric("*", step_metric="step")
    return run


def unpack(line: Line) -> tuple[int, int, dict[str, float]]:
    """A line of metrics.jsonl as the report it was, null read back as not a number."""
    metrics = {name: math.nan if value is None else float(value) for name, value in line.items()}
    return int(metrics.pop("step")), int(metrics.pop("images_seen")), metrics
