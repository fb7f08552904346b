"""This file owns how the log of a run is opened: in which folder, at which step, and what it says first."""

import json

from softmoe_train.checkpoint.audit import Audit
from softmoe_train.config import save_yaml
from softmoe_train.faults.claim import Claim
from softmoe_train.loop import TrainState
from softmoe_train.observe.log import ObserveConfig, SilentLog, build_log
from softmoe_train.observe.run_files import replace_text
from softmoe_train.observe.startup import Startup
from softmoe_train.settings import RunConfig
from softmoe_train.warm.start import ACCOUNT, Warmed


def log_of(
    config: RunConfig, held: Claim | None, state: TrainState, *, resumed: Audit | Warmed | None, startup: Startup | None
) -> SilentLog:
    """The log of a run that begins, or goes on, at `state`, which says how."""
    begun = (config.folder / "metrics.jsonl").is_file()
    observe = config.observe
    if state.step >= config.steps:  # nothing will be sent
        observe = observe.model_copy(update={"wandb": observe.wandb.model_copy(update={"mode": "disabled"})})
    taken_back = [(data.first_step, data.last_step) for data in state.bad_steps.passed_over]
    log = open_log(
        config, held, observe, wandb_id=state.wandb_id, step=state.step, startup=startup, taken_back=taken_back
    )
    state.wandb_id = log.wandb_id
    if not isinstance(resumed, Audit) and begun:
        begins = "from scratch" if resumed is None else "anew"
        log.message(f"{config.folder} holds no checkpoint: starting {begins}, what it reported before is dropped")
    if isinstance(resumed, Audit):
        log.record("resumed", resumed.line(state.step, config.steps), resumed.facts())
    elif resumed is not None:
        if held is not None:
            replace_text(config.folder / ACCOUNT, json.dumps(resumed.document(), indent=1) + "\n")
        log.record("warm", resumed.line(), resumed.facts())
        for difference in resumed.fit.differences:
            log.warn(f"warm start: {difference}")
    return log


def open_log(
    config: RunConfig,
    held: Claim | None,
    observe: ObserveConfig,
    *,
    wandb_id: str | None,
    step: int,
    startup: Startup | None,
    taken_back: list[tuple[int, int]],
    amends: bool = False,
) -> SilentLog:
    """The log of a run folder at a step: a silent one on all ranks but that which holds the folder."""
    tree = config.as_saved()

    def make_folder() -> None:
        if held is not None:
            held.take()
            save_yaml(tree, config.folder / "config.yaml")

    return build_log(
        observe,
        config.folder,
        name=config.name,
        run_config=tree,
        total_steps=config.steps,
        main=held is not None,
        wandb_id=wandb_id or None,
        resume_step=step,
        startup=startup,
        make_folder=make_folder,
        taken_back=taken_back,
        amends=amends,
    )
