"""This file owns which metrics judge a model: the paper's three numbers (paper.md 6), and which way a metric is better."""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple


class Number(NamedTuple):
    """One of the three: the mean of a measure over the sets on which it was taken, or over the one that `of` names."""

    title: str
    source: str
    measure: str
    of: str | None = None

    def metrics(self, names: Iterable[str]) -> dict[str, str]:
        """Those of `names` that it is the mean of, by set."""
        found = (name.split("/") for name in names)
        ours = (parts for parts in found if [parts[0], *parts[2:]] == [self.source, self.measure])
        of = {parts[1]: "/".join(parts) for parts in ours if self.of in (None, parts[1])}
        # Of a fine-tuning itself: parts of one set, of which what was held out counts only as long as nothing is tested.
        parts = [part for part in ("test", "val") if self.source == "finetune" and part in of]
        return {parts[0]: of[parts[0]]} if parts else of


UPSTREAM = Number("held-out top-1", "upstream", "top1", of="test")
FEWSHOT = Number("few-shot 10", "fewshot", "10shot")
FINETUNE = Number("fine-tune top-1", "finetune", "top1")
NUMBERS = (UPSTREAM, FEWSHOT, FINETUNE)
MEASURED = (
    "upstream",
    "fewshot",
    "knn",
    "probe",
    "finetune",
    "zeroshot",
)  # sources that judge a model; also with _average
HIGHER = re.compile(r"top\d+|\d+shot|accuracy")
LOWER = re.compile(r"loss|calibration_error")


def source_of(metric: str) -> str:
    """The first part of a metric's name, of averaged weights too."""
    return metric.partition("/")[0].removesuffix("_average")


def better(metric: str) -> Literal["max", "min"] | None:
    """Which of a metric's values is its best; None where it says nothing about the model's quality."""
    measure = metric.rpartition("/")[2]
    if metric == "train/loss":
        return "min"
    if source_of(metric) not in MEASURED or metric.count("/") < 2:
        return None
    return "max" if HIGHER.fullmatch(measure) else "min" if LOWER.fullmatch(measure) else None
