"""This file owns a making from its beginning to its end: look at every picture, decide the order, write shards, say what was made.

Until it is complete, `out/.making` holds the plan, the listings and the spools. What is there already when the same command is given
again is not made again; the bytes of a shard depend on the pictures and the settings alone.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import softmoe_train
from softmoe_train.cores import usable_cores
from softmoe_train.observe.run_files import replace_text
from softmoe_train.shards.index import publish
from softmoe_train.shards.look import Look, Looked, left_out_in, left_out_of
from softmoe_train.shards.order import Listing, Shard, cut, read_listing, split
from softmoe_train.shards.processes import in_processes
from softmoe_train.shards.progress import shown_progress
from softmoe_train.shards.resize import Resize
from softmoe_train.shards.settings import Making, StoppedError
from softmoe_train.shards.source import LeftOut, Source
from softmoe_train.shards.write import PART, Write, Written, written_before

WORK = ".making"
PLAN, MADE, LEFT_OUT, CLASSES = "plan.json", "make.json", "left_out.jsonl", "classes.txt"
_NOT_WHAT = ("out", "processes", "progress", "max_broken")  # keys that do not change what is made
_LOCK_SECONDS = 5  # in which the workers of a killed making have gone
_SHOWN = 5  # reasons of what was left out


class Made(NamedTuple):
    """What is in the folder: shards and samples of each split, class names if there are any, and how much was left out."""

    splits: dict[str, tuple[int, int]]
    classes: int | None
    labels: int | None  # the largest, and one
    left_out: int
    already: bool


def make_shards(source: Source[Any], making: Making, *, classes: list[str] | None = None) -> Made:
    """Make shards of all pictures of `source` in the folder `out`, and the index of them; `classes` are names in the order of their numbers.

    Raises ValueError for settings that contradict each other, and StoppedError where the making cannot go on: the folder keeps what
    is done, and the same call goes on.
    """
    problems = making.problems()
    if problems:
        raise ValueError("\n".join(problems))
    assert making.out is not None
    out = Path(making.out)
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with _alone(out):
        try:
            return _make(
                source, making, out, {**asked_of(making), "facts": source.facts()}, classes or source.class_names()
            )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoppedError(
                    f"out={out}: {error.strerror}; free some room, and the same command goes on."
                ) from None
            raise StoppedError(f"{error}; when that is mended, the same command goes on.") from error
        finally:
            if not (out / WORK / PLAN).exists():  # the folder is another's
                shutil.rmtree(out / WORK, ignore_errors=True)


def asked_of(making: Making) -> dict[str, Any]:
    """What was asked for: every key that changes what is made, and the libraries whose bytes are in it."""
    asked = {key: value for key, value in making.model_dump(by_alias=True).items() if key not in _NOT_WHAT}
    return {**asked, "pillow": version("pillow")} if making.resize is not None else asked


def _make(source: Source[Any], making: Making, out: Path, asked: dict[str, Any], known: list[str] | None) -> Made:
    asked["class_names"] = None if known is None else hashlib.sha256(json.dumps(known).encode()).hexdigest()
    asked = json.loads(json.dumps(asked))
    done = _check_folder(out, asked)
    if done is not None:
        return done
    work = out / WORK
    (work / PLAN).write_text(json.dumps(asked, indent=1))
    for part in (*out.glob(f"*{PART}"), *work.glob("*.part")):
        if part.is_file():
            part.unlink()
    resize = None if making.resize is None else Resize(making.resize, making.resize_side, making.quality)
    look = Look(source, work, making.verify, resize, making.max_pixels)
    parts, left = _look(look, source.parts(), making)
    listing = read_listing(work, parts, known)
    left = _bounded([*left, *listing.left_out], out, making)
    if not len(listing):
        _write_left_out(out, left)
        raise StoppedError(f"there is not one picture in it{_reasons(left)}")
    shards = cut(listing, split(listing, making), making)
    number = {name: n for n, name in enumerate(listing.names or [])}
    written = _write(Write(work, out, number), shards, making, out, left)
    indexed = publish({str(out): [str(out / shard.name) for shard in shards]}, making.processes, making.progress)
    if indexed.problems:
        raise StoppedError("what was written cannot be read again: " + "\n".join(indexed.problems))
    return _finish(out, making, asked, listing, shards, written, left)


def _look(look: Look, parts: Iterable[Any], making: Making) -> tuple[int, list[LeftOut]]:
    """Look at every part; the number of parts, and what was left out of them."""
    left: list[LeftOut] = []
    looked = in_processes(look, enumerate(parts), making.processes or usable_cores())
    pairs: Iterator[tuple[Looked, int]] = ((one, one.pictures + one.left_out) for one in looked)
    count = 0
    for one in shown_progress(pairs, what="looked at", unit="pictures", total=None, kind=making.progress):
        count += 1
        if one.left_out:
            left += left_out_in(left_out_of(look.folder, one.number))
            _bounded(left, look.folder.parent, making)
    return count, left


def _write(write: Write, shards: list[Shard], making: Making, out: Path, left: list[LeftOut]) -> list[Written]:
    """Write the shards that are not there; facts of all, in order."""
    there = {shard.name: written_before(write.folder, out, shard.name) for shard in shards}
    todo = [shard for shard in shards if there[shard.name] is None]
    before = sum(one.samples for one in there.values() if one is not None)
    pairs = ((one, one.samples) for one in in_processes(write, todo, making.processes or usable_cores()))
    total = sum(len(shard.part) for shard in shards)
    lost = [one for shard in there.values() if shard is not None for one in shard.left_out]
    for one in shown_progress(pairs, what="written", unit="pictures", total=total, kind=making.progress, before=before):
        there[one.name] = one
        lost += one.left_out
        _bounded([*left, *lost], out, making)
    found = [there[shard.name] for shard in shards]
    return [one for one in found if one is not None]


def _finish(
    out: Path,
    making: Making,
    asked: dict[str, Any],
    listing: Listing,
    shards: list[Shard],
    written: list[Written],
    left: list[LeftOut],
) -> Made:
    left = [*left, *(one for shard in written for one in shard.left_out)]
    _write_left_out(out, left)
    if listing.names is not None:
        (out / CLASSES).write_text("".join(f"{name}\n" for name in listing.names), encoding="utf-8")
    splits = {}
    for name in dict.fromkeys(shard.name.rpartition("-")[0] for shard in shards):
        of = [one for one in written if one.name.rpartition("-")[0] == name]
        labels = sum((Counter(one.labels) for one in of), Counter[str]())
        splits[name] = {
            "shards": len(of),
            "samples": sum(one.samples for one in of),
            "bytes": sum((out / one.name).stat().st_size for one in of),
            "labels": {label: labels[label] for label in sorted(labels, key=int)},
        }
    largest = [int(label) for facts in splits.values() for label in facts["labels"]]
    document = {
        "asked": asked,
        "classes": None if listing.names is None else len(listing.names),
        "labels": max(largest) + 1 if largest else None,
        "left_out": dict(Counter(_kind(one.reason) for one in left).most_common()),
        "splits": splits,
        "versions": {
            "softmoe_train": softmoe_train.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("webdataset", "pillow", "simplejpeg", "numpy")},
        },
    }
    replace_text(out / MADE, json.dumps(document, indent=1) + "\n")
    shutil.rmtree(out / WORK)
    return _made(document, already=False)


def _check_folder(out: Path, asked: dict[str, Any]) -> Made | None:
    """What is made already, or None where there is something to do; raises StoppedError where the folder is another's."""
    shards = sorted(path.name for path in out.glob("*.tar"))
    for path in (out / MADE, out / WORK / PLAN):
        if not path.exists():
            continue
        try:
            document = json.loads(path.read_text())
        except ValueError:  # a plan that a full disk cut off: nothing was done under it
            path.unlink()
            continue
        before = document["asked"] if path.name == MADE else document
        changed = [key for key in sorted({*before, *asked}) if before.get(key) != asked.get(key)]
        if changed:
            told = "; ".join(
                f"{key}: {_brief(before.get(key))} there, {_brief(asked.get(key))} now" for key in changed[:_SHOWN]
            )
            raise StoppedError(
                f"out={out} holds another making ({told}): shards of two do not mix; give another folder, or empty this one."
            )
        if path.name == MADE:
            made = _made(document, already=True)
            expected = [f"{name}-{n:06d}.tar" for name, (count, _) in made.splits.items() for n in range(count)]
            if set(expected) <= set(shards):
                shutil.rmtree(out / WORK)
                return made
            path.unlink()
        return None
    if shards:
        raise StoppedError(
            f"out={out} holds {shards[0]}, which no making of ours wrote: give another folder, or empty this one."
        )
    return None


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder: two makings in it would overwrite each other. The workers hold it too, as long as they live."""
    begin = time.monotonic()
    while True:
        path = out / WORK / "lock"
        path.parent.mkdir(exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(
                os.fstat(handle), os.stat(path)
            ):  # else a making that ended took it away
                break
        except BlockingIOError:
            if time.monotonic() - begin > _LOCK_SECONDS:
                os.close(handle)
                raise StoppedError(
                    f"out={out}: another making is at work in it; let it end, or give another folder."
                ) from None
        os.close(handle)
        time.sleep(0.1)
    try:
        yield
    finally:
        os.close(handle)


def _bounded(left: list[LeftOut], out: Path, making: Making) -> list[LeftOut]:
    """What was left out, if it is borne."""
    if len(left) <= making.max_broken:
        return left
    _write_left_out(out, left)
    raise StoppedError(
        f"{len(left)} files that go into no shard are more than max_broken={making.max_broken}{_reasons(left)}\n"
        f"  each is told in {out / LEFT_OUT}; repair or remove them, or raise max_broken if their loss does not matter (the same command "
        "goes on)"
    )


def _reasons(left: list[LeftOut]) -> str:
    counts = Counter(_kind(one.reason) for one in left).most_common(_SHOWN)
    first = {_kind(one.reason): one.name for one in reversed(left)}
    return "".join(f"\n  {count:,} x {kind}, as {first[kind]}" for kind, count in counts)


def _kind(reason: str) -> str:
    """A reason without what is of one file only."""
    return reason.partition(" (")[0] if not reason[:1].isdigit() else "too many pixels"


def _write_left_out(out: Path, left: list[LeftOut]) -> None:
    replace_text(out / LEFT_OUT, "".join(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in left))


def _made(document: dict[str, Any], *, already: bool) -> Made:
    splits = {name: (facts["shards"], facts["samples"]) for name, facts in document["splits"].items()}
    return Made(splits, document["classes"], document["labels"], sum(document["left_out"].values()), already)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else "".join([*islice(text, 57), "..."])
