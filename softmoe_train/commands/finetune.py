"""This file owns `softmoe finetune`: the training of a checkpoint's weights on a set of its own, which is `train` with another configuration."""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from softmoe_train.at_end import is_complete, summary_of
from softmoe_train.checkpoint.best import metric_of
from softmoe_train.commands.elastic import check_train
from softmoe_train.commands.eval import eval_checkpoint
from softmoe_train.commands.sweep import refuse_launcher
from softmoe_train.commands.train import run_training
from softmoe_train.config import ConfigError, flat
from softmoe_train.data import SyntheticConfig, WebDatasetConfig, facts_of_test
from softmoe_train.finetune import compose_finetune
from softmoe_train.observe.run_files import replace_text
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.drive import exit_code, make_sweep, run_sweep, tell_end
from softmoe_train.sweep.points import Kind, Point
from softmoe_train.sweep.result import write_results

HELD_OUT, TEST = "finetune/val/top1", "finetune/test/top1"
TEST_FILE = "test.json"  # in the folder of the chosen run
FAILED = 1
PLACES = ("train", "test", "cache", "classes", "quarantine")  # of data: files that may be elsewhere now

Metrics = dict[str, float | None]  # None: it was not finite


def finetune(overrides: list[str], *, print_only: bool) -> int:
    """Compose around the checkpoint, check, then train; raises ConfigError before anything is started."""
    return run_training("finetune", compose_finetune, overrides, print_only=print_only)


def choose(overrides: list[str]) -> int:
    """Fine-tune at every point of a sweep and choose on held-out images; only the chosen one is tested.

    Points that are complete are not repeated: the same command goes on. Those that fail or diverge are told and not chosen; where none
    is left, the exit code is that of the worst that failed, or 1. Raises ConfigError with the mistakes of all points first.
    """
    refuse_launcher("finetune")
    check = lambda c, world: check_train(c, world) + _held_out_problems(c)  # noqa: E731
    kind = Kind("finetune", compose_finetune, check, ("evals.finetune.test=false",), outdated=TEST_FILE)
    made = make_sweep(kind, overrides)
    if metric_of(made.measure) != HELD_OUT:
        raise ConfigError(
            [f"sweep.measure={made.measure}: a fine-tuning is chosen by the highest {HELD_OUT}; leave it out"]
        )
    outcomes = run_sweep(made)
    if not outcomes or not all(one.state in ("complete", "failed") for one in outcomes):
        tell_end(made, outcomes)
        return exit_code(outcomes)
    ranked = sorted(made.points, key=lambda point: held_out(point) or (-math.inf, -math.inf), reverse=True)
    best = ranked[0]
    print(*write_results(made.folder, outcomes, made.measure), sep="\n", flush=True)
    tell_end(made, outcomes)
    if held_out(best) is None:
        print(told(ranked, None), flush=True)
        print("softmoe finetune: every point failed or diverged, so none is chosen", file=sys.stderr, flush=True)
        return exit_code(outcomes) or FAILED
    code = _test(best)
    if not code:
        print(told(ranked, _account(best)["metrics"][TEST]), flush=True)
        print(f"run folder of the chosen one: {best.folder}", flush=True)
    return code


def metrics(point: Point) -> Metrics | None:
    """What a point has measured, where it has come to its end with these settings."""
    return summary_of(point.config)["metrics"] if is_complete(point.config) else None


def held_out(point: Point) -> tuple[float, float] | None:
    """Its top-1 on held-out images and its loss there, negated; None where it failed or diverged."""
    measured = metrics(point) or {}
    top1, loss = measured.get(HELD_OUT), measured.get("finetune/val/loss")
    return None if top1 is None or loss is None else (top1, -loss)


def _test(best: Point) -> int:
    """Have its account say what it comes to on data.test, unless it says so already of these images and these weights."""
    account, of = best.folder / TEST_FILE, _of(best.config)
    kept = _account(best)
    if kept.get("of") == of and TEST in kept.get("metrics", {}):
        return 0
    account.unlink(missing_ok=True)
    words = [f"ckpt={best.folder}", "evals=[finetune]", "evals.finetune.test=true", f"out={account}"]
    code = eval_checkpoint([*words, *_as_asked(best.config)])
    if not code:
        replace_text(account, json.dumps({**_account(best), "of": of}, indent=1) + "\n")
    return code


def _account(best: Point) -> dict[str, Any]:
    try:
        found = json.loads((best.folder / TEST_FILE).read_text())
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
    chosen = held_out(ranked[0]) is not None
    for number, point in enumerate(ranked):
        found = held_out(point)
        on_them = "failed" if metrics(point) is None else "diverged" if found is None else f"{found[0]:.4f}"
        tested = f"{'not finite' if test is None else f'{test:.4f}'}, chosen" if chosen and number == 0 else "-"
        lines.append(f"{point.label:<{width}}  {on_them:<14}  {tested}")
    return "\n".join(lines)
