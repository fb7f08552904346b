"""The settings that a router is said to read are those that change what the layer computes, in training or by its shapes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_train.config import flat
from softmoe_train.model.init import initialize
from softmoe_train.model.moe import MoE
from softmoe_train.model.records import MoEConfig
from tests.models import moe_config
from tests.ranks.small import perturb

# Another value of each setting that a router may read.
OTHER: dict[str, Any] = {
    "slots_per_expert": 4,
    "soft": {"dispatch": "uniform", "combine": "uniform", "normalize": False, "scale": False},
    "sparse": {"group_images": 2, "capacity_factor": 1.3, "capacity_rounding": "multiple_of_4", "noise_std": 0.5},
    "tokens_choice": {
        "top_k": 2, "batch_priority": False, "importance_loss": 0.1, "load_loss": 0.1, "gshard_loss": 0.1,
    },
}  # fmt: skip
SIZES = {"num_experts": 4, "slots_per_expert": 2, "expert_init": "independent"}
NEAR: dict[str, Any] = {"capacity_factor": 0.6, "noise_std": 0.4}


def computed(config: MoEConfig) -> list[Tensor]:
    """What the layer makes of four images in training, and what its router tells; its parameters' shapes too."""
    layer = MoE(config, width=6, hidden=10)
    initialize(layer, seed=5)
    perturb(layer)
    x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    outputs, told = layer(x, torch.arange(4))
    return [outputs, *([] if told is None else [told]), *(torch.tensor(p.shape) for p in layer.parameters())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "base",
    [
        {"router": "soft"},
        {"router": "soft", "soft": {"dispatch": "uniform", "combine": "uniform"}},
        {"router": "identity"},
        {"router": "tokens_choice", "sparse": NEAR},
        {"router": "tokens_choice", "sparse": {**NEAR, "noise_std": 0.0}},
        {"router": "experts_choice", "sparse": NEAR},
    ],
)
def test_a_router_reads_the_keys_that_it_says_and_no_others(base: dict[str, Any]) -> None:
    config = moe_config(blocks=[0], **SIZES, **base)
    before, values = computed(config), config.model_dump()
    for key, value in flat(OTHER).items():
        section, _, name = key.rpartition(".")
        changed = {name: value} if not section else {section: {**values[section], name: value}}
        if config.router == "identity" and key == "slots_per_expert":  # must be T / E
            assert key in config.read_keys()
        elif flat(values)[key] != value:
            after = computed(MoEConfig(**{**values, **changed}))
            assert same(before, after) == (key not in config.read_keys()), key


def test_every_router_reads_what_is_the_layer_s() -> None:
    for router in ("soft", "identity", "tokens_choice", "experts_choice"):
        keys = moe_config(router=router).read_keys()
        assert {"blocks", "router", "num_experts", "expert", "expert_init", "expert_dropout"} <= keys
        assert keys <= flat(moe_config().model_dump()).keys()
