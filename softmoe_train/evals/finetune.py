"""This file owns the measures of a fine-tuning: the held-out part of its training images as it goes, the test images once, at its end."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from softmoe_train.config import Record
from softmoe_train.evals.upstream import UpstreamEvaluator
from softmoe_train.loop import TrainState


class FinetuneEvalConfig(Record):
    """When to measure on the part that `data.holdout` sets aside, and whether on `data.test` at the last step."""

    every: Annotated[int, Field(ge=0)]  # steps; 0 only at the end
    batch_size: Annotated[int, Field(ge=1)]  # images of each rank at a time
    test: bool  # measure on data.test, at the last step alone: what is chosen by it would not be held out


class FinetuneAtEnd(Record):
    """A fine-tuning of a run's last weights when it is complete: a recipe of conf/recipe/finetune, and what is said on top of it."""

    recipe: str
    overrides: list[str]


def _with_overrides(asked: Any) -> Any:
    """What is asked for by name, with no overrides where none are given."""
    if not isinstance(asked, dict):
        return asked
    for name, one in asked.items():
        given = one.get("overrides") if isinstance(one, dict) else None
        if given is not None and not (isinstance(given, list) and all(isinstance(word, str) for word in given)):
            raise ValueError(
                f"finetune.{name}.overrides={given}: it must be a list of quoted words; write it, whole and quoted for the shell too, as "
                f'\'finetune.{name}.overrides=["steps=100","schedule.peak=0.01"]\''
            )
    return {name: {"overrides": [], **one} if isinstance(one, dict) else one for name, one in asked.items()}


FinetunesAtEnd = Annotated[dict[str, FinetuneAtEnd], BeforeValidator(_with_overrides)]


class FinetuneEvaluator:
    """Measures `val/...` whenever it is due and `test/...` at step `last`, each as upstream does; None leaves a part out."""

    def __init__(
        self, config: FinetuneEvalConfig, val: UpstreamEvaluator | None, test: UpstreamEvaluator | None, last: int
    ) -> None:
        self.every = config.every
        self.val, self.test, self.last = val, test, last

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """The measures of both parts, by the part's name."""
        if self.val is not None:
            yield from self.val.run(state)
        if self.test is not None and state.step == self.last:
            yield from self.test.run(state)
