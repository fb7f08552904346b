"""Weight-decay groups: an exact partition that agrees with the paper's list."""

import pytest
import torch

from softmoe_train.model.vit import build_model
from softmoe_train.optim.groups import decay_groups
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
