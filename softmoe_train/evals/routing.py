"""This file owns looking at the routers during training: on the same few images each time, with the same numbers on every layout."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from softmoe_train.config import Record
from softmoe_train.data.batch import Batch
from softmoe_train.drawing.panels import LACKS, can_draw
from softmoe_train.evals.alarms import Alarms, AlarmsConfig
from softmoe_train.evals.looks import Look, looks_at, seen_of, sum_looks
from softmoe_train.evals.portraits import draw, histograms
from softmoe_train.evals.weightings import Thresholds
from softmoe_train.loop import TrainState
from softmoe_train.model.vit import ViT
from softmoe_train.observe.figures import Picture, Said

logger = logging.getLogger(__name__)


class RoutingConfig(Record):
    """When and on how many images routers are looked at, what counts as what, and from where on people are told."""

    every: Annotated[int, Field(ge=0)]  # steps; 0 only at the end
    images: Annotated[int, Field(ge=1)]  # the first of data.test
    batch_size: Annotated[int, Field(ge=1)]  # images of each rank at a time, at most, or one routing group
    updates: bool  # tell how far the update of such a step moves each expert
    pictures_every: Annotated[int, Field(ge=0)]  # in evaluations; 0 draws none
    thresholds: Thresholds
    alarms: AlarmsConfig


def parts_of(config: RoutingConfig, group_images: int, world: int) -> tuple[int, int]:
    """How many images of a rank go through the model at a time, whole groups of them, and how often, for all to be seen."""
    share = -(-config.images // world)
    size = -(-min(config.batch_size, share) // group_images) * group_images
    return size, -(-share // size)


class FirstImages:
    """This rank's part of the first `images` of a held-out set, in `parts`; read once, then kept. What is beyond them is masked."""

    def __init__(self, stream: Iterable[Batch], parts: int, images: int) -> None:
        self.stream = stream
        self.parts = parts
        self.images = images
        self.kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        if not self.kept:
            batch = next(iter(self.stream))
            self.kept = replace(batch, mask=batch.mask & (batch.sample_ids < self.images)).split(self.parts)
        yield from self.kept


class RoutingEvaluator:
    """Measures every router, `<block>/<measure>`, says where one has collapsed, and draws what they do on the one rank that is `main`."""

    def __init__(
        self, config: RoutingConfig, batches: Iterable[Batch], blocks: list[int], *, main: bool, last: int | None = None
    ) -> None:
        self.every = config.every
        self.last = last  # step of the run
        self.config = config
        self.batches = batches
        self.blocks = blocks
        self.main = main
        self.alarms = Alarms(config.alarms)
        self.told = False  # that nothing can be drawn

    @torch.no_grad()
    def run(self, state: TrainState) -> Iterator[tuple[str, Said]]:
        """The measures of each block with experts and alarms, the same on every rank, and figures at every `pictures_every`-th time and the last."""
        module, device, drawn = state.engine.module, state.engine.device, self._is_drawn(state.step)
        assert isinstance(module, ViT), type(module)
        looks = looks_at(module, self.blocks, self.config.thresholds, device, curves=drawn)
        for batch in self.batches:
            batch = batch.to(device)
            for look, routing in zip(looks.values(), seen_of(module, batch.images, batch.mask), strict=True):
                look.add(routing, batch.mask)
        sum_looks(looks)
        if not all(look.sums.total[0] for look in looks.values()):
            raise ValueError(
                f"evals.routing: none of the first {self.config.images} images of data.test could be read (with the rest of their group, for "
                f"a sparse router); repair the shards, name others, or leave routing out of evals"
            )
        measures = {block: look.measures() for block, look in looks.items()}
        yield from ((f"{block}/{name}", value) for block, of in measures.items() for name, value in of.items())
        # Identity has no router to go wrong.
        learned = {
            block: of for block, of in measures.items() if next(looks[block].router.parameters(), None) is not None
        }
        yield from self.alarms.see(state.step, learned)
        if drawn and self.main:  # nothing below is collective
            yield from histograms(looks).items()
            yield from self._pictures(state.step, looks)

    def _is_drawn(self, step: int) -> bool:
        """By the step alone, so that a resumed run draws when it would have."""
        apart = self.every * self.config.pictures_every
        return self.config.pictures_every > 0 and (step == self.last or (apart > 0 and step % apart == 0))

    def _pictures(self, step: int, looks: Mapping[int, Look]) -> Iterator[tuple[str, Picture]]:
        if can_draw():
            yield from ((name, Picture(png, f"step {step}")) for name, png in draw(looks).items())
        elif not self.told:
            self.told = True
            logger.warning("evals.routing.pictures_every=%s: %s; nothing is drawn", self.config.pictures_every, LACKS)
