"""This file owns `softmoe train -m`: the runs of a sweep, each a process of its own."""

from softmoe_train.commands.elastic import check_train
from softmoe_train.commands.train import compose_train
from softmoe_train.commands.workers import under_a_launcher
from softmoe_train.config import ConfigError
from softmoe_train.sweep.drive import exit_code, make_sweep, run_sweep, show_results, tell_end
from softmoe_train.sweep.points import Kind
from softmoe_train.sweep.search import is_search, run_search


def sweep(overrides: list[str]) -> int:
    """Check every point, then run those that are not complete; raises ConfigError before anything is started."""
    refuse_launcher("train")
    kind = Kind("train", compose_train, check_train)
    if is_search(overrides):
        made, outcomes = run_search(kind, overrides)
    else:
        made = make_sweep(kind, overrides)
        outcomes = run_sweep(made)
    show_results(made, outcomes)
    tell_end(made, outcomes)
    return exit_code(outcomes)


def refuse_launcher(verb: str) -> None:
    """Raise ConfigError in a worker of torchrun or srun: all of them would start the whole sweep."""
    if under_a_launcher():
        raise ConfigError(
            [
                f"softmoe {verb} -m starts the workers of its points by itself; write it without torchrun or srun, with processes= for each point"
            ]
        )
