"""This file owns what is said of a router that has collapsed, or has learned nothing: when, in which words, and how often."""

from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

from pydantic import Field

from softmoe_train.config import Record
from softmoe_train.observe.figures import Alarm

Limit = Annotated[float, Field(gt=0, le=1)]
WELL = 0.8  # of a limit, below which what was said once may be said again

BACK = "go back to a checkpoint from before it and"
LOWER = f"{BACK} lower schedule.peak, with allow_changes=true, or keep model.moe.soft.normalize=true"


class AlarmsConfig(Record):
    """From which share on people are told; of the slots, tokens or experts of a block."""

    one_hot_slots: Limit
    one_hot_tokens: Limit
    slot_similarity: Limit  # mean correlation of slots
    dead_slots: Limit
    dead_experts: Limit
    load_spread: Annotated[float, Field(gt=1)]  # of sparse routers: the highest load over the mean one
    scale: Annotated[float, Field(gt=0)]  # of the router, either sign
    uniform: Limit  # of slots and of tokens
    uniform_after: Annotated[int, Field(ge=1)]  # steps, before which a uniform router is none to worry about


class Kind(NamedTuple):
    """A way to go wrong. Above `measure`'s limit it is there; `what` follows "in block 3 " and holds the value as {}."""

    measure: str
    title: str
    what: str
    remedy: str


KINDS = (
    Kind(
        "one_hot_slots",
        "dispatch has collapsed",
        "{:.0%} of the slots read one token alone, so experts see next to nothing of an image",
        LOWER,
    ),
    Kind(
        "one_hot_tokens",
        "combine has collapsed",
        "{:.0%} of the tokens read one slot alone, so most of what the experts computed is lost",
        LOWER,
    ),
    Kind(
        "slot_similarity",
        "slots have become one",
        "slots read nearly the same tokens (mean correlation {:.2f}), so all experts get the same input",
        f"{BACK} lower schedule.peak, with allow_changes=true; with few experts, model.moe.expert_init=independent",
    ),
    Kind(
        "dead_slots",
        "slots are dead",
        "{:.0%} of the slots are hardly read by any token: what they cost is wasted",
        f"use fewer slots, or {LOWER}",
    ),
    Kind(
        "dead_experts",
        "experts are dead",
        "{:.0%} of the experts serve hardly any token, and hardly learn any more",
        f"use fewer experts, or {BACK} lower schedule.peak, with allow_changes=true (sparse routers: more weight on the auxiliary losses)",
    ),
    Kind(
        "load_spread",
        "the load has collapsed",
        "the busiest expert is asked for {:.1f} times as often as the mean one",
        f"{BACK} give model.moe.tokens_choice.importance_loss, load_loss or gshard_loss more weight, with allow_changes=true",
    ),
    Kind(
        "scale",
        "the scale runs away",
        "the router's scale is {:.3g}: its softmaxes can do nothing but saturate, and their gradients vanish",
        f"let it decay (optim.decay.router_scale), or {BACK} lower schedule.peak, with allow_changes=true",
    ),
    Kind(
        "uniform",
        "the router has learned nothing",
        "{:.0%} or more of slots and of tokens are near-uniform still: every slot is about the mean of the image, so every expert sees the same",
        "raise schedule.peak, or check that router parameters are trained (no pattern freezes them, and train/grad_norm is not 0)",
    ),
)


class Alarms:
    """Says each kind once for each block, and again only after that block was well in between.

    It remembers nothing across processes: a run that is resumed in that state says it once more.
    """

    def __init__(self, config: AlarmsConfig) -> None:
        self.limits = config.model_dump()
        self.known: dict[str, set[int]] = {kind.measure: set() for kind in KINDS}

    def see(self, step: int, measures: Mapping[int, Mapping[str, float]]) -> Iterator[tuple[str, Alarm]]:
        """What is to be said of the measures by block, all blocks of a kind in one alarm."""
        for kind in KINDS:
            values = {block: self._value(kind, step, of) for block, of in measures.items()}
            limit, known = self.limits[kind.measure], self.known[kind.measure]
            known.difference_update(block for block, value in values.items() if value < WELL * limit)
            new = {block: value for block, value in values.items() if value >= limit and block not in known}
            known.update(new)
            if new:
                yield kind.measure, Alarm(kind.title, f"step {step}: {_where(new, kind)}; {kind.remedy}")

    def _value(self, kind: Kind, step: int, of: Mapping[str, float]) -> float:
        """What is compared with the limit; 0 where this router has no such measure."""
        if kind.measure == "uniform":
            return (
                0.0
                if step < self.limits["uniform_after"]
                else min(of.get(f"uniform_{one}", 0.0) for one in ("slots", "tokens"))
            )
        return abs(of.get(kind.measure, 0.0))


def _where(values: Mapping[int, float], kind: Kind) -> str:
    blocks = f"in block{'s' if len(values) > 1 else ''} {', '.join(map(str, values))}"
    return f"{blocks} {kind.what.format(max(values.values()))}"
