"""This file owns `softmoe finetune`: the training of a checkpoint's weights on a set of its own, which is `train` with another configuration."""

from softmoe_train.commands.train import run_training
from softmoe_train.finetune import compose_finetune


def finetune(overrides: list[str], *, print_only: bool) -> int:
    """Compose around the checkpoint, check, then train; raises ConfigError before anything is started."""
    return run_training("finetune", compose_finetune, overrides, print_only=print_only)
