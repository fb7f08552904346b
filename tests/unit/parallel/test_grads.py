"""The global norm is right however long a gradient is."""

import pytest
import torch

from softmoe_train.dist import World, process_group
from softmoe_train.parallel.grads import grad_norm


def test_the_norm_of_a_long_gradient_is_right() -> None:
    """The CPU sums squares one after another: in float32 this one came out 1e-4 too small."""
    gradient = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0))
    with process_group(World(0, 1, 0, 1), torch.device("cpu")):
        norm = grad_norm([gradient, torch.ones(3)], torch.ones(2, dtype=torch.float64), torch.tensor(2.0))
    want = (gradient.double().square().sum() + 3).sqrt().item()
    assert norm.item() == pytest.approx(want, rel=1e-7)
    assert norm.dtype == torch.float32


@pytest.mark.parametrize("loss", [torch.inf, -torch.inf, torch.nan])
def test_the_norm_tells_of_a_loss_that_is_not_finite(loss: float) -> None:
    with process_group(World(0, 1, 0, 1), torch.device("cpu")):
        norm = grad_norm([torch.ones(3)], torch.ones(1, dtype=torch.float64), torch.tensor(loss))
    assert norm.isnan()
