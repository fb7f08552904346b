"""The experts' MLPs against the formula, in every dtype, and their backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmoe_train.model import products
from softmoe_train.model.expert_mlp import expert_mlp

e, N, D, H = 2, 3, 4, 5
SHAPES = ((e, N, D), (e, D, H), (e, H), (e, H, D), (e, D))


def arguments(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, w1, b1, w2, b2."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
    return [t.to(dtype).requires_grad_() for t in drawn]


def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.gelu(x @ w1 + b1.unsqueeze(1), approximate="tanh") @ w2 + b2.unsqueeze(1)


def test_outputs_and_gradients_are_right() -> None:
    torch.testing.assert_close(expert_mlp(*arguments()), plain(*arguments()))
    assert torch.autograd.gradcheck(expert_mlp, arguments())


@pytest.mark.parametrize("frozen", range(5))
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    got, want = arguments(), arguments()
    for tensors in (got, want):
        tensors[frozen].requires_grad_(False)
    expert_mlp(*got).square().sum().backward()
    plain(*want).square().sum().backward()
    assert got[frozen].grad is None
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])  # plain weights, and as FSDP gathers them
def test_bf16_rows_meet_rounded_weights_and_give_gradients_in_the_stored_dtype(
    stored: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "CPU_MULTIPLIES_BF16", native)
    low = [t.detach().to(stored).requires_grad_() for t in arguments(torch.float32)]
    low[0] = low[0].detach().bfloat16().requires_grad_()
    exact = [t.detach().bfloat16().double().requires_grad_() for t in low]
    for compute, tensors in ((expert_mlp, low), (plain, exact)):
        outputs = compute(*tensors)
        outputs.backward(torch.ones_like(outputs))
    assert expert_mlp(*low).dtype == torch.bfloat16
    for got, want in zip(low, exact, strict=True):
        assert got.grad is not None and want.grad is not None
        assert got.grad.dtype == got.dtype
        assert (got.grad.double() - want.grad).norm() < 0.02 * want.grad.norm()  # a few roundings of 2^-9


def test_a_gradient_that_someone_holds_is_not_written_again() -> None:
    values = arguments()
    held = torch.autograd.grad(expert_mlp(*values).sum(), values)
    copies = [t.clone() for t in held]
    for _ in range(3):
        torch.autograd.grad(expert_mlp(*values).square().sum(), values)
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_the_same_weights_twice_in_a_graph_add_up() -> None:
    got, want = arguments(), arguments()
    for compute, (x, *weights) in ((expert_mlp, got), (plain, want)):
        (compute(x[:, :1], *weights).sum() + compute(x[:, 1:], *weights).square().sum()).backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_second_derivative_is_refused() -> None:
    x, *weights = arguments()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(expert_mlp(x, *weights).sum(), x, create_graph=True)
