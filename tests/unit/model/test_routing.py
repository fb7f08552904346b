"""The router against the vector of the paper's formulas and against its invariances, in float64."""

import pytest
import torch

from softmoe_train.model.routing import SoftRouter
from tests.unit.model.reference import soft_moe_token_by_token


@pytest.fixture
def router() -> SoftRouter:
    """d = 3, two experts of two slots; the slot parameters of the test vector."""
    router = SoftRouter(3, num_experts=2, slots_per_expert=2).double()
    phi = torch.tensor([[-1, -0.5, 0, 0.5], [1, -1, -0.5, 0], [0.5, 1, -1, -0.5]], dtype=torch.float64)
    with torch.no_grad():
        router.phi.copy_(phi.view(3, 2, 2))
        router.scale.fill_(1.5)
    return router


@pytest.fixture
def x() -> torch.Tensor:
    """One group of four tokens, x[i, j] = (3i + j - 5) / 4."""
    return ((3 * torch.arange(4).view(4, 1) + torch.arange(3) - 5).double() / 4).unsqueeze(0)


def close(got: torch.Tensor, want: object) -> None:
    torch.testing.assert_close(got.detach(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=5e-7)


def test_logits_match_the_published_vector(router: SoftRouter, x: torch.Tensor) -> None:
    logits = router.logits(x)[0].flatten(1)
    close(logits[0], [-0.070711, 0.494975, 0.948683, -0.300000])
    close(logits[3], [0.455842, -0.113961, -1.299600, -0.241747])


def test_dispatch_combine_and_slots_match_the_published_vector(router: SoftRouter, x: torch.Tensor) -> None:
    routing = router(x)
    close(routing.dispatch[0, 0].flatten(), [0.154675, 0.267976, 0.581196, 0.298647])
    close(routing.combine[0, 0].flatten(), [0.158046, 0.278265, 0.438027, 0.125662])
    close(
        routing.slots[0].flatten(0, 1),
        [
            [0.019675, 0.269675, 0.519675],
            [-0.342310, -0.092310, 0.157690],
            [-0.803629, -0.553629, -0.303629],
            [-0.077635, 0.172365, 0.422365],
        ],
    )


def test_outputs_with_toy_experts_match_the_published_vector(router: SoftRouter, x: torch.Tensor) -> None:
    routing = router(x)
    outputs = torch.stack([routing.slots[:, 0].tanh(), routing.slots[:, 1].square()], dim=1)
    y = torch.einsum("GTES,GESD->GTD", routing.combine, outputs)
    close(y[0, 0], [0.195054, 0.153994, 0.181778])
    close(y[0, 3], [-0.023302, 0.124771, 0.299898])


def test_dispatch_sums_to_one_over_tokens_and_combine_over_slots(router: SoftRouter) -> None:
    routing = router(torch.randn(5, 7, 3, dtype=torch.float64))
    torch.testing.assert_close(routing.dispatch.sum(1), torch.ones(5, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(routing.combine.sum((2, 3)), torch.ones(5, 7, dtype=torch.float64))


def test_scaling_tokens_scales_slots_and_leaves_weights(router: SoftRouter) -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64) + 2
    one, ten = router(x), router(10 * x)
    # 1e-5: the epsilon inside the norm is 1e-6 of a squared length of about 12.
    torch.testing.assert_close(one.dispatch, ten.dispatch, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.combine, ten.combine, rtol=1e-5, atol=0)
    torch.testing.assert_close(10 * one.slots, ten.slots, rtol=1e-5, atol=1e-5)


def test_permuting_tokens_permutes_combine_and_leaves_slots(router: SoftRouter) -> None:
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    one, two = router(x), router(x[:, order])
    torch.testing.assert_close(one.slots, two.slots)
    torch.testing.assert_close(one.combine[:, order], two.combine)


def test_bf16_tokens_are_routed_in_float32() -> None:
    router = SoftRouter(16, 4, 2)
    torch.nn.init.normal_(router.phi, generator=torch.Generator().manual_seed(0))
    torch.nn.init.ones_(router.scale)
    x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    low, high = router(x), router(x.float())
    assert low.dispatch.dtype == low.combine.dtype == torch.float32
    assert low.slots.dtype == torch.bfloat16
    # Bit-equal: the same float32 arithmetic on the same (rounded) tokens.
    assert torch.equal(low.dispatch, high.dispatch)
    assert torch.equal(low.combine, high.combine)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x).dispatch, high.dispatch)


def test_half_precision_router_parameters_are_refused() -> None:
    router = SoftRouter(16, 4, 2).bfloat16()
    with pytest.raises(TypeError, match="must stay float32"):
        router(torch.zeros(1, 3, 16, dtype=torch.bfloat16))


def test_the_reference_loop_agrees_with_the_vector(router: SoftRouter, x: torch.Tensor) -> None:
    y = soft_moe_token_by_token(
        x[0], router.phi.detach().flatten(1), 1.5, lambda e, row: row.tanh() if e == 0 else row.square(), 2
    )
    close(y[0], [0.195054, 0.153994, 0.181778])
