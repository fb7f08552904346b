"""This file owns `softmoe finetune`: the training of a checkpoint's weights on a set of its own, which is `train` with another configuration."""

import json
from pathlib import Path
from typing import NamedTuple

from softmoe_train.commands.elastic import check_train
from softmoe_train.commands.eval import eval_checkpoint
from softmoe_train.commands.train import run_training
from softmoe_train.commands.workers import under_a_launcher
from softmoe_train.config import ConfigError, expand_sweep
from softmoe_train.finetune import compose_finetune, key_of
from softmoe_train.settings import RunConfig

HELD_OUT, TEST = "finetune/val/top1", "finetune/test/top1"
TEST_FILE = "test.json"  # in the folder of the chosen run


def finetune(overrides: list[str], *, print_only: bool) -> int:
    """Compose around the checkpoint, check, then train; raises ConfigError before anything is started."""
    return run_training("finetune", compose_finetune, overrides, print_only=print_only)


class Point(NamedTuple):
    """One of several fine-tunings among which is chosen: what it is called, its overrides, and the run that they are."""

    label: str
    overrides: list[str]
    config: RunConfig

    def metrics(self) -> dict[str, float] | None:
        """What it has measured, where it has come to its end."""
        try:
            summary = json.loads((self.config.folder / "summary.json").read_text())
        except (OSError, ValueError):
            return None
        return summary["metrics"] if summary.get("ended") == "complete" else None


def choose(overrides: list[str]) -> int:
    """Fine-tune at every point of a sweep, one after another, and choose on held-out images; only the chosen one is tested.

    Points that are complete are not repeated: the same command goes on. Raises ConfigError with the mistakes of all points first.
    """
    points = _points(overrides)
    for number, point in enumerate(points, start=1):
        if point.metrics() is None:
            print(f"point {number} of {len(points)}: {point.label}", flush=True)
            code = finetune(point.overrides, print_only=False)
            if code or point.metrics() is None:
                return code
    best, *others = sorted(points, key=_worth, reverse=True)
    account = best.config.folder / TEST_FILE
    if not account.is_file():
        words = [f"ckpt={best.config.folder}", "evals=[finetune]", "evals.finetune.test=true", f"out={account}"]
        where = [f"processes={best.config.processes}", f"device={best.config.device}"]
        code = eval_checkpoint([*words, *where])
        if code:
            return code
    print(told(best, others, json.loads(account.read_text())["metrics"][TEST]), flush=True)
    return 0


def _points(overrides: list[str]) -> list[Point]:
    swept = [key_of(override) for override in overrides if len(expand_sweep([override])) > 1]
    problems, points = [], []
    if under_a_launcher():
        problems.append(
            "softmoe finetune -m starts its runs one after another by itself; use processes=N, without a launcher"
        )
    if not swept:
        problems.append(
            "no override has several values; write them as in schedule.peak=0.003,0.01,0.03, or leave -m out"
        )
    for words in expand_sweep(overrides) if not problems else []:
        label = "_".join(word for word in words if key_of(word) in swept)
        try:
            folder = Path(compose_finetune(words, lambda _: []).run_dir) / label.replace("/", "-")
            own = ("run_dir", "evals.finetune.test")
            words = [
                *(word for word in words if key_of(word) not in own),
                f"run_dir={folder}",
                "evals.finetune.test=false",
            ]
            config = compose_finetune(words, lambda c: check_train(c, None) + _held_out_problems(c))
        except ConfigError as error:
            problems += error.problems
            continue
        points.append(Point(label, words, config))
    if problems:
        raise ConfigError(problems)
    return points


def _held_out_problems(config: RunConfig) -> list[str]:
    """Why there would be nothing to choose by."""
    if config.data.holdout is None:
        return [
            "data.holdout=null: there are no held-out images to choose by; use a share of the training images, as data.holdout=0.02"
        ]
    if config.evals.finetune is None:
        return ["evals.finetune=null: nothing measures the held-out images; leave it on (evals=[finetune])"]
    return []


def _worth(point: Point) -> tuple[float, float]:
    metrics = point.metrics()
    assert metrics is not None
    return metrics[HELD_OUT], -metrics["finetune/val/loss"]


def told(best: Point, others: list[Point], test: float) -> str:
    """The points with what each came to on held-out images, the best first, and the best one's test number."""
    width = max(len(point.label) for point in (best, *others))
    lines = [f"{'':<{width}}  held-out top-1  test top-1"]
    lines += [
        f"{point.label:<{width}}  {_worth(point)[0]:<14.4f}  {f'{test:.4f}, chosen' if point is best else '-'}"
        for point in (best, *others)
    ]
    return "\n".join([*lines, f"run folder of the chosen one: {best.config.folder}"])
