"""This file owns a warm start: reading what fits into the tensors of an engine, and the account of it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_train.checkpoint.agreement import CheckpointError, agree
from softmoe_train.checkpoint.layout import Box, local_box
from softmoe_train.engine.protocol import Engine
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import build_model
from softmoe_train.redact import without_secrets
from softmoe_train.warm.lazy import Lazy
from softmoe_train.warm.settings import WarmConfig
from softmoe_train.warm.sources import Source, opened_source
from softmoe_train.warm.surgery import Fit, fit

BUFFER = 64 * 2**20  # bytes of a tensor that are in host memory at a time, or one row
ACCOUNT = "warm.json"


class Warmed(NamedTuple):
    """What is told of one warm start."""

    what: str
    fit: Fit

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors were loaded, resampled, copied and created, and how many of the source's are left aside."""
        counted = Counter(begin.how for begin in self.fit.begins.values())
        return {how: counted[how] for how in ("loaded", "resampled", "copied", "created") if counted[how]} | {
            "ignored": len(self.fit.aside)
        }

    def line(self) -> str:
        """The account in one line, for people."""
        told = ", ".join(f"{count} {how}" for how, count in self.counts.items())
        return f"started from {self.what}: {told} tensors; each is in {ACCOUNT}"

    def facts(self) -> dict[str, Any]:
        """What the summary keeps of it."""
        return {"source": self.what, "counts": self.counts, "differences": self.fit.differences}

    def document(self) -> dict[str, Any]:
        """The account of every tensor, as JSON."""
        tensors = {
            name: {
                "how": begin.how,
                "from": [] if begin.values is None else list(begin.values.origin),
                "note": begin.note,
            }
            for name, begin in self.fit.begins.items()
        }
        return {
            "source": self.what,
            "counts": self.counts,
            "differences": self.fit.differences,
            "settings": self.fit.settings,
            "tensors": tensors,
            "ignored": self.fit.aside,
        }


def warm_problems(config: WarmConfig, model: ModelConfig, seed: int) -> list[str]:
    """Why a run cannot start from these weights; reads headers and starts nothing."""
    if config.source is None:
        return ["warm.source is not set; name the weights to start from, as in warm.source=runs/dense"]
    try:
        with opened_source(config) as source:
            problems = _fitted(source, config, model, seed).problems
            return [f"warm.source={source.what}: {problem}" for problem in problems]
    except CheckpointError as error:
        return [f"{error.what}: {problem}" for problem in error.problems]


def fresh_tensors(config: WarmConfig, model: ModelConfig, seed: int) -> list[str]:
    """The tensors of the model that these weights, which it can start from, do not give it."""
    with opened_source(config) as source:
        begins = _fitted(source, config, model, seed).begins
    return [name for name, begin in begins.items() if begin.how == "created"]


def start_warm(
    config: WarmConfig,
    model: ModelConfig,
    engine: Engine,
    *,
    seed: int,
    rank: int,
    world: int,
    group: dist.ProcessGroup | None,
) -> Warmed:
    """Fill the engine's weights from the source, each rank what it holds; its optimizer is fresh, an average starts from the weights.

    Every rank calls it; raises CheckpointError on all alike, before a weight is touched where bytes are not what was saved.
    """
    what = f"warm.source={without_secrets(config.source)} cannot be used"

    def stages() -> Warmed:
        with opened_source(config) as source:
            fitted = _fitted(source, config, model, seed)
            if fitted.problems:
                raise CheckpointError(what, fitted.problems)
            source.verify(rank, world)
        return Warmed(source.what, fitted)

    agree(what, stages, rank, group)
    tensors = {name: t for name, t in engine.state_dict().items() if not name.startswith("average.")}
    warmed = agree(f"{what}: the state is undefined", lambda: _fill(config, model, tensors, seed), rank, group)
    engine.load_state_dict(tensors)
    return warmed


def _fitted(source: Source, config: WarmConfig, model: ModelConfig, seed: int) -> Fit:
    shapes = {name: tuple(p.shape) for name, p in build_model(model, torch.float32).named_parameters()}
    return fit(source, shapes, model, config, seed)


def _fill(config: WarmConfig, model: ModelConfig, tensors: Mapping[str, Tensor], seed: int) -> Warmed:
    with opened_source(config) as source, torch.no_grad():
        fitted = _fitted(source, config, model, seed)
        for name, begin in fitted.begins.items():
            if begin.values is not None:
                _copy(name, begin.values, tensors[f"model.{name}"])
    return Warmed(source.what, fitted)


def _copy(name: str, values: Lazy, tensor: Tensor) -> None:
    """This rank's part of a tensor, some rows at a time."""
    box = local_box(name, tensor)
    # This rank's own part, placed as it is: nothing is reduced, so no gradient placement matters.
    target = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    if 0 in box.sizes:
        return
    row_bytes = 4 * target[0].numel()
    step = max(1, BUFFER // row_bytes)
    for first in range(0, box.sizes[0], step):
        count = min(step, box.sizes[0] - first)
        part = values.read(Box((box.offsets[0] + first, *box.offsets[1:]), (count, *box.sizes[1:])))
        if not bool(part.isfinite().all()):
            raise CheckpointError("not finite", [f"{name} would hold values that are not finite"])
        target[first : first + count].copy_(part)
