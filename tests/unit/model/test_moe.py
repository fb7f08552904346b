"""The MoE layer against the paper's formulas written as loops, and what follows from them."""

import pytest
import torch
import torch.nn.functional as F

from softmoe_train.model.init import initialize
from softmoe_train.model.moe import MoE
from softmoe_train.model.records import moe_blocks
from tests.models import moe_config
from tests.unit.model.reference import soft_moe_token_by_token

CONFIG = moe_config(blocks=[0], router="soft", num_experts=3, slots_per_expert=2, expert_init="independent")


@pytest.fixture
def layer() -> MoE:
    layer = MoE(CONFIG, width=6, hidden=10)
    initialize(layer, seed=5)
    with torch.no_grad():
        layer.router.scale.fill_(2.0)
        layer.experts.b1.normal_(generator=torch.Generator().manual_seed(1))
        layer.experts.b2.normal_(generator=torch.Generator().manual_seed(2))
    return layer.double()


def test_layer_equals_the_paper_written_as_loops(layer: MoE) -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = layer.experts

    def expert(e: int, row: torch.Tensor) -> torch.Tensor:
        return F.gelu(row @ w.w1[e] + w.b1[e], approximate="tanh") @ w.w2[e] + w.b2[e]

    want = torch.stack([soft_moe_token_by_token(image, layer.router.phi.flatten(1), 2.0, expert, 2) for image in x])
    torch.testing.assert_close(layer(x)[0], want)


def test_gradients_of_the_layer_are_right(layer: MoE) -> None:
    x = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    parameters = tuple(layer.parameters())

    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(dict(layer.named_parameters()), values, strict=True))
        result, _ = torch.func.functional_call(layer, named, (x,))
        assert isinstance(result, torch.Tensor)
        return result

    assert torch.autograd.gradcheck(forward, (x, *parameters))


def test_an_image_does_not_depend_on_the_rest_of_the_batch(layer: MoE) -> None:
    """Neither what becomes of it nor its gradient; of the sparse routers tests/unit/model/test_sparse.py shows the contrary."""
    x = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x)[0]
    torch.testing.assert_close(y[2:3], layer(x[2:3])[0])
    (together,) = torch.autograd.grad(y[2].square().sum(), x, retain_graph=True)
    (alone,) = torch.autograd.grad(layer(x[2:3])[0].square().sum(), x)
    assert (together[[0, 1, 3]] == 0).all()
    torch.testing.assert_close(together, alone)


def test_a_non_contiguous_input_changes_nothing(layer: MoE) -> None:
    x = torch.randn(6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x)[0], layer(x.contiguous())[0])


def test_bf16_inputs_stay_near_float32() -> None:
    layer = MoE(CONFIG, width=6, hidden=10)
    initialize(layer, seed=5)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    low = layer(x.bfloat16())[0]
    assert low.dtype == torch.bfloat16
    # bf16 keeps 8 bits: a few roundings of 2^-8 of the largest value.
    torch.testing.assert_close(low.float(), layer(x)[0], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_no_more_than_it_needs(dtype: torch.dtype) -> None:
    B, T, D, H = 3, 7, 6, 10
    s = CONFIG.num_experts * CONFIG.slots_per_expert
    layer = MoE(CONFIG, width=D, hidden=H)
    initialize(layer, seed=5)
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, _ = layer(torch.randn(B, T, D).to(dtype).requires_grad_())
    for p in layer.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    assert y.grad_fn is not None
    # Tokens, slots, the experts' outputs and both sides of the GELU; dispatch and combine in float32.
    assert sum(kept.values()) <= (2 * B * s * H + B * (T + 2 * s) * D) * dtype.itemsize + 2 * B * T * s * 4


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        ("last 2", [4, 5]),
        ("every 2", [1, 3, 5]),
        ("every 4", [3]),
        ([5, 0], [0, 5]),
        ([], []),
        ("last 6", list(range(6))),
    ],
)
def test_blocks_are_chosen_as_written(blocks: str | list[int], chosen: list[int]) -> None:
    assert moe_blocks(blocks, depth=6) == chosen


@pytest.mark.parametrize("blocks", ["last 7", "last", "first 2", "every 0", "last -1", [6], [1, 1], [-1]])
def test_blocks_that_are_not_there_are_refused(blocks: str | list[int]) -> None:
    with pytest.raises(ValueError, match=r"model\.moe\.blocks="):
        moe_blocks(blocks, depth=6)
