"""This file owns faults that a test plants in worker processes: `python -m tests.ranks.planted FAULT VERB [overrides]`."""

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from softmoe_train.commands.main import main
from softmoe_train.engine import torch_engine
from softmoe_train.engine.protocol import GradStats
from softmoe_train.engine.torch_engine import TorchEngine
from softmoe_train.model import routing
from softmoe_train.model.moe import Experts
from softmoe_train.parallel.exchange import AllToAllExchange

THROUGH = AllToAllExchange.through
UPDATE = TorchEngine.update
LOGITS = routing.unit_logits
SET_FACTOR = FSDPModule.set_gradient_divide_factor


class PermutedBackward(torch.autograd.Function):
    """The identity, whose gradient comes back with the chunks of the ranks in another order."""

    @staticmethod
    def forward(ctx: object, slots: Tensor, R: int) -> Tensor:
        ctx.R = R
        return slots.view_as(slots)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.roll(gradient.shape[1] // ctx.R, dims=1), None


def permuted(self: AllToAllExchange, slots: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Right outputs, right losses, wrong gradients of all that lies before the experts."""
    return THROUGH(self, PermutedBackward.apply(slots, self.R), compute)


def swapped(self: AllToAllExchange, slots: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """The slots of the first two experts go to each other's: the layer is a mixture of experts all the same."""
    order = [1, 0, *range(2, slots.shape[1])]
    return THROUGH(self, slots[:, order], compute)[:, order]


def averaged(self: FSDPModule, factor: float) -> None:
    """Expert units keep FSDP2's own division by the ranks that share an expert."""
    if not isinstance(self, Experts):
        SET_FACTOR(self, factor)


def drifted(self: TorchEngine, lr: float) -> GradStats:
    """One rank's copy of a weight that all should share goes its own way."""
    stats = UPDATE(self, lr)
    if dist.get_rank() == 1:
        self.parameters["norm.bias"].data += 1e-3
    return stats


def upscaled(gradients: list[Tensor], norm: Tensor, limit: float | None) -> None:
    """A clip that also lengthens what is shorter than its limit."""
    if limit is not None:
        torch._foreach_mul_(gradients, limit / norm)


def rounded(x: Tensor, phi: Tensor, scale: Tensor) -> Tensor:
    """A router that computes its logits from bf16."""
    return LOGITS(x.bfloat16().to(x.dtype), phi.bfloat16().to(phi.dtype), scale)


def undecayed(self: TorchEngine, lr: float) -> GradStats:
    """No weight decays."""
    for group in self.optimizer.param_groups:
        group["weight_decay"] = 0.0
    return UPDATE(self, lr)


def forgetful(self: TorchEngine, lr: float) -> GradStats:
    """Every update finds a hundredth of the moments of the one before it missing."""
    for state in self.optimizer.state.values():
        state["exp_avg"].mul_(0.99)
    return UPDATE(self, lr)


if __name__ == "__main__":
    match sys.argv[1]:
        case "permuted":
            AllToAllExchange.through = permuted
        case "swapped":
            AllToAllExchange.through = swapped
        case "drifted":
            TorchEngine.update = drifted
        case "undecayed":
            TorchEngine.update = undecayed
        case "forgetful":
            TorchEngine.update = forgetful
        case "upscaled":
            torch_engine.clip_ = upscaled
        case "rounded":
            routing.unit_logits = rounded
        case "averaged":
            FSDPModule.set_gradient_divide_factor = averaged
    sys.exit(main(sys.argv[2:]))
