"""This file owns looking at the routers during training: on the same few images each time, with the same numbers on every layout.

L blocks with experts
"""

from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from softmoe_train.config import Record
from softmoe_train.data.batch import Batch, ImageStream
from softmoe_train.dist import sum_over_world
from softmoe_train.evals.alarms import Alarms, AlarmsConfig
from softmoe_train.evals.loads import LoadSums
from softmoe_train.evals.slot_parameters import parameter_measures
from softmoe_train.evals.weightings import SoftSums, Thresholds
from softmoe_train.loop import TrainState
from softmoe_train.model.moe import MoE, Seen
from softmoe_train.model.vit import ViT
from softmoe_train.observe.figures import Said


class RoutingConfig(Record):
    """When and on how many images routers are looked at, what counts as what, and from where on people are told."""

    every: Annotated[int, Field(ge=0)]  # steps; 0 only at the end
    images: Annotated[
        int, Field(ge=1)
    ]  # of the beginning of the training sequence, at least; a multiple of data.streams
    batch_size: Annotated[int, Field(ge=1)]  # images of each rank at a time, at most, or one routing group
    thresholds: Thresholds
    alarms: AlarmsConfig


class FirstImages:
    """This rank's part of the first batch of a stream, in parts of `batch_size` images and whole groups; read once, then kept."""

    def __init__(self, stream: ImageStream, batch_size: int, group_images: int) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.group_images = group_images
        self.parts: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        if not self.parts:
            batch = next(iter(self.stream))
            n, group = len(batch), self.group_images
            fitting = [
                size for size in range(group, n + 1, group) if n % size == 0 and size <= max(self.batch_size, group)
            ]
            self.parts = batch.split(n // max(fitting))
        yield from self.parts


class RoutingEvaluator:
    """Measures every router, `<block>/<measure>`, and says where one has collapsed."""

    def __init__(self, config: RoutingConfig, batches: Iterable[Batch], blocks: list[int], steps: int) -> None:
        self.every = config.every
        self.config = config
        self.batches = batches
        self.blocks = blocks
        self.alarms = Alarms(config.alarms, steps)

    @torch.no_grad()
    def run(self, state: TrainState) -> Iterator[tuple[str, Said]]:
        """The measures of each block with experts, the same on every rank, and alarms."""
        module, device = state.engine.module, state.engine.device
        assert isinstance(module, ViT), type(module)
        layers, tokens = layers_of(module, self.blocks), module.config.num_tokens
        looks = [build_look(layer, self.config.thresholds, tokens, device) for layer in layers.values()]
        for batch in self.batches:
            for look, routing in zip(looks, seen_of(module, batch.images.to(device)), strict=True):
                look.add(routing)
        totals = sum_over_world(torch.cat([look.total for look in looks])).split([len(look.total) for look in looks])
        measures: dict[int, dict[str, float]] = {}
        for (block, layer), look, total in zip(layers.items(), looks, totals, strict=True):
            look.total = total
            measures[block] = look.measures() | parameter_measures(layer.router)
            yield from ((f"{block}/{name}", value) for name, value in measures[block].items())
        learned = {block for block, layer in layers.items() if next(layer.router.parameters(), None) is not None}
        yield from self.alarms.see(state.step, {block: measures[block] for block in learned})


def layers_of(module: ViT, blocks: list[int]) -> dict[int, MoE]:
    """The MoE layers by the number of their block."""
    return {block: module.get_submodule(f"blocks.{block}.moe") for block in blocks}  # pyright: ignore[reportReturnType]


def build_look(layer: MoE, thresholds: Thresholds, tokens: int, device: torch.device) -> SoftSums | LoadSums:
    """What adds up the measures of a layer's router."""
    E = layer.config.num_experts
    if layer.config.is_sparse:
        return LoadSums(thresholds.dead, E, device)
    return SoftSums(thresholds, tokens, E, layer.config.slots_per_expert, device)


def seen_of(module: nn.Module, images: Tensor) -> Seen:
    """What the routers decide of images, block by block; every rank must ask, since slots travel to their experts all the same."""
    seen: Seen = []
    with torch.compiler.set_stance("force_eager"):  # no graph is worth compiling for this
        module(images, None, None, seen)
    return seen
