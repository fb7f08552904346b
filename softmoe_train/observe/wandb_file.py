"""This file owns reading the .wandb files of a run folder: what W&B has been sent, as W&B itself wrote it down.

It is read from there, never from a note of ours: wandb writes with a delay, and a trainer that is killed takes the last
seconds with it (measured with 0.31: what it had not flushed by then is gone).
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

BLOCK = 32768  # bytes; a .wandb file is a LevelDB log: blocks of records with a header of checksum, length and type
HEADER = 7  # bytes, both of the file and of a record


def steps_on_disk(folder: Path, wandb_id: str, wandb_records: ModuleType) -> tuple[int, int]:
    """The highest row number in the offline pieces of a W&B run, and in all its pieces; -1 where there is none."""
    offline, online = -1, -1
    for path in sorted(folder.glob(f"*run-*-{wandb_id}*/run-{wandb_id}.wandb")):
        last = -1
        for raw in records_of(path.read_bytes()):
            record = wandb_records.Record.FromString(raw)
            if record.WhichOneof("record_type") == "history":
                last = max(last, record.history.step.num)
        if path.parent.name.startswith("offline-"):
            offline = max(offline, last)
        else:
            online = max(online, last)
    return offline, max(offline, online)


def records_of(content: bytes) -> Iterator[bytes]:
    """The whole records of a .wandb file (LevelDB log format), ending quietly where a kill tore it."""
    position, parts = HEADER, []
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # too short for a header: padding up to the next block
            position += BLOCK - position % BLOCK
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]  # 1 whole, 2 first, 3 middle, 4 last
        end = position + HEADER + length
        if kind not in (1, 2, 3, 4) or end > len(content):
            return
        parts.append(content[position + HEADER : end])
        position = end
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
