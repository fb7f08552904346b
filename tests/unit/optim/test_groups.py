"""Weight-decay groups: an exact partition that agrees with the paper's list."""

import pytest
import torch

from softmoe_train.model.vit import build_model
from softmoe_train.optim.groups import decay_groups, frozen_problems, rate_factors
from tests.ranks.small import decays, model_config


def test_groups_are_an_exact_partition_of_the_model() -> None:
    names = [name for name, _ in build_model(model_config(), torch.float32).named_parameters()]
    groups = decay_groups(names)
    assert sorted(name for group in groups.values() for name in group) == sorted(names)


def test_membership_is_the_paper_s() -> None:
    names = [name for name, _ in build_model(model_config(), torch.float32).named_parameters()]
    groups = decay_groups(names)
    assert groups["head"] == ["head.weight"]
    assert groups["router_scale"] == ["blocks.1.moe.router.scale", "blocks.2.moe.router.scale"]
    assert groups["kernels"] == [n for n in names if decays(n) and not n.endswith("scale")]
    assert "blocks.1.moe.router.phi" in groups["none"]
    assert "position" in groups["none"]
    assert {n for n in names if n.endswith("bias") or "norm" in n} <= set(groups["none"])


def test_a_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.new\.thing"):
        decay_groups(["head.weight", "blocks.0.new.thing"])


def test_the_rate_falls_with_each_layer_below_the_head_as_in_beit_and_mae() -> None:
    """Their layers: embeddings 0, block i is i + 1, what is above the blocks is depth + 1; a rate times decay^(depth + 1 - layer)."""
    names = [name for name, _ in build_model(model_config(), torch.float32).named_parameters()]  # three blocks
    factors = rate_factors(names, 0.5)
    assert factors.keys() == set(names)
    expected = {
        "position": 1 / 16,
        "patch_embed.weight": 1 / 16,
        "blocks.0.mlp.fc1.weight": 1 / 8,
        "blocks.2.norm1.bias": 1 / 2,
    }
    expected |= {
        "blocks.1.moe.router.phi": 1 / 4,
        "blocks.1.moe.experts.w1": 1 / 4,
        "norm.weight": 1.0,
        "head.bias": 1.0,
    }
    assert {name: factors[name] for name in expected} == expected
    assert set(rate_factors(names, None).values()) == {1.0}


def test_a_pattern_that_freezes_nothing_or_everything_is_refused() -> None:
    names = ["position", "blocks.0.moe.router.phi", "head.weight"]
    assert frozen_problems(["*.router.*"], names) == []
    assert "no parameter is named *.routr.*" in frozen_problems(["*.routr.*", "head.*"], names)[0]
    assert "leaves no parameter to train" in frozen_problems(["*"], names)[0]
