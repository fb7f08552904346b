"""This file owns `softmoe finetune`: the training of a checkpoint's weights on a set of its own, which is `train` with another configuration."""

import hashlib
import json
import math
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from softmoe_train.at_end import is_complete, summary_of
from softmoe_train.commands.allocation import NO_MEMORY, no_memory
from softmoe_train.commands.elastic import check_train
from softmoe_train.commands.eval import eval_checkpoint
from softmoe_train.commands.train import run_training
from softmoe_train.commands.workers import under_a_launcher
from softmoe_train.config import ConfigError, expand_sweep, flat
from softmoe_train.data import SyntheticConfig, WebDatasetConfig, facts_of_test
from softmoe_train.finetune import compose_finetune, key_of
from softmoe_train.launching.worker import RESUME
from softmoe_train.observe.run_files import replace_text
from softmoe_train.settings import RunConfig

HELD_OUT, TEST = "finetune/val/top1", "finetune/test/top1"
TEST_FILE = "test.json"  # in the folder of the chosen run
FAILED = 1
# Of a point that is to go on with the same command: after stop_after or a time limit, when asked to end, by a signal.
ASKED_TO_END = (0, RESUME, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))
PLACES = ("train", "test", "cache", "classes", "quarantine")  # of data: files that may be elsewhere now

Metrics = dict[str, float | None]  # None: it was not finite


def finetune(overrides: list[str], *, print_only: bool) -> int:
    """Compose around the checkpoint, check, then train; raises ConfigError before anything is started."""
    return run_training("finetune", compose_finetune, overrides, print_only=print_only)


class Point(NamedTuple):
    """One of several fine-tunings among which is chosen: what it is called, its overrides, and the run that they are."""

    label: str
    overrides: list[str]
    config: RunConfig

    def metrics(self) -> Metrics | None:
        """What it has measured, where it has come to its end with these settings."""
        return summary_of(self.config)["metrics"] if is_complete(self.config) else None

    def held_out(self) -> tuple[float, float] | None:
        """Its top-1 on held-out images and its loss there, negated; None where it failed or diverged."""
        metrics = self.metrics() or {}
        top1, loss = metrics.get(HELD_OUT), metrics.get("finetune/val/loss")
        return None if top1 is None or loss is None else (top1, -loss)


def choose(overrides: list[str]) -> int:
    """Fine-tune at every point of a sweep, one after another, and choose on held-out images; only the chosen one is tested.

    Points that are complete are not repeated: the same command goes on. Those that fail or diverge are told and not chosen; where none
    is left, the exit code is that of the last that failed, or 1. Raises ConfigError with the mistakes of all points first.
    """
    points, last = _points(overrides), FAILED
    for number, point in enumerate(points, start=1):
        if point.metrics() is None:
            print(f"point {number} of {len(points)}: {point.label}", flush=True)
            (point.config.folder / TEST_FILE).unlink(missing_ok=True)
            code = _trained(point)
            if point.metrics() is None:
                if code in ASKED_TO_END:
                    return code
                print(f"softmoe finetune: {point.label} failed with exit code {code}", file=sys.stderr, flush=True)
                last = code
    ranked = sorted(points, key=lambda point: point.held_out() or (-math.inf, -math.inf), reverse=True)
    best = ranked[0]
    if best.held_out() is None:
        print(told(ranked, None), flush=True)
        print("softmoe finetune: every point failed or diverged, so none is chosen", file=sys.stderr, flush=True)
        return last
    code = _test(best)
    if not code:
        print(told(ranked, _account(best)["metrics"][TEST]), flush=True)
        print(f"run folder of the chosen one: {best.config.folder}", flush=True)
    return code


def _trained(point: Point) -> int:
    """The exit code of its training; what ends it in this process ends no other point."""
    try:
        return finetune(point.overrides, print_only=False)
    except ConfigError as error:  # of data that only reading shows, say
        print(f"softmoe finetune: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        said = no_memory("finetune", error)
        if said is None:
            traceback.print_exc()
            return FAILED
        print(f"softmoe finetune: {said}", file=sys.stderr, flush=True)
        return NO_MEMORY


def _test(best: Point) -> int:
    """Have its account say what it comes to on data.test, unless it says so already of these images and these weights."""
    account, of = best.config.folder / TEST_FILE, _of(best.config)
    kept = _account(best)
    if kept.get("of") == of and TEST in kept.get("metrics", {}):
        return 0
    account.unlink(missing_ok=True)
    words = [f"ckpt={best.config.folder}", "evals=[finetune]", "evals.finetune.test=true", f"out={account}"]
    code = eval_checkpoint([*words, *_as_asked(best.config)])
    if not code:
        replace_text(account, json.dumps({**_account(best), "of": of}, indent=1) + "\n")
    return code


def _account(best: Point) -> dict[str, Any]:
    try:
        found = json.loads((best.config.folder / TEST_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _as_asked(config: RunConfig) -> list[str]:
    """Overrides for what a checkpoint's own settings may say otherwise: where the images are now, and on what to compute."""
    assert config.evals.finetune is not None
    words = [f"processes={config.processes}", f"device={config.device}"]
    words.append(f"evals.finetune.batch_size={config.evals.finetune.batch_size}")
    if isinstance(config.data, SyntheticConfig):
        return words
    given = flat(config.data.model_dump(include=set(PLACES)))
    return [*words, *(f"data.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items())]


def _of(config: RunConfig) -> dict[str, Any]:
    """What a test number is of: which run at which step, and which images, read how."""
    data = {
        key: value for key, value in config.as_saved()["data"].items() if key not in ("cache", "workers", "prefetch")
    }
    facts: list[Any] = []
    if isinstance(config.data, WebDatasetConfig):
        facts = [
            facts_of_test(config.data),
            *(_bytes_of(path) for path in (config.data.classes, config.data.quarantine)),
        ]
    digest = hashlib.sha256(json.dumps([facts, data], sort_keys=True).encode()).hexdigest()
    run = summary_of(config).get("wandb_id")
    return {"run": run, "step": config.steps, "data.test": data.get("test"), "digest": digest}


def _bytes_of(path: str | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


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


def told(ranked: list[Point], test: float | None) -> str:
    """The points with what each came to on held-out images, the best first, and the test number of the first, where one is chosen."""
    width = max(len(point.label) for point in ranked)
    lines = [f"{'':<{width}}  held-out top-1  test top-1"]
    chosen = ranked[0].held_out() is not None
    for number, point in enumerate(ranked):
        found = point.held_out()
        held_out = "failed" if point.metrics() is None else "diverged" if found is None else f"{found[0]:.4f}"
        tested = f"{'not finite' if test is None else f'{test:.4f}'}, chosen" if chosen and number == 0 else "-"
        lines.append(f"{point.label:<{width}}  {held_out:<14}  {tested}")
    return "\n".join(lines)
