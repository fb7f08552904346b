"""The floor is honest: exactly the products that the layer executes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from softmoe_train.bench.floor import Floor, LayerShape
from softmoe_train.bench.flops import Executed
from softmoe_train.bench.layer import build_dense, build_layer

CPU = torch.device("cpu")
SHAPE = LayerShape(images=3, tokens=10, width=8, hidden=20, experts=4, slots=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_runs_the_products_of_the_layer_and_no_more(dtype: torch.dtype) -> None:
    layer = build_layer(SHAPE, CPU)
    x = torch.randn(3, 10, 8, dtype=dtype, requires_grad=True)
    with Executed() as ours, FlopCounterMode(display=False) as counted:
        layer(x)[0].backward(torch.randn_like(x))
    assert counted.get_total_flops() == sum(flops for _, flops in ours.products) == SHAPE.flops
    product, _ = max(ours.products, key=lambda seen: seen[1])
    floor = Floor(SHAPE, dtype, product, CPU)
    with Executed() as theirs, FlopCounterMode(display=False) as counted:
        floor.run()
    assert counted.get_total_flops() == SHAPE.flops
    assert sorted(theirs.products, key=str) == sorted(ours.products, key=str), "each of them, in its dtype"
    assert sum(p.flops for p in floor.forward_products) == SHAPE.forward_flops


def test_the_shape_knows_the_parameters_of_the_layer() -> None:
    assert sum(p.numel() for p in build_layer(SHAPE, CPU).parameters()) == SHAPE.parameters


def test_the_dense_mlp_has_the_flops_of_the_layer() -> None:
    shape = LayerShape(images=2, tokens=49, width=32, hidden=128, experts=8, slots=4)
    mlp = build_dense(shape, CPU)
    with FlopCounterMode(display=False) as counted:
        mlp(torch.randn(2, 49, 32))
    assert counted.get_total_flops() == pytest.approx(shape.forward_flops, rel=0.01)


def test_the_bound_counts_what_the_issue_says() -> None:
    B, T, D, H, s = 3, 10, 8, 20, 8
    assert SHAPE.saved_bound(torch.float32) == 4 * (2 * B * s * H + B * (T + 2 * s) * D + 2 * B * T * s)
    assert SHAPE.saved_bound(torch.bfloat16) == 2 * (2 * B * s * H + B * (T + 2 * s) * D) + 4 * 2 * B * T * s
