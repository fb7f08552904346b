"""This file owns how far an update moves each expert, counted once whatever the layout.

L blocks with experts  E experts
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float64
from torch import Tensor

from softmoe_train.dist import local_offsets, local_values, sum_over_world
from softmoe_train.parallel.grads import copies_of

EXPERTS = ".experts."


class ExpertMoves:
    """Keeps a copy of this rank's expert weights from `before` an update until `after` it, and at no other time."""

    def __init__(self, parameters: Mapping[str, Tensor], size: int) -> None:
        self.parameters = {name: p for name, p in parameters.items() if EXPERTS in name}
        self.layers = list(dict.fromkeys(name.partition(EXPERTS)[0] for name in self.parameters))
        self.size = size
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def before(self) -> None:
        """Keep the weights."""
        self.kept = {name: local_values(p).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def after(self) -> Float64[Tensor, "L E"]:
        """|update| / |weights before| of each expert, all its weights together. Every rank must ask; the host does not wait."""
        copies = copies_of(list(self.parameters.values()), self.size)
        num_experts = next(iter(self.parameters.values())).shape[0]
        squares = copies.new_zeros((2, len(self.layers), num_experts))
        for (name, p), shared in zip(self.parameters.items(), copies, strict=True):
            before, now, first = self.kept[name], local_values(p), local_offsets(p)[0]
            of_layer = squares[:, self.layers.index(name.partition(EXPERTS)[0]), first : first + len(now)]
            for kind, values in enumerate((now - before, before)):
                lengths = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64)
                of_layer[kind] += lengths.square() / shared
        self.kept = {}
        moved, length = sum_over_world(squares)
        return (moved / length).sqrt()
