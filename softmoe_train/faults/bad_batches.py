"""This file owns bad_batches.jsonl: the samples of every bad step of a run, for whoever looks at the data."""

import json
import math
from pathlib import Path

from softmoe_train.data.batch import Cursor, ImageStream, StoredSample
from softmoe_train.faults.bad_steps import BadStep
from softmoe_train.plain import plain, the_first

MOST = 100  # lines; a sick run must not fill the disk
SHOWN = 3  # samples in a warning


class BadBatches:
    """The bad batches of a run folder, a line each, written by one process; what comes again after a resume is not repeated."""

    def __init__(self, path: Path, stream: ImageStream) -> None:
        self._path = path
        self._stream = stream
        self._known = known_lines(path)

    def write(self, bad: BadStep) -> list[str]:
        """Write a bad step down, and return what to tell people of it."""
        key = (bad.step, bad.begin)
        if key in self._known or len(self._known) > MOST:
            return []
        self._known.add(key)
        if len(self._known) > MOST:
            return [f"{self._path} holds {MOST} bad batches: no more are written down or named"]
        samples = sorted(s for rank in bad.ranks for s in self._stream.samples(Cursor(bad.begin), rank))
        line = {
            "step": bad.step,
            "first_sample": bad.begin,
            "why": bad.why,
            "loss": bad.loss if math.isfinite(bad.loss) else None,
            "ranks": bad.ranks,
            "samples": [sample._asdict() for sample in samples],
        }
        try:
            self._append(json.dumps(line, allow_nan=False))
            place = f"its samples are in {self._path}"
        except OSError as error:  # a step is not worth the run
            place = f"its samples could not be written to {self._path} ({error})"
        return [f"step {bad.step}: {bad.said}; {place}: {the_first(list(map(described, samples)), SHOWN)}"]

    def _append(self, line: str) -> None:
        with self._path.open("a+b") as file:
            # A kill may have torn the last line: the next one begins on a line of its own.
            torn = file.tell() > 0 and not self._path.read_bytes().endswith(b"\n")
            file.write(b"\n" * torn + line.encode() + b"\n")


def described(sample: StoredSample) -> str:
    """A sample in words."""
    return f"{sample.number} ({plain(sample.shard)} {plain(sample.key)})"


def known_lines(path: Path) -> set[tuple[int, int]]:
    """The step and first sample of every whole line of a file that may not exist."""
    known = set()
    for raw in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(raw)
            known.add((int(line["step"]), int(line["first_sample"])))
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill
    return known
