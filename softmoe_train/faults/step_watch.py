"""This file owns what steps leave on the device for the judgement of them, unread until all ranks look at it together."""

import torch
from torch import Tensor

from softmoe_train.dist import gather_over_world
from softmoe_train.faults.bad_batches import BadBatches
from softmoe_train.faults.bad_steps import BadSteps, BadStepsConfig, Judgement, SeenStep, judge, refuse_to_go_back
from softmoe_train.observe.log import SilentLog

MOST = 1000  # steps between two looks: what they leave is kept in memory


class StepWatch:
    """Keeps each step's loss and whether its update was a no-op, without a host sync or a collective, until `judge`.

    Bad steps are written down in `batches` (None on all ranks but the first) and told to `log`.
    """

    def __init__(self, config: BadStepsConfig, batches: BadBatches | None, log: SilentLog) -> None:
        self._config = config
        self._batches = batches
        self._log = log
        self._steps: list[tuple[int, int, int]] = []
        self._left: list[Tensor] = []

    @property
    def full(self) -> bool:
        """Whether it is time to look, whatever else is due; the same on every rank."""
        return len(self._steps) >= MOST

    def see(self, step: int, begin: int, end: int, loss: Tensor, skipped: Tensor) -> None:
        """Take a step with the global samples from `begin` up to `end`: this rank's share of the loss, 1.0 for a no-op."""
        self._steps.append((step, begin, end))
        self._left.append(torch.stack([loss.float(), skipped.float()]))

    def judge(self, before: BadSteps) -> Judgement:
        """Judge the steps since the last call, after `before`; collective over the world, with one answer for all ranks.

        Raises BadStepsError where too many were bad and the run is not to go back.
        """
        judgement = judge(self._config, before, self._read())
        if self._batches is not None:
            for bad in judgement.bad:
                for text in self._batches.write(bad):
                    self._log.warn(text)
        if judgement.too_much is not None:
            refuse_to_go_back(self._config, judgement.after, judgement.too_much)
        return judgement

    def _read(self) -> list[SeenStep]:
        if not self._steps:
            return []
        ranks = gather_over_world(torch.stack(self._left)).tolist()
        steps = [
            SeenStep(*step, losses=[rank[i][0] for rank in ranks], skipped=any(rank[i][1] for rank in ranks))
            for i, step in enumerate(self._steps)
        ]
        self._steps, self._left = [], []
        return steps
