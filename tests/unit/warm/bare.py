"""This file owns a model that starts warm without an engine, and sources written for it."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softmoe_train.config import config_folder, load_yaml
from softmoe_train.model.init import initialize
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import ViT, build_model
from softmoe_train.warm.settings import WarmConfig
from softmoe_train.warm.start import Warmed, start_warm
from tests.models import moe_config
from tests.ranks.small import SEED, model_config, perturb
from tests.unit.checkpoint.cut import save_cut


class Bare:
    """What a warm start asks of an engine."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        return {f"model.{name}": p.detach() for name, p in self.module.named_parameters()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        pass


def small(blocks: Any = "last 2", **moe: Any) -> ModelConfig:
    """The small model of the distributed tests (16 tokens, three blocks), with these keys of `model.moe`."""
    moe = {"num_experts": 4, "slots_per_expert": 2, "expert_init": "independent", **moe}
    return model_config(moe=moe_config(blocks=blocks, **moe))


def model_of(config: ModelConfig, seed: int = 1) -> ViT:
    """A model with weights that are nowhere zero or alike."""
    model = build_model(config, torch.float32)
    model.to_empty(device="cpu")
    initialize(model, seed)
    perturb(model)
    return model.requires_grad_(False)


def warm_config(source: Path | str, **changes: Any) -> WarmConfig:
    """The settings of conf/warm/weights.yaml with these keys changed."""
    values = load_yaml(config_folder() / "warm" / "weights.yaml")
    return WarmConfig(**{**values, "source": str(source), **changes})


def warmed(config: ModelConfig, source: Path | str, **changes: Any) -> tuple[ViT, Warmed]:
    """A model that has started warm in one process, and the account."""
    model = build_model(config, torch.float32)
    model.to_empty(device="cpu")
    initialize(model, SEED)
    told = start_warm(warm_config(source, **changes), config, Bare(model), seed=SEED, rank=0, world=1, group=None)  # pyright: ignore[reportArgumentType]
    return model.requires_grad_(False), told


def as_run(folder: Path, model: ViT, average: ViT | None = None) -> Path:
    """A run folder whose checkpoint, cut over two files, holds the weights, perhaps an average, and something of an optimizer."""
    kinds = {"model": model} if average is None else {"model": model, "average": average}
    tensors = {f"{kind}.{name}": t for kind, one in kinds.items() for name, t in one.state_dict().items()}
    tensors["optimizer.updates"] = torch.ones(1)
    save_cut(folder / "checkpoints", 20, tensors, {"config": {"model": model.config.model_dump()}, "loop": {}}, files=2)
    return folder


def in_timm_names(model: ViT, folder: Path, **more: Tensor) -> Path:
    """The weights of a dense model as timm would name them, class token and all."""
    named: dict[str, Tensor] = {}
    for name, t in model.state_dict().items():
        theirs = name.replace("attn.out", "attn.proj").replace("query_norm", "q_norm").replace("key_norm", "k_norm")
        theirs = theirs.replace("patch_embed.", "patch_embed.proj.").replace("position", "pos_embed")
        shaped = {"patch_embed.weight": (len(t), 3, 2, 2), "position": (1, *t.shape)}.get(name, t.shape)
        named[theirs] = t.reshape(shaped).clone()
    path = folder / "timm.safetensors"
    save_file({**named, **more}, path)
    return path


def wide(model: ViT) -> ViT:
    """A copy that computes in float64."""
    copied = copy.deepcopy(model).double()
    copied.dtype = torch.float64
    return copied
