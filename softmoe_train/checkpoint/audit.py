"""This file owns the account of a resume: from where, how the ranks lay when it was saved and lie now, what was read."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softmoe_train.checkpoint.reader import Loaded
from softmoe_train.checkpoint.remote import Place
from softmoe_train.config import flat
from softmoe_train.parallel.layout import axis_of


class Audit(NamedTuple):
    """What is told of one resume."""

    path: Place
    before: str  # the layout
    now: str
    read: Loaded
    position: int  # of the next global sample
    loop: Mapping[str, Any]  # the rest of what is not tensors: counts, the best checkpoint
    left_out: str  # what could not be taken over, or nothing
    changed: Sequence[str]  # settings that shape the numbers and are not those of the checkpoint
    set_aside: Sequence[str]  # newer checkpoints, which are damaged

    def line(self, step: int, steps: int) -> str:
        """The account in one line, for people."""
        layout = f"{self.now}, as before" if self.now == self.before else f"{self.before} -> {self.now}"
        parts = [f"{layout}; read {self.read}, data position {self.position:,}"]
        parts += [self.left_out] if self.left_out else []
        parts += [f"changed: {', '.join(self.changed)}"] if self.changed else []
        parts += [f"damaged, set aside: {', '.join(self.set_aside)}"] if self.set_aside else []
        return f"resumed from {self.path} at step {step} of {steps}: {'; '.join(parts)}"

    def facts(self) -> dict[str, Any]:
        """The account as JSON, for programs."""
        return {
            "checkpoint": str(self.path),
            "before": self.before,
            "now": self.now,
            "tensors": self.read.tensors,
            "bytes": self.read.bytes,
            "loop": dict(self.loop),
            "left_out": self.left_out,
            "changed": list(self.changed),
            "set_aside": list(self.set_aside),
        }


def layout_words(settings: Mapping[str, Any], *, num_experts: int, size: int) -> str:
    """How a run with these settings, as they are saved, lies on `size` ranks: `4 processes, expert axis 2, fsdp, float32`."""
    values = flat(dict(settings))
    words = ["1 process" if size == 1 else f"{size} processes"]
    if size > 1:
        setting = values.get("parallel.expert_axis", "auto")
        words.append(f"expert axis {axis_of(setting, num_experts=num_experts, size=size)}")
    if values.get("engine.kind") == "deepspeed":
        words.append(f"DeepSpeed ZeRO {values.get('engine.zero_stage')}")
    elif size > 1:
        part = values.get("parallel.shard_size")
        sharding = values.get("parallel.sharding", "unknown sharding")  # of another version, perhaps
        words.append(sharding if part is None else f"{sharding} over {part}")
    return ", ".join([*words, values.get("precision", "unknown precision")])
