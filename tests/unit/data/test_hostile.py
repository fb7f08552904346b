"""Hostile shards are read, or refused with one clear message, or their samples counted: no crash, no hang, no flood, nothing lost.

Each mutation is met by a child process of its own, whose seconds, memory and writing to stderr are limited and looked at.
"""

import json
import mmap
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from softmoe_train.data import build_eval_stream, build_stream
from softmoe_train.data.batch import Broken
from softmoe_train.data.decode import decode_image
from softmoe_train.data.index import index_shards, samples_of
from tests.hostile_pictures import KINDS, picture
from tests.hostile_tars import Hostile, hostile
from tests.unit.data.conftest import settings

CPU_SECONDS, SECONDS = 5, 120  # the second for a machine that does other things too
MEMORY, GROWTH = 1 << 30, 100 << 20  # bytes: what a child may ask for, and what it may touch
FORM = {"image_size": 8, "num_classes": 10, "seed": 0, "rank": 0, "world": 1}


def child(work: Callable[[], list[str]], folder: Path) -> list[str]:
    """What `work` finds wrong in a process of its own, and what is wrong with how that went."""
    told, printed = folder / "told", folder / "printed"
    told.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (_memory(0) + MEMORY,) * 2)
            file = os.open(printed, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            os.dup2(file, 1), os.dup2(file, 2)
            torch.set_num_threads(1)  # as the workers of a stream do: the pool of the parent's threads is not forked
            before = _memory(1)
            try:
                found = work()
            except BaseException as error:
                found = [f"{type(error).__name__}: {error}"]
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            found += [f"it grew by {grown >> 20} MiB"] if grown > GROWTH else []
            told.write_text(json.dumps(found))
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    said = printed.read_text(errors="replace")[:300]
    found = json.loads(told.read_text()) if told.is_file() else [f"it ended by signal {status & 0x7F}"]
    return found + ([f"it printed {said!r}"] if said else [])


def _memory(field: int) -> int:
    """Bytes that this process has asked for (0) or holds (1)."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def unclear(message: str) -> list[str]:
    """What is wrong with what a person is told."""
    lines = message.split("\n")
    return [f"it says {line[:200]!r}" for line in lines if not line.isprintable() or len(line) > 1200]


def met(one: Hostile, path: Path) -> list[str]:
    """Index, evaluate on and train on a hostile shard; what went wrong."""
    cfg = settings(test=str(path), train=str(path), max_broken=1 << 20, streams=1)
    try:
        passes = build_eval_stream(cfg, batch_size=4, **FORM)
    except ValueError as error:
        about = [] if path.name in str(error) else [f"it does not say which shard: {error}"]
        return unclear(str(error)) + about + ["it says more than a line"] * ("\n" in str(error))
    [shard] = index_shards([str(path)])
    keys = samples_of(shard).keys()
    seen, broken = 0, []
    for batch in passes:
        seen += int(batch.mask.sum())
        broken += batch.broken
    found = []
    if seen + len(broken) != len(keys):
        found.append(f"of {len(keys)} samples {seen} came and {len(broken)} were counted")
    if not one.there <= set(keys):
        found.append(f"{sorted(one.there - set(keys))} are lost")
    if one.sound & {sample.key for sample in broken}:
        found.append(f"{sorted(one.sound & {sample.key for sample in broken})} are sound and were not read")
    return found + trained(cfg, len(keys), broken)


def trained(cfg, count: int, broken: list) -> list[str]:
    """An epoch of training: the same samples are counted, and told where none may be broken."""
    found = []
    try:
        epoch = islice(build_stream(cfg, global_batch=1, **FORM), count)
        again = [sample for batch in epoch for sample in batch.broken]
        found += ["training counts others than evaluation"] * (named(again) != named(broken))
    except RuntimeError as error:
        found += unclear(str(error)) + [f"it gave up: {error}"[:200]] * (len(broken) < min(count, 33))
    try:
        if broken:
            # A few batches more come, while the ranks of a run would agree to end together.
            list(islice(build_stream(cfg.model_copy(update={"max_broken": 0}), global_batch=1, **FORM), count + 3))
            found.append("broken samples above the limit were borne")
    except RuntimeError as error:
        found += unclear(str(error)) + ["it does not name the shard"] * (".tar" not in str(error))
    return found


def named(broken: list[Broken]) -> list[tuple[str, str, str]]:
    """Which samples are broken and why, wherever they were met."""
    return sorted((one.shard, one.key, one.reason) for one in broken)


@pytest.mark.parametrize(
    "first", [pytest.param(at, marks=[pytest.mark.full] * (at >= 98)) for at in range(0, 1029, 49)]
)
def test_mutations_are_read_refused_or_counted(tmp_path: Path, first: int) -> None:
    for suffix in KINDS:  # Pillow loads what it needs for a format once
        decode_image(picture(np.random.default_rng(0), suffix), max_pixels=1000)
    kinds, wrong, slowest = Counter[str](), {}, ("", 0.0)
    for number in range(first, first + 49):
        one, path = hostile(number), tmp_path / f"{number}.tar"
        path.write_bytes(one.data)
        began = time.monotonic()
        found = child(lambda one=one, path=path: met(one, path), tmp_path)
        slowest = max(slowest, (f"{number} {one.what}", time.monotonic() - began), key=lambda pair: pair[1])
        kinds[one.what] += 1
        if found:
            wrong[f"{number} {one.what}"] = found
        path.unlink()
    print(f"{sum(kinds.values())} mutations of {len(kinds)} kinds; the slowest: {slowest[0]}, {slowest[1]:.1f} s")
    assert wrong == {}


def test_a_child_that_hangs_swells_prints_or_dies_is_noticed(tmp_path: Path) -> None:
    assert child(lambda: [], tmp_path) == []
    new = GROWTH + (1 << 20)  # mapped: the heap may hold as much that its parent has freed
    assert "grew" in str(child(lambda: [str(mmap.mmap(-1, new).write(bytes(1) * new))][1:], tmp_path))
    assert "MemoryError" in str(child(lambda: [bytes(2 * MEMORY).decode()], tmp_path))
    assert "printed 'x'" in str(child(lambda: [str(os.write(2, b"x"))][1:], tmp_path))
    assert "signal 9" in str(child(lambda: os.kill(os.getpid(), signal.SIGKILL) or [], tmp_path))
    assert "ZeroDivisionError" in str(child(lambda: [str(1 // 0)], tmp_path))
    assert unclear("a\x1b[2J") and unclear("x" * 2000) and not unclear("two\nlines")
