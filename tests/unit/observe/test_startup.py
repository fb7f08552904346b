"""The account of a start begins where the process did."""

import os
import subprocess
import sys
import time

import pytest

from softmoe_train.observe.startup import Startup, process_began

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc here tells when a process began")


@on_linux
def test_a_process_began_when_it_was_started() -> None:
    time.sleep(0.3)  # else this process itself might be meant
    before = time.perf_counter()
    child = subprocess.Popen(["sleep", "60"])
    after = time.perf_counter()
    began = process_began(child.pid)
    child.kill()
    child.wait()
    assert began is not None
    assert before - 0.02 <= began <= after + 0.02  # the kernel counts in hundredths
    assert process_began(child.pid) is None


@on_linux
def test_the_parts_of_a_start_fill_the_time_since_the_launcher_began() -> None:
    own, launcher = process_began(os.getpid()), process_began(os.getppid())
    assert own is not None and launcher is not None
    startup = Startup(os.getppid())
    startup.done("imports")
    time.sleep(0.2)
    startup.done("engine")
    assert list(startup.parts) == ["launcher", "imports", "engine"]
    assert startup.parts["launcher"] == pytest.approx(own - launcher, abs=0.02)
    assert startup.parts["engine"] >= 0.2
    total = time.perf_counter() - launcher
    assert sum(startup.parts.values()) == pytest.approx(total, abs=1.0)  # a busy machine
    assert str(startup).startswith(f"first step {sum(startup.parts.values()):.1f} s after the start: launcher ")


def test_without_a_launcher_it_begins_with_the_process() -> None:
    startup = Startup(None)
    startup.done("imports")
    assert list(startup.parts) == ["imports"]
