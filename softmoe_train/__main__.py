"""This file owns the start of the program `softmoe`, which is also `python -m softmoe_train`: how local workers are started."""

import gc
import sys

# Nothing that an import makes is garbage, and to look for it costs a quarter of all imports: 0.5 s of each process on one core.
# What is there after them lives as long as the process, so later looks leave it out too.
gc.disable()
from softmoe_train.commands.main import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    sys.exit(main())
