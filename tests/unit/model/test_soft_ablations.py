"""The ablations of Soft MoE's router against their definitions in float64, gradients too, and what each must be."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmoe_train.model.init import initialize
from softmoe_train.model.moe import MoE, build_router
from softmoe_train.model.routing import SoftRouter
from softmoe_train.optim.groups import decay_groups, expert_dim
from tests.models import moe_config
from tests.ranks.small import model_config, perturb
from tests.unit.model.reference import ablated_weights, through_experts

D, E, S = 5, 3, 2
PUBLISHED = {"dispatch": "learned", "combine": "learned", "normalize": True, "scale": True}
ABLATIONS: dict[str, dict[str, Any]] = {
    "soft / uniform": {"combine": "uniform"},
    "uniform / soft": {"dispatch": "uniform"},
    "uniform": {"dispatch": "uniform", "combine": "uniform"},
    "separate": {"combine": "separate"},
    "no scale": {"scale": False},
    "not normalised": {"normalize": False},
    "not normalised, no scale": {"normalize": False, "scale": False},
    "separate, not normalised": {"combine": "separate", "normalize": False},
}
PARAMETERS = {
    "soft / uniform": {"phi", "scale"},
    "uniform / soft": {"phi", "scale"},
    "uniform": set(),
    "separate": {"phi", "combine_phi", "scale"},
    "no scale": {"phi"},
    "not normalised": {"phi", "scale"},
    "not normalised, no scale": {"phi"},
    "separate, not normalised": {"phi", "combine_phi", "scale"},
}


def layer_of(router: str = "soft", **soft: Any) -> MoE:
    """A layer in float64 whose weights are nowhere zero or alike."""
    layer = MoE(
        moe_config(blocks=[0], router=router, num_experts=E, slots_per_expert=S, expert_init="independent", soft=soft),
        D,
        7,
    )
    initialize(layer, seed=5)
    perturb(layer)
    return layer.double()


def tokens(images: int = 2, count: int = E * S) -> Tensor:
    return torch.randn(
        images, count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()


def expert_of(layer: MoE, e: int, row: Tensor) -> Tensor:
    w = layer.experts
    return F.gelu(row @ w.w1[e] + w.b1[e], approximate="tanh") @ w.w2[e] + w.b2[e]


def gradients(y: Tensor, x: Tensor, layer: MoE) -> list[Tensor]:
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(y, [x, *layer.parameters()], weights))


@pytest.mark.parametrize("name", ABLATIONS)
def test_outputs_and_gradients_are_those_of_the_definition(name: str) -> None:
    layer, x = layer_of(**ABLATIONS[name]), tokens(count=4)
    router, soft = dict(layer.router.named_parameters()), {**PUBLISHED, **ABLATIONS[name]}
    want = torch.stack(
        [
            through_experts(*ablated_weights(one, router, soft, E * S), one, lambda e, row: expert_of(layer, e, row), S)
            for one in x
        ]
    )
    got = layer(x)[0]
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, x, layer), gradients(want, x, layer), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_parameters_are_those_that_something_reads(name: str) -> None:
    router = build_router(layer_of(**ABLATIONS[name]).config, D)
    assert set(dict(router.named_parameters())) == PARAMETERS[name]


@pytest.mark.parametrize("name", ABLATIONS)
def test_weights_sum_to_one(name: str) -> None:
    routing = layer_of(**ABLATIONS[name]).router(tokens(count=4))
    torch.testing.assert_close(routing.dispatch.sum(1), torch.ones(2, E, S, dtype=torch.float64))
    torch.testing.assert_close(routing.combine.sum((2, 3)), torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_router_of_bf16_tokens_stays_float32(name: str) -> None:
    layer, x = layer_of(**ABLATIONS[name]).float(), tokens().bfloat16()
    low, high = layer.router(x), layer.router(x.float())
    assert low.slots.dtype == torch.bfloat16
    assert low.dispatch.dtype == low.combine.dtype == torch.float32
    assert torch.equal(low.dispatch, high.dispatch) and torch.equal(low.combine, high.combine)
    assert layer(x)[0].dtype == torch.bfloat16
    if PARAMETERS[name]:
        with pytest.raises(TypeError, match="must stay float32"):
            layer.router.bfloat16()(x)


def test_uniform_dispatch_gives_every_slot_the_mean_of_the_tokens() -> None:
    x = tokens()
    slots = layer_of(dispatch="uniform").router(x).slots
    torch.testing.assert_close(slots, x.mean(1)[:, None, None].expand(-1, E, S, -1))


def test_uniform_combine_gives_every_token_the_same_update() -> None:
    y = layer_of(combine="uniform")(tokens())[0]
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    assert (y[0, 0] - y[1, 0]).abs().max() > 1e-3, "but another one in each image"


def test_a_separate_matrix_is_another_function_unless_it_is_the_same_matrix() -> None:
    separate, shared, x = layer_of(combine="separate"), layer_of(), tokens()
    assert isinstance(shared.router, SoftRouter)
    shared.load_state_dict({n: t for n, t in separate.state_dict().items() if "combine_phi" not in n})
    assert (separate(x)[0] - shared(x)[0]).abs().max() > 1e-3
    with torch.no_grad():
        separate.router.combine_phi.copy_(separate.router.phi)
    torch.testing.assert_close(separate(x)[0], shared(x)[0])


def test_without_normalisation_longer_tokens_make_sharper_weights() -> None:
    x = tokens()
    for normalize, factor in ((True, 1.0), (False, 2.0)):
        router = layer_of(normalize=normalize, scale=False).router
        one, two = (router(scale * x).combine.flatten(2).log() for scale in (1, 2))
        ratio = (two - two.mean(-1, keepdim=True)) / (one - one.mean(-1, keepdim=True))
        # The epsilon inside the norm is 1e-6 of a squared length of about 5.
        torch.testing.assert_close(ratio, torch.full_like(ratio, factor), rtol=1e-5, atol=0)


def test_identity_sends_token_i_through_expert_i_over_s() -> None:
    layer, x = layer_of(router="identity"), tokens()
    want = torch.stack([torch.stack([expert_of(layer, i // S, row) for i, row in enumerate(one)]) for one in x])
    got = layer(x)[0]
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, x, layer), gradients(want, x, layer), strict=True):
        torch.testing.assert_close(a, b)
    assert not list(layer.router.parameters())


def test_identity_is_identity_matrices() -> None:
    routing = layer_of(router="identity").router(tokens())
    for weights in (routing.dispatch, routing.combine):
        assert torch.equal(weights.flatten(2), torch.eye(E * S, dtype=torch.float64).expand(2, -1, -1))


def test_both_matrices_start_alike_in_size_and_differ() -> None:
    router = build_router(moe_config(num_experts=64, slots_per_expert=2, soft={"combine": "separate"}), 96)
    initialize(router, seed=0)
    for matrix in (router.phi, router.combine_phi):
        assert matrix.std().item() == pytest.approx((64 * 96) ** -0.5, rel=0.02)
    assert not torch.equal(router.phi, router.combine_phi)


def test_a_separate_matrix_has_the_rules_of_the_other() -> None:
    names = ["blocks.1.moe.router.combine_phi", "blocks.1.moe.router.phi"]
    assert decay_groups([*names, "blocks.1.moe.router.scale"])["none"] == names
    assert [expert_dim(name) for name in names] == [1, 1]


@pytest.mark.parametrize(
    ("soft", "init", "said"),
    [
        ({"dispatch": "uniform", "combine": "uniform"}, "identical", r"use model\.moe\.expert_init=independent"),
        ({"dispatch": "uniform", "combine": "separate"}, "independent", r"use model\.moe\.soft\.combine=learned"),
    ],
)
def test_what_would_mean_nothing_is_refused(soft: dict[str, Any], init: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model_config(moe=moe_config(blocks="last 1", num_experts=4, expert_init=init, soft=soft))
