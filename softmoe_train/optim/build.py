"""This file owns the optimizers: which kinds there are and what state each keeps."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from softmoe_train.config import Record
from softmoe_train.optim.groups import DecayConfig, decay_groups

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Record):
    """The optimizer and the clip. adamw: decay multiplies the rate only (the paper's); adam, sgd: decay joins the gradient."""

    kind: Literal["adamw", "adam", "sgd"]
    beta1: Beta | None  # adam, adamw
    beta2: Beta | None
    eps: Annotated[float, Field(gt=0)] | None
    momentum: Beta | None  # sgd
    clip_norm: Annotated[float, Field(gt=0)] | None
    decay: DecayConfig

    @model_validator(mode="after")
    def _fits(self) -> "OptimConfig":
        adam = {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        needed, unused = (
            ({"momentum": self.momentum}, adam) if self.kind == "sgd" else (adam, {"momentum": self.momentum})
        )
        problems = [f"optim.{key}=null: optim.kind={self.kind} needs a value" for key, v in needed.items() if v is None]
        problems += [
            f"optim.{key}={v}: optim.kind={self.kind} does not use it; set null"
            for key, v in unused.items()
            if v is not None
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def build_optimizer(config: OptimConfig, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The optimizer over this rank's local tensors, with its state already there, as zeros.

    Every kind works element by element, so a shard is updated exactly as the whole tensor would be. All kinds are fused: they
    honour `optimizer.found_inf`, which makes an update a no-op on the device.
    """
    groups = [
        {"params": [parameters[name] for name in names], "weight_decay": getattr(config.decay, kind, 0.0)}
        for kind, names in decay_groups(parameters).items()
        if names
    ]
    match config.kind:
        case "sgd":
            assert config.momentum is not None
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
        case "adam" | "adamw":
            assert config.beta1 is not None and config.beta2 is not None and config.eps is not None
            kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
            optimizer = kind(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for parameter in parameters.values():
        optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in state_keys(config)}
        if config.kind != "sgd":
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
    return optimizer


def state_keys(config: OptimConfig) -> list[str]:
    """The state tensors kept per parameter, each of the parameter's shape."""
    if config.kind == "sgd":
        return ["momentum_buffer"] if config.momentum else []
    return ["exp_avg", "exp_avg_sq"]
