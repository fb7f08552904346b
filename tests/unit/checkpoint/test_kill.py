"""A save that is killed at any instant leaves the previous checkpoint, or the new one whole."""

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from softmoe_train.checkpoint import CheckpointStore, verify

# What Python reports before it touches a file: a kill before each is a kill between any two changes on the disk.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.truncate"}


def _store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, keep_last=1, rank=0, world=1, group=None)


def _tensors(step: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((1000,), float(step)), "loop.step": torch.tensor(step)}


def _save_and_be_killed(folder: Path, at: int) -> None:
    """In a forked child: kill ourselves for real at the `at`-th change; leave with 0 where the save ends before."""
    seen = 0

    def count(event: str, args: tuple) -> None:
        nonlocal seen
        if event in CHANGES:
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(count)
    _store(folder).save(2, _tensors(2), {"loop": {"step": 2}})
    os._exit(0)


def _sweep(folder: Path, results: "multiprocessing.SimpleQueue[list]") -> None:
    torch.set_num_threads(1)
    found = []
    for at in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        _store(folder).save(1, _tensors(1), {"loop": {"step": 1}})
        child = os.fork()
        if child == 0:
            try:
                _save_and_be_killed(folder, at)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        path = _store(folder).latest()
        assert path is not None, at
        step = _store(folder).read_documents(path)["loop"]
        targets = {name: torch.zeros_like(tensor) for name, tensor in _tensors(0).items()}
        _store(folder).load(path, targets)
        marked = [entry for entry in folder.iterdir() if (entry / "COMPLETE.json").exists()]
        faults = [fault for entry in marked for fault in verify(entry)]
        again = _store(folder).save(3, _tensors(3), {})
        left = [entry.name for entry in folder.iterdir()]
        found.append((code, step, targets["loop.step"].item(), faults, left, verify(again)))
        if code == 0:
            break
    results.put(found)


def test_a_save_killed_at_any_instant_leaves_a_whole_checkpoint_and_the_next_save_works(tmp_path: Path) -> None:
    # A process of its own to fork from: this one may have threads.
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_sweep, args=(tmp_path / "checkpoints", results))
    process.start()
    process.join(100)
    assert process.exitcode == 0
    *killed, ended = results.get()
    assert len(killed) >= 20
    assert {code for code, *_ in killed} == {-signal.SIGKILL}
    assert {document["step"] for _, document, *_ in killed} == {1, 2}
    for _, document, tensor, faults, left, faults_of_next in [*killed, ended]:
        assert tensor == document["step"]
        assert (faults, left, faults_of_next) == ([], ["step_00000003"], [])
    assert ended[:3] == (0, {"step": 2}, 2)
