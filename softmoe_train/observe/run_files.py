"""This file owns what a run folder says about the run: metrics.jsonl (the truth) and summary.json."""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softmoe_train.observe.history import History, next_start

Line = dict[str, float | None]  # step and images_seen are whole numbers; null stands for a value that is not finite


def replace_text(path: Path, text: str) -> None:
    """Put `text` at `path` so that a reader, or a crash at any instant, finds the old file or the new, never a part."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """The same of bytes."""
    draft = path.with_name(f"{path.name}.part")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_lines(path: Path) -> tuple[list[Line], int]:
    """The whole lines of a metrics file in order, and how many torn or foreign lines were passed over."""
    if not path.exists():
        return [], 0
    raw = [line for line in path.read_bytes().split(b"\n") if line]
    lines = [line for line in map(whole_line, raw) if line is not None]
    return lines, len(raw) - len(lines)


def whole_line(raw: bytes) -> Line | None:
    """A line of a metrics file, or None for one that is torn or foreign."""
    try:
        line = json.loads(raw)
        whole = type(line["step"]) is int and type(line["images_seen"]) is int
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return line if whole else None


class MetricsFile:
    """metrics.jsonl: one line of strict JSON per report, cut back at a resume, and the last value of each metric.

    A value that is not finite is written as null, since JSON has no other word for it; null never means "not measured".
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        lines, self.broken = read_lines(path)
        # At step 0 there is no checkpoint to continue: what an earlier attempt wrote, step 0 included, comes again.
        self.kept = [line for line in lines if (line["step"] or 0) <= resume_step] if resume_step > 0 else []
        self.cut = len(lines) - len(self.kept)
        if self.cut or self.broken:
            replace_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.kept))
        self.last: Line = {}
        for line in self.kept:
            self.last |= line
        self.unwritten: list[bytes] = []
        self._path = path
        self.begin()

    @property
    def is_there(self) -> bool:
        """Whether the file of `begin` is still in its place: a folder that is deleted takes it along."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def begin(self) -> None:
        """Go on with the file that is in its place now, or with a new one."""
        self._path.touch()
        self._file = self._path.open("rb")  # as long as it is open, no other file can look like it

    def append(self, step: int, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Take one line, for `write`."""
        line: Line = {"step": step, "images_seen": images_seen}
        line |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.unwritten.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        self.last |= line

    def write(self) -> None:
        """Write what was taken; it has left the process when this returns. Raises OSError, and then keeps it for the next time."""
        # A kill leaves lines out or, at worst, one torn at the very end, and a resume cuts that off.
        with self._path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                data = b"".join(self.unwritten)
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.truncate(self._path, end)  # or the next line would begin inside a torn one
                raise
        self.unwritten.clear()


class Summary:
    """summary.json: the last value of every metric, how far the run came, its wall time and history over all resumes, why it ended.

    It is rewritten at each report with `ended: null`: a killed run keeps its wall time and is told from a finished one.
    """

    def __init__(self, path: Path, from_step: int, *, amends: bool = False) -> None:
        self._path = path
        self.earlier_seconds, self.earlier_wandb_id, history = 0.0, None, None
        self.broken = ""  # why an earlier summary was not taken over: all counts start anew
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            self.earlier_seconds, self.earlier_wandb_id = float(earlier["wall_seconds"]), str(earlier["wandb_id"])
            if "history" in earlier:  # one from before there was any is sound
                history = History.model_validate(earlier["history"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.broken = type(error).__name__
        # What only adds to the records of a run that has ended is no start of it.
        self._history = history if amends and history is not None else next_start(history, from_step)

    def record(self, name: str, facts: Mapping[str, Any]) -> None:
        """Keep what this process has to tell of itself; the next `write` writes it."""
        self._history = self._history.with_facts(name, facts)

    def write(self, last: Line, seconds: float, *, wandb_id: str, ended: str | None) -> None:
        """Replace the summary; `seconds` is the wall time of this process only."""
        self._history = self._history.reached(int(last.get("step") or 0))
        history = self._history if ended is None else self._history.ended(ended)
        content = {
            "steps": last.get("step", 0),
            "images_seen": last.get("images_seen", 0),
            "wall_seconds": round(self.earlier_seconds + seconds, 3),
            "ended": ended,
            "wandb_id": wandb_id,
            "metrics": {name: value for name, value in last.items() if name not in ("step", "images_seen")},
            "history": history.model_dump(),
        }
        replace_text(self._path, json.dumps(content, indent=2, allow_nan=False) + "\n")
