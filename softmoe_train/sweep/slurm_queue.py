"""This file owns what SLURM is asked of the jobs of a sweep: which are in the queue, and what it still knows of one that is not."""

import subprocess
from typing import NamedTuple

SECONDS = 60.0  # for one answer
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")


class QueueError(Exception):
    """SLURM gave no answer; whoever waits asks again."""


class Queued(NamedTuple):
    """A job that is not over."""

    number: str
    state: str
    name: str

    @property
    def waits(self) -> bool:
        """Whether no task of it runs."""
        return self.state in WAITING


def queue() -> list[Queued]:
    """Our jobs that wait or run; raises QueueError."""
    lines = _asked("squeue", "--me", "--noheader", "--format=%i|%T|%j").splitlines()
    return [Queued(*line.split("|", 2)) for line in lines if line.count("|") >= 2]


def state_of(number: str) -> str | None:
    """What SLURM says of a job (`RUNNING`, `TIMEOUT`, `CANCELLED` ...), while it remembers; None after that."""
    for words in (
        ("scontrol", "--oneliner", "show", "job", number),
        ("sacct", "--noheader", "--parsable2", "--format=State", "-j", number),
    ):
        try:
            said = _asked(*words)
        except QueueError:
            continue
        state = said.partition("JobState=")[2].split()[:1] if "JobState=" in said else said.split()[:1]
        if state:
            return state[0]
    return None


def restarts_of(number: str) -> int | None:
    """How often SLURM has started a job again, while it remembers; None after that."""
    try:
        said = _asked("scontrol", "--oneliner", "show", "job", number)
    except QueueError:
        return None
    count = said.partition(" Restarts=")[2].split()[:1]
    return int(count[0]) if count and count[0].isdecimal() else None


def _asked(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise QueueError(f"{words[0]}: {error}") from None
    if done.returncode:
        raise QueueError(f"{' '.join(words)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
