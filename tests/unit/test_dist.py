"""What choosing a device does to the process."""

import ctypes
import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from softmoe_train.dist import pick_device
def used(): return resource.getrusage(resource.RUSAGE_SELF)
pick_device("cpu", 0)
start = used().ru_maxrss
for _ in range(12):
    before = used().ru_minflt
    tensors = [torch.ones(mib * 2**18) for mib in (60, 60, 20, 20, 5, 1)]
    del tensors
    faults = used().ru_minflt - before
print(faults, (used().ru_maxrss - start) // 2**10)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc only")
def test_a_process_on_the_cpu_keeps_the_memory_that_it_frees() -> None:
    # In a process of its own: it is a setting of the whole process.
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, timeout=100, check=True)
    faults, mib = map(int, done.stdout.split())
    assert faults < 1000, "166 MiB afresh are 42,496 pages of 4 KiB"
    assert mib < 2 * 166  # the price: blocks that lie between smaller ones wait for a tensor that fits
