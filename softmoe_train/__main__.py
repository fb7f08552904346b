"""This file owns the start of the program `softmoe`, which is also `python -m softmoe_train`: how local workers are started."""

import gc
import os
import signal
import sys
from types import FrameType


def end_first(number: int, _: FrameType | None) -> None:
    """End by a signal, though it be process 1."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # for a process that was forked, whose parent looks at how it ended
    os._exit(128 + number)


# Of process 1 the kernel keeps a signal that nothing handles, so a container would not hear that it is to end before a run handles it.
if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, end_first)

# Nothing that an import makes is garbage, and to look for it costs a quarter of all imports: 0.5 s of each process on one core.
# What is there after them lives as long as the process, so later looks leave it out too.
gc.disable()
from softmoe_train.commands.main import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    sys.exit(main())
