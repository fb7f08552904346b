"""This file owns measuring the averaged weights: any evaluator, run while the average stands in for the weights."""

from collections.abc import Iterator

from softmoe_train.loop import Evaluator, TrainState
from softmoe_train.observe.figures import Said


class AveragedEvaluator:
    """Measures what another evaluator does, at the same steps, of the averaged weights; the weights are back afterwards."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.every = evaluator.every
        self.evaluator = evaluator

    def run(self, state: TrainState) -> Iterator[tuple[str, Said]]:
        """The other's values; needs an engine that averages."""
        with state.engine.averaged():
            values = list(self.evaluator.run(state))  # all before the weights return
        yield from values
