"""This file owns what a check tells: tables for people, a document for programs, and the list of samples that training is to leave out."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from softmoe_train.data.quarantine import read_quarantine
from softmoe_train.observe.run_files import replace_text
from softmoe_train.shards.check import Checked, Whole
from softmoe_train.shards.findings import NOTICES, PROBLEMS, Finding
from softmoe_train.shards.settings import StoppedError

_SHOWN = 12  # worlds, classes


def print_checked(checked: Checked) -> None:
    """What there is, what is wrong with it with examples, and what it can feed."""
    for split, whole in checked.splits.items():
        print(f"{split}: {whole.samples:,} samples in {whole.shards:,} shards, {whole.bytes / 2**20:,.1f} MiB")
        for line in _facts(whole, checked.num_classes):
            print(f"  {line}")
    _print_kinds(checked, list(PROBLEMS), "problem")
    _print_kinds(checked, list(NOTICES), "notice")
    feeding = checked.feeding
    worlds = ", ".join(map(str, feeding.worlds[:_SHOWN])) + (" ..." if len(feeding.worlds) > _SHOWN else "")
    print(
        f"batch_size={feeding.batch_size} with data.streams={feeding.streams}: {feeding.steps:,.4g} steps a pass, the same on every rank; "
        f"{'ranks may be ' + worlds if worlds else 'no number of ranks is legal'}"
    )
    problems = checked.tally.problems
    print("no problem was found" if not problems else f"{problems:,} {'problem' if problems == 1 else 'problems'}")


def write_document(checked: Checked, path: str) -> None:
    """All of it as JSON, every finding too."""
    document: dict[str, Any] = {
        "splits": {split: _document(whole) for split, whole in checked.splits.items()},
        "num_classes": checked.num_classes,
        "counts": checked.tally.counts,
        "problems": checked.tally.problems,
        "feeding": vars(checked.feeding),
    }

    def lines() -> Iterator[str]:
        yield json.dumps(document, indent=1)[:-2] + ',\n "findings": ['
        for n, finding in enumerate(checked.tally.all()):
            yield ("\n  " if not n else ",\n  ") + json.dumps(finding._asdict())
        yield "\n ]\n}\n"

    _write_whole(path, lines())


def read_list(path: str) -> list[dict[str, Any]]:
    """The lines of a quarantine list, if it is there, with all that they say; raises ValueError where training would not take one."""
    if not os.path.exists(path):
        return []
    read_quarantine(path, key="quarantine")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def write_quarantine(checked: Checked, path: str) -> tuple[int, int]:
    """Add what training is to leave out to the list at `path`; the number of samples that are new, and of all."""
    before = read_list(path)
    known = {(entry["sha256"], entry["key"]) for entry in before}
    new: dict[tuple[str, str], Finding] = {}
    for finding in checked.tally.quarantined():
        if (finding.sha256, finding.key) not in known:
            new.setdefault((finding.sha256, finding.key), finding)
    entries = [
        *before,
        *({key: getattr(one, key) for key in ("shard", "sha256", "key", "reason")} for one in new.values()),
    ]
    _write_whole(path, (json.dumps(entry) + "\n" for entry in entries))
    return len(new), len(entries)


def _facts(whole: Whole, num_classes: int) -> list[str]:
    lines = [f"{whole.good:,} of them good" if whole.good < whole.samples else "all of them good"]
    if whole.labels:
        least, most = min(whole.labels.values()), max(whole.labels.values())
        lines.append(f"{len(whole.labels):,} of {num_classes:,} classes, {least:,} to {most:,} samples each")
    if whole.pixels.count:
        for name, spread, digits in (
            ("pixels", whole.pixels, 0),
            ("bytes", whole.sizes, 0),
            ("width / height", whole.aspect, 2),
        ):
            values = (spread.least, spread.quantile(0.5), spread.most)
            lines.append(f"{name} {' / '.join(f'{value:,.{digits}f}' for value in values)} (least, median, most)")
    return lines


def _print_kinds(checked: Checked, kinds: list[str], title: str) -> None:
    found = [kind for kind in kinds if checked.tally.count(kind)]
    if not found:
        return
    splits = list(checked.splits)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, column in enumerate((title, *splits, "such as")):
        table.add_column(
            column,
            justify="right" if 0 < number <= len(splits) else "left",
            no_wrap=number <= len(splits),
            overflow="fold",
        )
    for kind in found:
        counts = checked.tally.counts[kind]
        examples = "\n".join(_one(example) for example in checked.tally.examples[kind])
        table.add_row(kind, *(f"{counts.get(split, 0):,}" for split in splits), examples)
    width = None if sys.stdout.isatty() else 200
    print()
    rich.console.Console(file=sys.stdout, width=width, highlight=False, markup=False).print(table)
    print()


def _one(finding: Finding) -> str:
    where = " ".join(word for word in (finding.shard, finding.key) if word)
    text = ": ".join(word for word in (where, finding.reason) if word)
    return "".join(
        letter if letter.isprintable() else "?" for letter in text
    )  # a key may hold what moves a terminal's cursor


def _document(whole: Whole) -> dict[str, Any]:
    return {
        "shards": whole.shards,
        "samples": whole.samples,
        "good": whole.good,
        "bytes": whole.bytes,
        "labels": {str(label): whole.labels[label] for label in sorted(whole.labels)},
        "pixels": whole.pixels.as_document(),
        "picture_bytes": whole.sizes.as_document(),
        "aspect": whole.aspect.as_document(),
    }


def _write_whole(path: str, lines: Iterator[str]) -> None:
    try:
        replace_text(Path(path), "".join(lines))
    except OSError as error:
        raise StoppedError(f"{path} cannot be written: {error}") from None
