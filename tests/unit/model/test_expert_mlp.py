"""The experts' MLPs, plain and gated, with and without dropout, against the formulas, in every dtype, and their backward."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmoe_train.model import products
from softmoe_train.model.expert_mlp import Dropout, expert_mlp
from softmoe_train.model.keyed import dropout, image_keys, keys_at, keys_within

e, N, D, H = 2, 3, 4, 5
SHAPES = ((e, N, D), (e, D, H), (e, H), (e, H, D), (e, D))
GATED = (*SHAPES, (e, D, H), (e, H))
DROP = Dropout(keys_within(image_keys(0, torch.arange(e)), (N,)), rate=0.25)


class Kind(NamedTuple):
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def arguments(dtype: torch.dtype = torch.float64, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    """x, w1, b1, w2, b2, and the gate's w and b where it has one."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in drawn]


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Masks(NamedTuple):
    """1 / (1 - rate) where a value stays, and 0; what they must be is tested elsewhere."""

    hidden: Tensor
    out: Tensor


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


WHOLE = Masks(ones(1), ones(1))
DROPPED = Masks(
    dropout(ones(e, N, H), DROP.keys, DROP.rate), dropout(ones(e, N, D), keys_at(DROP.keys, "outputs"), DROP.rate)
)


def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, kept: Masks = WHOLE) -> Tensor:
    return (gelu(x @ w1 + b1.unsqueeze(1)) * kept.hidden.to(x) @ w2 + b2.unsqueeze(1)) * kept.out.to(x)


def plain_gated(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wg: Tensor, bg: Tensor, kept: Masks = WHOLE) -> Tensor:  # fmt: skip
    hidden = gelu(x @ wg + bg.unsqueeze(1)) * (x @ w1 + b1.unsqueeze(1))
    return (hidden * kept.hidden.to(x) @ w2 + b2.unsqueeze(1)) * kept.out.to(x)


KINDS = {
    "mlp": Kind(expert_mlp, plain, SHAPES),
    "mlp, dropped": Kind(lambda *t: expert_mlp(*t, dropped=DROP), lambda *t: plain(*t, DROPPED), SHAPES),
    "gated": Kind(lambda *t: expert_mlp(*t[:5], gate=(t[5], t[6])), plain_gated, GATED),
    "gated, dropped": Kind(
        lambda *t: expert_mlp(*t[:5], gate=(t[5], t[6]), dropped=DROP), lambda *t: plain_gated(*t, DROPPED), GATED
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_outputs_and_gradients_are_right(kind: Kind) -> None:
    torch.testing.assert_close(kind.ours(*arguments(shapes=kind.shapes)), kind.plain(*arguments(shapes=kind.shapes)))
    assert torch.autograd.gradcheck(kind.ours, arguments(shapes=kind.shapes))


@pytest.mark.parametrize("frozen", range(7))
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    for kind in [KINDS["mlp"], KINDS["gated"]][frozen >= 5 :]:
        got, want = arguments(shapes=kind.shapes), arguments(shapes=kind.shapes)
        for tensors in (got, want):
            tensors[frozen].requires_grad_(False)
        kind.ours(*got).square().sum().backward()
        kind.plain(*want).square().sum().backward()
        assert got[frozen].grad is None
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])  # plain weights, and as FSDP gathers them
def test_bf16_rows_meet_rounded_weights_and_give_gradients_in_the_stored_dtype(
    stored: torch.dtype, native: bool, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "CPU_MULTIPLIES_BF16", native)
    low = [t.detach().to(stored).requires_grad_() for t in arguments(torch.float32, kind.shapes)]
    low[0] = low[0].detach().bfloat16().requires_grad_()
    exact = [t.detach().bfloat16().double().requires_grad_() for t in low]
    for compute, tensors in ((kind.ours, low), (kind.plain, exact)):
        outputs = compute(*tensors)
        outputs.backward(torch.ones_like(outputs))
    assert kind.ours(*low).dtype == torch.bfloat16
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
