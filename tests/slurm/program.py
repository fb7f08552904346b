"""This file owns the `softmoe` of these tests: the real one, whose steps a test may slow down, and in which it may have a rank fail.

The file PACE of the environment holds the seconds that a step is to take longer. The rank FAILS raises in its fifth step.
"""

import os
import sys
import time
from pathlib import Path

from softmoe_train import loop
from softmoe_train.commands.main import main
from softmoe_train.data.batch import Batch
from softmoe_train.engine.protocol import Engine
from softmoe_train.loop import StepReport

PACE, FAILS = "SOFTMOE_TEST_PACE", "SOFTMOE_TEST_FAILS"
PLANTED = "a fault that was planted in one rank"
TRAIN_STEP = loop.train_step


def paced(engine: Engine, batch: Batch, lr: float, micro_batches: int, *, moves: bool = False) -> StepReport:
    """One step, as slow as the file says."""
    if os.environ.get(FAILS, "") == os.environ.get("RANK", "0") and batch.cursor.position >= 5 * len(batch.mask) * 2:
        raise RuntimeError(PLANTED)
    time.sleep(float(Path(os.environ[PACE]).read_text() or 0))
    return TRAIN_STEP(engine, batch, lr, micro_batches, moves=moves)


if __name__ == "__main__":
    loop.train_step = paced
    sys.exit(main(sys.argv[1:]))
