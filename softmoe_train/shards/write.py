"""This file owns writing one shard: by webdataset's ShardWriter with every header field fixed, and there only when it is whole."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from webdataset.writer import ShardWriter

from softmoe_train.shards.look import Listed, listing_of, read, read_listed
from softmoe_train.shards.order import Shard
from softmoe_train.shards.source import LeftOut, Stored

PART = ".making"  # the suffix of a shard that is not whole


class Written(NamedTuple):
    """A shard that is there: its samples, how many of them have each label, and what it lacks of its pictures."""

    name: str
    samples: int
    labels: dict[str, int]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class Write:
    """How to write shards; sent to worker processes."""

    folder: Path  # of the listings
    out: Path
    number: dict[str, int]  # of each class name

    def __call__(self, shard: Shard) -> Written:
        """Write a shard; raises OSError where the disk is full, and leaves nothing of the shard then."""
        path, left, labels = self.out / shard.name, [], Counter[str]()
        part = path.with_suffix(PART)
        try:
            with (
                open(part, "wb") as file,
                # An opener, because by default the name is opened by webdataset's gopen, which may run commands.
                ShardWriter("%d", maxcount=1 << 62, maxsize=1 << 62, opener=lambda _: file, verbose=0, encoder=False,
                    mtime=0, user="", group="") as writer,
            ):  # fmt: skip
                for listed in self._listed(shard):
                    sample = self._sample(listed)
                    if isinstance(sample, LeftOut):
                        left.append(sample)
                    else:
                        writer.write(sample)
                        labels.update(bytes(sample.get("cls", b"")).decode().split())  # type: ignore[arg-type]
                writer.finish()
                file.flush()
                os.fsync(file.fileno())
            written = Written(shard.name, len(shard.part) - len(left), dict(labels), left)
            facts_of(self.folder, shard.name).write_text(json.dumps(written))
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return written

    def _listed(self, shard: Shard) -> list[Listed]:
        found: list[Listed | None] = [None] * len(shard.part)
        rows = sorted(range(len(found)), key=lambda i: (shard.part[i], shard.start[i]))
        file, opened = None, -1
        try:
            for i in rows:  # each listing is opened once
                if file is None or shard.part[i] != opened:
                    if file is not None:
                        file.close()
                    opened = int(shard.part[i])
                    file = open(listing_of(self.folder, opened), "rb")  # noqa: SIM115
                file.seek(int(shard.start[i]))
                found[i] = read_listed(file.readline())
        finally:
            if file is not None:
                file.close()
        return [one for one in found if one is not None]

    def _sample(self, listed: Listed) -> dict[str, str | bytes] | LeftOut:
        # A spool is named without its folder, a source's file in full.
        path = listed.path if os.path.isabs(listed.path) else str(self.folder / listed.path)
        try:
            picture = read(Stored(path, listed.offset, listed.size))
        except (ValueError, FileNotFoundError, PermissionError) as error:
            return LeftOut(listed.key, f"it has vanished or changed since it was listed ({error})")
        sample: dict[str, str | bytes] = {"__key__": listed.key, listed.suffix: picture}
        labels = listed.labels or [self.number[name] for name in listed.classes]
        if labels:
            sample["cls"] = " ".join(map(str, labels)).encode()
        if listed.text is not None:
            sample["txt"] = listed.text.encode()
        if listed.extra is not None:
            sample["json"] = json.dumps(listed.extra, ensure_ascii=False, sort_keys=True).encode(
                "utf-8", "backslashreplace"
            )
        return sample


def facts_of(folder: Path, name: str) -> Path:
    """What was told of a shard when it was written."""
    return folder / f"{name}.json"


def written_before(folder: Path, out: Path, name: str) -> Written | None:
    """A shard that is there and was told of; None where it is to be written."""
    if not (out / name).exists() or not facts_of(folder, name).exists():
        return None
    name, samples, labels, left = json.loads(facts_of(folder, name).read_text())
    return Written(name, samples, labels, [LeftOut(*one) for one in left])
