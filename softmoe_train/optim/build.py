"""This file owns the optimizers: which kinds there are and what state each keeps."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from softmoe_train.config import Record
from softmoe_train.optim.adafactor import Adafactor, AdafactorRule, AddUp, state_dims
from softmoe_train.optim.groups import DecayConfig, decay_groups, is_frozen, rate_factors

Beta = Annotated[float, Field(ge=0, lt=1)]
_FACTOR = "factor"  # of an optimizer's group: what its rate is multiplied by


class OptimConfig(Record):
    """The optimizer and the clip. adamw, adafactor: decay multiplies the rate only; adam, sgd: decay joins the gradient.

    Each kind takes the keys of `KEYS`, the others are null.
    """

    kind: Literal["adamw", "adam", "sgd", "adafactor"]
    beta1: Beta | None
    beta2: Beta | None  # adafactor: the most that it reaches
    beta2_decay: Annotated[float, Field(gt=0, le=1)] | None  # beta2 of update t is 1 - t^-beta2_decay
    eps: Annotated[float, Field(gt=0)] | None
    min_dim_to_factor: Annotated[int, Field(ge=2)] | None  # a matrix with a smaller side keeps its whole second moment
    momentum: Beta | None
    clip_norm: Annotated[float, Field(gt=0)] | None
    decay: DecayConfig
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None  # of the rate, by each layer below the head
    frozen: list[str]  # patterns (*, ?) of parameters that are not trained: no gradient, no state, no decay

    @model_validator(mode="after")
    def _fits(self) -> "OptimConfig":
        given = {key: getattr(self, key) for key in sorted(set().union(*KEYS.values()))}
        needed = KEYS[self.kind]
        problems = [f"optim.{key}=null: optim.kind={self.kind} needs a value" for key in needed if given[key] is None]
        problems += [
            f"optim.{key}={v}: optim.kind={self.kind} does not use it; set null"
            for key, v in given.items()
            if v is not None and key not in needed
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


KEYS = {
    "sgd": ("momentum",),
    "adam": ("beta1", "beta2", "eps"),
    "adamw": ("beta1", "beta2", "eps"),
    "adafactor": ("beta1", "beta2", "beta2_decay", "eps", "min_dim_to_factor"),
}


def is_elementwise(config: OptimConfig) -> bool:
    """Whether each value is updated from itself alone: then any part of a tensor, even flattened, is as good as the whole."""
    return config.kind != "adafactor"


def build_optimizer(
    config: OptimConfig, parameters: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], add_up: AddUp
) -> torch.optim.Optimizer:
    """The optimizer over this rank's local tensors of global `shapes`, with its state already there, as zeros.

    All kinds honour `optimizer.found_inf`, which makes an update a no-op on the device. `add_up` is for dims cut over ranks.
    """
    if not is_elementwise(config):
        trained = {name: p for name, p in parameters.items() if not is_frozen(name, config.frozen)}
        return Adafactor(_groups(config, parameters), trained, shapes, _rule(config), add_up)
    optimizer = elementwise_optimizer(config, parameters)
    start_state(config, optimizer)
    return optimizer


def elementwise_optimizer(config: OptimConfig, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """Torch's fused optimizer without state, for an engine that lays the parameters out anew; `start_state` makes it whole.

    It updates a shard exactly as it would the whole.
    """
    groups = _groups(config, parameters)
    match config.kind:
        case "sgd":
            assert config.momentum is not None
            return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
        case "adam" | "adamw":
            assert config.beta1 is not None and config.beta2 is not None and config.eps is not None
            kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
            return kind(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        case "adafactor":
            raise AssertionError("adafactor is not elementwise")


def start_state(config: OptimConfig, optimizer: torch.optim.Optimizer) -> None:
    """Give every tensor of the optimizer its state before the first update, as zeros; what it had is dropped."""
    optimizer.state.clear()
    for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
        optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in state_keys(config)}
        if config.kind != "sgd":
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Have the next update use the rate `lr`, or the part of it that a group has."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[_FACTOR]


def freeze_(model: nn.Module, config: OptimConfig) -> None:
    """Have no gradient computed for what is frozen."""
    for name, p in model.named_parameters():
        p.requires_grad_(not is_frozen(name, config.frozen))


def state_keys(config: OptimConfig) -> list[str]:
    """The state tensors that an elementwise kind keeps per parameter, each of the parameter's shape."""
    assert is_elementwise(config), config.kind
    if config.kind == "sgd":
        return ["momentum_buffer"] if config.momentum else []
    return ["exp_avg", "exp_avg_sq"]


def state_layout(config: OptimConfig, name: str, shape: Sequence[int]) -> dict[str, int | None]:
    """The state kept for a parameter of global `shape`: by key, the dim of the parameter that it lacks, None where none."""
    if is_frozen(name, config.frozen):
        return {}
    if is_elementwise(config):
        return dict.fromkeys(state_keys(config))
    return state_dims(name, shape, _rule(config))


def _groups(config: OptimConfig, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    factors = rate_factors(parameters, config.layer_decay)
    for kind, names in decay_groups(parameters).items():
        trained = [name for name in names if not is_frozen(name, config.frozen)]
        for factor in sorted({factors[name] for name in trained}):
            members = [parameters[name] for name in trained if factors[name] == factor]
            groups.append({"params": members, "weight_decay": getattr(config.decay, kind, 0.0), _FACTOR: factor})
    return groups


def _rule(config: OptimConfig) -> AdafactorRule:
    assert config.beta1 is not None and config.beta2 is not None and config.eps is not None
    assert config.beta2_decay is not None and config.min_dim_to_factor is not None
    return AdafactorRule(config.beta1, config.beta2, config.beta2_decay, config.eps, config.min_dim_to_factor)
