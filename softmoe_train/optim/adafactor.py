"""This file owns Adafactor as in big_vision: second moments kept as row and column means, momentum in bfloat16.

A tensor is cut over ranks while a mean runs over all of it, so sums over a dim leave this file to be added up over ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softmoe_train.optim.groups import expert_dim


class DimSum(NamedTuple):
    """A sum over one dim of a parameter, of which this rank may hold a part only."""

    name: str
    dim: int
    values: Tensor  # float32, of the parameter's shape here without `dim`


AddUp = Callable[[Sequence[DimSum]], None]


class AdafactorRule(NamedTuple):
    """The numbers of the rule (Zhai et al. 2022, section 3.4, as released in big_vision)."""

    beta1: float  # of the moving average of updates, not debiased; 0 keeps none
    beta2: float  # the most that the second moment keeps
    beta2_decay: float  # beta2 of update t is 1 - t^-beta2_decay, until it reaches beta2
    eps: float  # added to squared gradients
    min_dim_to_factor: int


def factored_dims(name: str, shape: Sequence[int], smallest: int) -> tuple[int, int] | None:
    """The two largest dims of a parameter of global `shape`, the largest last; None where one has less than `smallest`.

    The expert dim is never one of them: each expert's matrix has statistics of its own, however few experts there are.
    """
    # Of equal dims the later counts as larger, as optax's stable sort has it.
    dims = sorted((d for d in range(len(shape)) if d != expert_dim(name)), key=lambda d: shape[d])[-2:]
    return (dims[0], dims[1]) if len(dims) == 2 and shape[dims[0]] >= smallest else None


def state_dims(name: str, shape: Sequence[int], rule: AdafactorRule) -> dict[str, int | None]:
    """The state kept for a parameter of global `shape`: by key, the dim that it lacks, None where it lacks none."""
    dims = factored_dims(name, shape, rule.min_dim_to_factor)
    kept: dict[str, int | None] = {"exp_avg_sq": None} if dims is None else {"row": dims[1], "col": dims[0]}
    return kept | ({"exp_avg": None} if rule.beta1 else {})


class Adafactor(torch.optim.Optimizer):
    """Adafactor over this rank's local tensors, decay decoupled as in AdamW.

    Honours `found_inf` (1.0 makes a step a no-op, decided on the device). Gradients are overwritten by a step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        parameters: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        rule: AdafactorRule,
        add_up: AddUp,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.rule = rule
        self.add_up = add_up
        self.names = {local: name for name, local in parameters.items()}
        self.shapes = shapes
        self.updates = next(iter(self.names)).new_zeros(())
        self.found_inf = torch.zeros_like(self.updates)
        for local, name in self.names.items():
            self.state[local] = {"step": self.updates}  # one count, by the key under which torch's own keep theirs
            for key, lacks in state_dims(name, shapes[name], rule).items():
                size = [n for dim, n in enumerate(local.shape) if dim != lacks]
                dtype = torch.bfloat16 if key == "exp_avg" else local.dtype
                self.state[local][key] = torch.zeros(size, dtype=dtype, device=local.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update with the rates of the groups, from the gradients that are there."""
        bad = self.found_inf.to(self.updates.dtype)
        skip = bad.bool()
        self.updates += 1 - bad
        beta2 = (1 - self.updates.clamp(min=1).pow(-self.rule.beta2_decay)).clamp(max=self.rule.beta2)
        means = self._means()
        for group in self.param_groups:
            for local in group["params"]:
                state = self.state[local]
                for key, mean in means[local].items():
                    state[key].copy_(torch.where(skip, state[key], state[key].lerp(mean + self.rule.eps, 1 - beta2)))
                self._scale_(local)
                local.grad.masked_fill_(skip, 0.0)
                if self.rule.beta1:
                    # In the dtype of the weights: optax rounds this product to bfloat16 as well.
                    keep = torch.where(skip, 1.0, self.rule.beta1).to(local.dtype)
                    local.grad.lerp_(state["exp_avg"].to(local.dtype), keep)
                    state["exp_avg"].copy_(local.grad)
                rate = torch.where(skip, 0.0, group["lr"]).to(local.dtype)
                local.mul_(1 - rate * group["weight_decay"]).addcmul_(local.grad, -rate)

    def _means(self) -> dict[Tensor, dict[str, Tensor]]:
        """Squared gradients: means over rows and columns of whole tensors, or the squares themselves where nothing is factored."""
        means: dict[Tensor, dict[str, Tensor]] = {}
        sums: list[DimSum] = []
        for local, name in self.names.items():
            squares = _gradient(local).square()
            dims = factored_dims(name, self.shapes[name], self.rule.min_dim_to_factor)
            if dims is None:
                means[local] = {"exp_avg_sq": squares}
                continue
            means[local] = {"row": squares.sum(dims[1]), "col": squares.sum(dims[0])}
            sums += [DimSum(name, dims[1], means[local]["row"]), DimSum(name, dims[0], means[local]["col"])]
        self.add_up(sums)
        for name, dim, values in sums:
            values.div_(self.shapes[name][dim])
        return means

    def _scale_(self, local: Tensor) -> None:
        """Divide a gradient by the root of its second moment: of row x col / their common mean where it is factored."""
        state, name = self.state[local], self.names[local]
        dims = factored_dims(name, self.shapes[name], self.rule.min_dim_to_factor)
        if dims is None:
            _gradient(local).mul_(state["exp_avg_sq"].rsqrt())
            return
        small, large = dims
        row, col = state["row"].unsqueeze(large), state["col"].unsqueeze(small)
        # The means of row and col are one number. Of the two, take it from the one that is all here.
        cut = local.shape[small] != self.shapes[name][small]
        mean = col.mean(large, keepdim=True) if cut else row.mean(small, keepdim=True)
        _gradient(local).mul_(row.rsqrt() * mean.sqrt()).mul_(col.rsqrt())


def _gradient(local: Tensor) -> Tensor:
    assert local.grad is not None
    return local.grad


def alone(sums: Sequence[DimSum]) -> None:
    """The `AddUp` of one process: nothing is cut."""
