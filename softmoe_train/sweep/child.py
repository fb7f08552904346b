"""This file owns the process of a point: `softmoe` that dies with the sweep which started it, however that dies."""

import gc
import runpy
import sys

gc.disable()  # as in __main__.py, which turns it on again
from softmoe_train.launching.worker import die_with_parent  # noqa: E402

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module("softmoe_train", run_name="__main__", alter_sys=True)
