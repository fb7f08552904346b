"""Optimizers against their formulas, and the no-op on a bad gradient."""

import math

import pytest
import torch

from softmoe_train.optim.adafactor import alone
from softmoe_train.optim.build import OptimConfig, build_optimizer, set_rate, state_layout
from tests.ranks.small import ADAFACTOR, ADAMW, SGD

NAMES = ["head.weight", "blocks.0.mlp.fc1.weight", "head.bias"]
DECAYS = {"head.weight": 0.3, "blocks.0.mlp.fc1.weight": 0.03, "head.bias": 0.0}


def step(config: OptimConfig, updates: int, bad: bool = False) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    values = {name: torch.full((4,), 2.0) for name in NAMES}
    optimizer = build_optimizer(config, values, {name: v.shape for name, v in values.items()}, alone)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for i in range(updates):
        for value in values.values():
            value.grad = torch.full((4,), float(i + 1))
        optimizer.found_inf = torch.tensor(float(bad))  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    return values, optimizer


def test_adamw_multiplies_decay_by_the_rate_alone() -> None:
    values, _ = step(ADAMW, updates=2)
    for name in NAMES:
        w, m, v = 2.0, 0.0, 0.0
        for t in (1, 2):
            m, v = 0.9 * m + 0.1 * t, 0.999 * v + 0.001 * t * t
            adam = (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
            w -= 0.01 * (adam + DECAYS[name] * w)
        assert values[name].tolist() == pytest.approx([w] * 4, rel=1e-6)


def test_sgd_with_momentum_starts_from_an_empty_buffer() -> None:
    values, _ = step(SGD.model_copy(update={"momentum": 0.9}), updates=2)
    w = 2.0 - 0.01 * 1 - 0.01 * (0.9 * 1 + 2)
    assert values["head.bias"].tolist() == pytest.approx([w] * 4, rel=1e-6)


@pytest.mark.parametrize("config", [ADAMW, SGD, ADAMW.model_copy(update={"kind": "adam"})], ids=lambda c: c.kind)
def test_a_bad_gradient_changes_nothing(config: OptimConfig) -> None:
    values, optimizer = step(config, updates=1, bad=True)
    assert all(value.eq(2.0).all() for value in values.values())
    for state in optimizer.state.values():
        assert all(not tensor.any() for tensor in state.values())


def test_settings_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.momentum=null.*optim\.beta1=0\.9"):
        OptimConfig.model_validate({**ADAMW.model_dump(), "kind": "sgd"})


@pytest.mark.parametrize("config", [SGD, ADAMW, ADAFACTOR], ids=lambda config: config.kind)
def test_what_is_frozen_has_no_state_and_stays_and_a_layer_has_its_part_of_the_rate(config: OptimConfig) -> None:
    config = config.model_copy(update={"frozen": ["head.b*"], "layer_decay": 0.5})
    values = {name: torch.full((4,), 2.0) for name in NAMES}
    optimizer = build_optimizer(config, values, {name: v.shape for name, v in values.items()}, alone)
    set_rate(optimizer, 0.01)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.005}  # head, block 0 of one
    for name in NAMES[:2]:
        values[name].grad = torch.ones(4)
    optimizer.found_inf = torch.tensor(0.0)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    assert torch.equal(values["head.bias"], torch.full((4,), 2.0)) and values["head.bias"] not in optimizer.state
    assert state_layout(config, "head.bias", (4,)) == {}
    assert not any(torch.equal(values[name], torch.full((4,), 2.0)) for name in NAMES[:2])
