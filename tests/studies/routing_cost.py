"""What looking at the routers costs beside training, timed in place: `python -m tests.studies.routing_cost [overrides of a run]`.

Both in CPU seconds of this process, which other jobs on the machine do not change much, and on the clock. The default is the cifar10 recipe's
model and batch in one process, on pictures made by arithmetic.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from softmoe_train import loop
from softmoe_train.config import compose
from softmoe_train.dist import World
from softmoe_train.evals.routing import RoutingEvaluator
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check

EVERY, LOOKS = 8, 4
DEFAULT = ["recipe=cifar10", "data=synthetic", "data.streams=20", "processes=1", "parallel.expert_axis=1"]
OURS = [f"steps={EVERY * LOOKS + 1}", "schedule.warmup_steps=2", "evals=[routing]", f"evals.routing.every={EVERY}"]
QUIET = ["checkpoint.every=0", "observe.wandb.mode=disabled", "observe.progress=off"]


def timed(work: Callable[..., Any], spent: list[tuple[float, float, bool]]) -> Callable[..., Any]:
    """`work`, noting CPU seconds, seconds, and whether expert updates were asked for."""

    def clocked(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time(), time.perf_counter()
        result = work(*args, **kwargs)
        result = result if isinstance(result, tuple) else iter(list(result))  # an evaluator's generator, to its end
        spent.append((time.process_time() - begin[0], time.perf_counter() - begin[1], kwargs.get("moves", False)))
        return result

    return clocked


def main(overrides: list[str]) -> None:
    """Print the share of training time that the default interval costs."""
    steps: list[tuple[float, float, bool]] = []
    looks: list[tuple[float, float, bool]] = []
    default = compose(RunConfig, [*DEFAULT, *overrides], lambda _: []).evals.routing
    assert default is not None
    with tempfile.TemporaryDirectory() as folder:
        run = compose(
            RunConfig, [*DEFAULT, *overrides, *OURS, *QUIET, f"run_dir={folder}/run"], lambda c: check(c, 1, 1)
        )
        step, look = loop.train_step, RoutingEvaluator.run
        loop.train_step, RoutingEvaluator.run = timed(step, steps), timed(look, looks)
        train(run, World(rank=0, size=1, local_rank=0, local_size=1))
    images = -(-default.images // run.data.streams) * run.data.streams
    for kind, name in enumerate(("CPU seconds", "seconds")):
        plain = np.median([one[kind] for one in steps[2:] if not one[2]])
        moved = np.median([one[kind] for one in steps[2:] if one[2]])
        seen = np.median([one[kind] for one in looks[1:]])
        share = (seen + max(0.0, moved - plain)) / (default.every * plain)
        print(
            f"{name}: a step {plain:.3f}, one that tells expert updates {moved:.3f}, a look at {images} images {seen:.3f} "
            f"(the first, which reads them, {looks[0][kind]:.3f}); every {default.every} steps {share:.2%} of training"
        )
    print(f"FLOPs of its forward: {images / (3 * default.every * run.batch_size):.3%} of training's")


if __name__ == "__main__":
    main(sys.argv[1:])
