"""This file owns `softmoe export`: a checkpoint's weights as files that plain PyTorch reads."""

import sys

from softmoe_train.checkpoint import CheckpointError
from softmoe_train.checkpoint.export import ExportConfig
from softmoe_train.checkpoint.export import export as export_weights
from softmoe_train.commands.workers import compose_alone

FAILED = 1


def export(overrides: list[str]) -> int:
    """Write the files and say which; returns 1 where the checkpoint is damaged or lacks what was asked. Raises ConfigError first."""
    asked = compose_alone("export", ExportConfig, overrides)
    try:
        done = export_weights(asked)
    except CheckpointError as error:
        print(f"softmoe export: {error}", file=sys.stderr)
        return FAILED
    beside = "" if len(done.files) == 1 else f" and {len(done.files) - 1:,} files of one expert beside it"
    print(
        f"{done.files[-1]}{beside}: {done.tensors:,} tensors, {done.bytes / 2**20:,.1f} MiB, {asked.weights} of step {done.step}"
    )
    return 0
