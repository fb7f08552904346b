"""This file owns what a run tells the script that started it of its progress: whether it completes a checkpoint.

Exit code 75 does not say that: a save that takes longer than checkpoint.grace is given up with it too, and a script that requeues on
75 alone would do so for ever. Checkpoints may lie in an object store, where no script of a shell can look.
"""

import os
from contextlib import suppress
from pathlib import Path

PROGRESS = "SOFTMOE_PROGRESS"  # names the file that is written
NOTHING, SAVED = "no checkpoint yet", "a checkpoint"


def tell_progress(saved: bool) -> None:
    """Have the script know, where one wants to, whether this start has completed a checkpoint; a file that cannot be written tells nothing."""
    if os.environ.get(PROGRESS):
        with suppress(OSError):
            Path(os.environ[PROGRESS]).write_text(SAVED if saved else NOTHING)
