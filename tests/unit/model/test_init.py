"""Initialisation against the paper's numbers, on every layout, with nothing forgotten."""

import math

import pytest
import torch
from torch import nn

from softmoe_train.model.init import InitRule, LocalPart, initialize, ones, untouched
from softmoe_train.model.records import ModelConfig, MoEConfig
from softmoe_train.model.vit import ViT, build_model
from tests.models import moe_config


def initialized(moe: MoEConfig, seed: int = 0, **changes: int) -> ViT:
    """A model of the width and hidden width of the paper's S/16, from its seed."""
    sizes = {
        "image_size": 32,
        "patch_size": 16,
        "width": 384,
        "depth": 2,
        "mlp_dim": 1536,
        "num_heads": 6,
        "num_classes": 29593,
    }
    config = ModelConfig.model_validate({**sizes, **changes, "position_std": 0.02, "moe": moe})
    built = build_model(config, torch.float32)
    built.to_empty(device="cpu")
    initialize(built, seed)
    return built


def model(expert_init: str = "identical", seed: int = 0) -> ViT:
    """Two blocks, the last with 16 experts."""
    moe = moe_config(blocks="last 1", router="soft", num_experts=16, slots_per_expert=1, expert_init=expert_init)  # pyright: ignore[reportArgumentType]
    return initialized(moe, seed)


@pytest.fixture(scope="module")
def start() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model().named_parameters()}


def test_head_answers_the_uniform_distribution(start: dict[str, torch.Tensor]) -> None:
    assert not start["head.weight"].any()
    torch.testing.assert_close(start["head.bias"], torch.full((29593,), -10.2953), rtol=0, atol=1e-4)


def test_slot_parameters_have_the_published_deviation(start: dict[str, torch.Tensor]) -> None:
    phi = start["blocks.1.moe.router.phi"]
    std = 1 / math.sqrt(16 * 384)
    assert phi.std().item() == pytest.approx(std, rel=0.03)  # 6,144 draws
    assert phi.abs().max().item() <= 2 * std / 0.8796
    assert phi.norm(dim=0).mean().item() == pytest.approx(1 / math.sqrt(16), rel=0.05)
    assert start["blocks.1.moe.router.scale"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("blocks.1.moe.experts.w1", 0.0559),
        ("blocks.1.moe.experts.w2", 0.0559),
        ("blocks.0.mlp.fc1.weight", 0.0559),
        ("blocks.0.attn.qkv.weight", math.sqrt(6 / 768)),
        ("blocks.0.attn.out.weight", math.sqrt(6 / 768)),
    ],
)
def test_kernels_fill_their_xavier_bound(start: dict[str, torch.Tensor], name: str, bound: float) -> None:
    values = start[name]
    assert values.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_patch_embedding_and_positions_have_the_published_deviation(start: dict[str, torch.Tensor]) -> None:
    assert start["patch_embed.weight"].std().item() == pytest.approx(0.0361, rel=0.01)
    assert start["position"].std().item() == pytest.approx(0.02, rel=0.05)


def test_biases_are_zero_in_attention_and_tiny_in_mlps(start: dict[str, torch.Tensor]) -> None:
    assert not start["blocks.0.attn.qkv.bias"].any()
    assert start["blocks.0.mlp.fc1.bias"].std().item() == pytest.approx(1e-6, rel=0.1)
    assert start["blocks.1.moe.experts.b1"][0].std().item() == pytest.approx(1e-6, rel=0.1)


def test_experts_start_alike_or_apart_by_choice(start: dict[str, torch.Tensor]) -> None:
    alike = start["blocks.1.moe.experts.w1"]
    apart = dict(model("independent").named_parameters())["blocks.1.moe.experts.w1"].detach()
    assert all(torch.equal(alike[0], expert) for expert in alike)
    assert not any(torch.equal(apart[i], apart[j]) for i in range(16) for j in range(i))


def test_another_seed_gives_other_weights(start: dict[str, torch.Tensor]) -> None:
    other = dict(model(seed=1).named_parameters())
    drawn = [n for n, p in start.items() if p.unique().numel() > 1]
    assert drawn
    assert all(not torch.equal(start[n], other[n]) for n in drawn)


@pytest.mark.parametrize("name", ["blocks.1.moe.experts.w2", "blocks.0.mlp.fc1.weight"])
def test_a_part_gets_what_the_whole_would_hold(name: str) -> None:
    whole = model("independent")
    part = model("independent")
    parameter = dict(part.named_parameters())[name]
    middle = tuple(slice(n // 4, n // 2) for n in parameter.shape)
    values = torch.empty([s.stop - s.start for s in middle])
    initialize(
        part,
        0,
        lambda p: (
            LocalPart(values, tuple(s.start for s in middle)) if p is parameter else LocalPart(p.data, (0,) * p.ndim)
        ),
    )
    assert torch.equal(values, dict(whole.named_parameters())[name].detach()[middle])


class Forgetful(nn.Module):
    """A layer that says how one of its two parameters starts, and nothing of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.known = nn.Parameter(torch.zeros(2))
        self.forgotten = nn.Parameter(torch.zeros(2))
        self.register_buffer("lost", torch.zeros(2))

    def init_rules(self) -> dict[str, InitRule]:
        return {"known": InitRule(ones)}


def test_what_no_rule_touched_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"inner\.forgotten, inner\.lost"):
        initialize(nn.ModuleDict({"inner": Forgetful()}), seed=0)


def test_a_fresh_layer_is_almost_uniform() -> None:
    moe = moe_config(blocks=[0], router="soft", num_experts=128, slots_per_expert=1, expert_init="identical")
    vit = initialized(moe, image_size=224, depth=1, mlp_dim=8, num_classes=2)
    routing = vit.blocks[0].moe.router(torch.randn(8, 196, 384, generator=torch.Generator().manual_seed(0)))
    # paper.md 1.3: 0.00587 and 0.00893; the draws differ, the statistics do not.
    assert routing.dispatch.amax(1).mean().item() == pytest.approx(0.00587, rel=0.02)
    assert routing.combine.flatten(2).amax(2).mean().item() == pytest.approx(0.00893, rel=0.02)
    assert untouched(vit) == []
