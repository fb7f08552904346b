"""Weighted sums of rows: numbers, gradients, and where gradients lie."""

import pytest
import torch
from torch import Tensor

from softmoe_train.model import products
from softmoe_train.model.products import mix


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_mix_and_its_gradients_are_right(transposed: bool) -> None:
    weights = (rand(2, 4, 3).mT if transposed else rand(2, 3, 4)).detach().requires_grad_()
    rows = rand(2, 4, 5, seed=1).requires_grad_()
    torch.testing.assert_close(mix(weights, rows), torch.einsum("gmk,gkd->gmd", weights, rows))
    assert torch.autograd.gradcheck(mix, (weights, rows))


def test_wide_weights_are_rounded_to_the_rows_and_get_wide_gradients() -> None:
    weights, rows = rand(2, 3, 4, dtype=torch.float32).requires_grad_(), rand(2, 4, 5, dtype=torch.bfloat16)
    rows.requires_grad_()
    mixed = mix(weights, rows)
    exact = weights.bfloat16().double() @ rows.double()
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), exact, rtol=2**-8, atol=1e-6)  # one rounding to bf16
    mixed.sum().backward()
    assert weights.grad is not None and weights.grad.dtype == torch.float32
    assert rows.grad is not None and rows.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_autocast_does_not_leak_in(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CPU_MULTIPLIES_BF16", native)
    weights, rows = (
        rand(2, 3, 4, dtype=torch.float32).requires_grad_(),
        rand(2, 4, 5, dtype=torch.float32).requires_grad_(),
    )
    want = mix(weights, rows)
    want_grad = torch.autograd.grad(want.sum(), [weights, rows])
    with torch.autocast("cpu", torch.bfloat16):
        got = mix(weights, rows)
        got_grad = torch.autograd.grad(got.sum(), [weights, rows])
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(got_grad, want_grad, strict=True))


def test_bf16_products_agree_with_and_without_bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, rows = rand(2, 3, 40, dtype=torch.float32), rand(2, 40, 5, dtype=torch.bfloat16)
    both = []
    for native in (True, False):
        monkeypatch.setattr(products, "CPU_MULTIPLIES_BF16", native)
        both.append(mix(weights, rows).float())
    torch.testing.assert_close(*both, rtol=2**-7, atol=1e-6)  # the order of a float32 sum, then one rounding


def test_a_second_derivative_is_refused() -> None:
    weights, rows = rand(1, 2, 2).requires_grad_(), rand(1, 2, 2).requires_grad_()
    # The sum's gradient is a constant: autograd alone would call the result one, too.
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(mix(weights, rows).sum(), rows, create_graph=True)
