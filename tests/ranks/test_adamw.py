"""AdamW on every layout: moments to rounding, weights within what a rounding error of a gradient can move them."""

from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.ranks.launch import run_ranks
from tests.ranks.small import ADAMW, CLIP, build, decays, reference, share

RATE = 0.01
LAYOUTS = [(axis, sharding) for axis in (1, 2, 4) for sharding in ("replicated", "fsdp")]


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def updates(rank: int, world: int) -> dict[tuple[int, str], dict[str, Tensor]]:
    states: dict[tuple[int, str], dict[str, Tensor]] = {}
    for axis, sharding in LAYOUTS:
        engine = build(rank, world, axis, sharding, optim=ADAMW)
        (batch,) = share(rank, world)
        engine.forward_backward(batch, last=True)
        engine.update(RATE)
        states[axis, sharding] = {name: full(t) for name, t in engine.state_dict().items()}
    return states


@pytest.fixture(scope="module")
def states() -> dict[tuple[int, str], dict[str, Tensor]]:
    return run_ranks(updates, 4)[0]


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    return reference()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_moments_and_weights_after_an_update_are_those_of_one_process_in_float64(
    states: dict, truth: dict[str, Any], layout: tuple[int, str]
) -> None:
    state = states[layout]
    assert state["optimizer.updates"].tolist() == [1.0]
    for name, gradient in truth["gradients"].items():
        clipped = gradient * min(1.0, CLIP / truth["norm"])
        for key, want in (("exp_avg", 0.1 * clipped), ("exp_avg_sq", 0.001 * clipped.square())):
            got = state[f"optimizer.{key}.{name}"].double()
            # The square doubles a relative error of 1e-5.
            assert ((got - want).norm() / want.norm()).item() < 2e-5, f"{key} of {name}"
        before = truth["weights_before"][name]
        decay = 0.3 if name == "head.weight" else 0.03 if decays(name) else 0.0
        after = before - RATE * (clipped / (clipped.abs() + 1e-8) + decay * before)
        distance = (state[f"model.{name}"].double() - after).abs().max().item()
        # 0.05 of the rate: where a gradient is near eps = 1e-8, its rounding moves the step by about 1 %.
        assert distance < 0.05 * RATE, f"{name}: {distance:.1e}"
