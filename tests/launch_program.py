"""This file owns a launch of any module in several workers: `python -m tests.launch_program WORKERS GRACE_SECONDS TOLD MODULE WORDS`."""

import sys

from softmoe_train.launching.local import launch_local

if __name__ == "__main__":
    workers, seconds, told, *command = sys.argv[1:]
    codes = [int(code) for code in told.split(",")]
    sys.exit(launch_local(int(workers), [sys.executable, "-m", *command], grace_seconds=int(seconds), told=codes))
