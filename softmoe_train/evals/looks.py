"""This file owns one look at the routers of a model: what each block's decides of some images, added up over images and ranks."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from softmoe_train.dist import sum_over_world
from softmoe_train.evals.curves import CurveSums
from softmoe_train.evals.loads import LoadSums
from softmoe_train.evals.slot_parameters import parameter_measures
from softmoe_train.evals.weightings import SoftSums, Thresholds
from softmoe_train.model.moe import MoE, Seen
from softmoe_train.model.routing import Routing
from softmoe_train.model.sparse import SparseRouting
from softmoe_train.model.vit import ViT


class Look:
    """At one block: its router, the sums of its measures, and with `curves` what its pictures are drawn from (not of sparse routers)."""

    def __init__(self, layer: MoE, thresholds: Thresholds, tokens: int, device: torch.device, *, curves: bool) -> None:
        E, S, sparse = layer.config.num_experts, layer.config.slots_per_expert, layer.config.is_sparse
        self.router: nn.Module = layer.router
        self.sums = LoadSums(thresholds.dead, E, device) if sparse else SoftSums(thresholds, tokens, E, S, device)
        self.curves = CurveSums(tokens, E * S, device) if curves and not sparse else None

    def add(self, routing: Routing | SparseRouting, real: Bool[Tensor, " B"]) -> None:
        """Take what the router decided of some images; only groups whose images are all `real` count."""
        whole = real.view(len(routing.slots), -1).all(1)
        self.sums.add(routing, whole)
        if self.curves is not None and isinstance(routing, Routing):
            self.curves.add(routing, whole)

    def measures(self) -> dict[str, float]:
        """By name, of its decisions and of its parameters."""
        return self.sums.measures() | parameter_measures(self.router)

    def parts(self) -> list[Tensor]:
        """What adds up over ranks."""
        return [self.sums.total, *([] if self.curves is None else self.curves.parts.values())]


def looks_at(
    model: ViT, blocks: Sequence[int], thresholds: Thresholds, device: torch.device, *, curves: bool
) -> dict[int, Look]:
    """An empty look at each of these blocks."""
    tokens = model.config.num_tokens
    layers = {block: model.get_submodule(f"blocks.{block}.moe") for block in blocks}
    return {
        block: Look(layer, thresholds, tokens, device, curves=curves)
        for block, layer in layers.items()
        if isinstance(layer, MoE)
    }


def sum_looks(looks: Mapping[int, Look]) -> None:
    """Add up the looks of all ranks, on all ranks, in one collective."""
    parts = [part for look in looks.values() for part in look.parts()]
    total = sum_over_world(torch.cat([part.flatten() for part in parts]))
    for part, summed in zip(parts, total.split([part.numel() for part in parts]), strict=True):
        part.copy_(summed.view_as(part))


def seen_of(module: nn.Module, images: Tensor, real: Tensor) -> Seen:
    """What the routers decide of images, of which those that are not `real` take no slot, block by block; every rank must ask, since slots travel to their experts all the same."""
    seen: Seen = []
    with torch.compiler.set_stance("force_eager"):  # no graph is worth compiling for this
        module(images, None, real, seen)
    return seen
