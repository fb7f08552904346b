"""This file owns the all-to-all slot exchange.

G routing groups of this rank  E experts  S slots per expert  D width
R expert ranks  e = E / R local experts  N = R·G·S rows of one expert
"""

from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import DTensor


class AllToAllExchange:
    """Sends each slot to the rank that holds its expert, and the result back: one equal-split all-to-all each way.

    Every slot is always filled, so there are no counts to agree on and no capacity. Every rank must bring the same G.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.R = group.size()

    def dispatch(self, slots: Float[Tensor, "G E S D"]) -> Float[Tensor, "e N D"]:
        """Rows of local expert i from all R ranks, ordered by rank, group, slot."""
        G, E, S, D = slots.shape
        sent = slots.transpose(0, 1).contiguous()  # E outermost: the split over ranks is a split of dim 0
        received = self._swap(sent).view(self.R, E // self.R, G * S, D)
        return received.transpose(0, 1).reshape(E // self.R, self.R * G * S, D)

    def combine(self, outputs: Float[Tensor, "e N D"], num_groups: int) -> Float[Tensor, "G E S D"]:
        """The inverse of `dispatch`."""
        e, N, D = outputs.shape
        sent = outputs.view(e, self.R, N // self.R, D).transpose(0, 1).contiguous()
        received = self._swap(sent.view(e * self.R, N // self.R, D))
        return received.view(self.R * e, num_groups, -1, D).transpose(0, 1)

    def local(self, weight: Tensor) -> Tensor:
        """The e experts of this rank. The gradient is Shard(0) as the weight is: each rank's experts are its own."""
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def _swap(self, sent: Tensor) -> Tensor:
        # Its backward is the same exchange of the (made contiguous) gradient: equal splits are their own inverse.
        splits = [sent.shape[0] // self.R] * self.R
        return all_to_all_single_autograd(sent, splits, splits, self.group)
