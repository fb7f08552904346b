"""This file owns `softmoe inspect`: what is in a checkpoint, whether it is whole, how it differs from another, and how it routes."""

import json
import sys
from pathlib import Path

from softmoe_train.checkpoint import CheckpointError
from softmoe_train.checkpoint.inspect import InspectConfig, as_document
from softmoe_train.checkpoint.inspect import inspect as inspect_checkpoint
from softmoe_train.checkpoint.table import print_inspection
from softmoe_train.commands.workers import compose_alone
from softmoe_train.portrait import draw_portrait, print_portrait

DAMAGED = 1


def inspect(overrides: list[str]) -> int:
    """Print what there is; returns 1 where a checkpoint is damaged. Raises ConfigError before anything is read."""
    asked = compose_alone("inspect", InspectConfig, overrides)
    try:
        inspection = inspect_checkpoint(asked)
        portrait = draw_portrait(asked) if asked.routing and not inspection.faults else None
    except CheckpointError as error:
        print(f"softmoe inspect: {error}", file=sys.stderr)
        return DAMAGED
    if asked.out is not None:  # first: whoever reads the tables may close the pipe
        routing = {} if portrait is None else {"routing": portrait.document()}
        Path(asked.out).write_text(json.dumps({**as_document(inspection), **routing}, indent=1) + "\n")
    if portrait is not None:
        print_portrait(portrait)
    if portrait is None or asked.verify or asked.against is not None:
        print_inspection(inspection)
    return DAMAGED if inspection.faults else 0
