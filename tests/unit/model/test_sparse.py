"""The sparse routers against the published vectors and against loops over tokens and experts, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from softmoe_train.model.init import initialize
from softmoe_train.model.keyed import image_keys, keys_at, normal
from softmoe_train.model.moe import MoE
from softmoe_train.model.sparse import (
    ExpertsChoiceRouter,
    SparseRouting,
    TokensChoiceRouter,
    gshard_loss,
    importance_loss,
    load_loss,
)
from tests.models import moe_config
from tests.unit.model import sparse_reference as loops

D, H, E, IMAGE = 6, 10, 4, 5  # IMAGE: tokens of one
GATES = torch.tensor([[[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]]], dtype=torch.float64)


def test_the_auxiliary_losses_match_the_published_vectors() -> None:
    logits = torch.tensor([[[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]]], dtype=torch.float64)
    # Published from float32.
    noise = torch.tensor([[[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]]]).double()
    second = (logits + noise).sort(dim=-1, descending=True).indices[..., 1:2]
    assert gshard_loss(GATES).item() == pytest.approx(1.0875, abs=1e-8)
    assert importance_loss(GATES).item() == pytest.approx(0.03874999, abs=1e-6)
    assert load_loss(logits, logits + noise, second, 0.1).item() == pytest.approx(0.48573865, abs=1e-6)
    # The loops that the routers are compared with give them too.
    rows = [list(row) for row in GATES[0]]
    assert loops.gshard(rows).item() == pytest.approx(1.0875, abs=1e-8)
    assert loops.importance(rows).item() == pytest.approx(0.03874999, abs=1e-6)
    assert loops.load(logits[0], noise[0], 2, 0.1).item() == pytest.approx(0.48573865, abs=1e-6)


def layer_of(router: str, **moe: Any) -> MoE:
    """A layer in float64 whose gates are far from uniform and whose experts differ."""
    layer = MoE(moe_config(router=router, num_experts=E, expert_init="independent", **moe), D, H)
    initialize(layer, seed=5)
    with torch.no_grad():
        layer.experts.b1.normal_(generator=torch.Generator().manual_seed(1))
        layer.experts.b2.normal_(generator=torch.Generator().manual_seed(2))
    return layer.double()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, IMAGE, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(layer: MoE, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Output, sum of auxiliary losses, and for each group the tokens without an expert and the slots without a token."""
    c, w, gate = layer.router.config, layer.experts, layer.router.gate
    n, capacity = c.group_images, c.capacity(IMAGE)
    std = c.sparse.noise_std / E
    noises = None
    if keys is not None and std:
        noises = std * normal(keys_at(keys, "routing noise"), (IMAGE, E)).double()

    def expert(e: int, row: Tensor) -> Tensor:
        return F.gelu(row @ w.w1[e] + w.b1[e], approximate="tanh") @ w.w2[e] + w.b2[e]

    outputs, auxiliary, dropped, empty = [], torch.zeros((), dtype=torch.float64), [], []
    for g in range(0, len(x), n):
        tokens = x[g : g + n].reshape(-1, D)
        noise = None if noises is None else noises[g : g + n].reshape(-1, E)
        gates = loops.gates_of(tokens, gate, noise)
        if c.router == "tokens_choice":
            t = c.tokens_choice
            seating = loops.tokens_choose(gates, t.top_k, capacity, t.batch_priority)
            auxiliary = auxiliary + t.importance_loss * loops.importance(loops.gates_of(tokens, gate, None))
            auxiliary = auxiliary + t.gshard_loss * loops.gshard(gates)
            if noise is not None:
                auxiliary = auxiliary + t.load_loss * loops.load(tokens @ gate, noise, t.top_k, std)
        else:
            seating = loops.experts_choose(gates, capacity)
        served = {i for taken in seating.values() for i in taken}
        dropped.append(len(tokens) - len(served))
        empty.append(E * capacity - sum(map(len, seating.values())))
        outputs.append(loops.layer(tokens, gates, seating, expert))
    return torch.cat(outputs).view_as(x), auxiliary, dropped, empty


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("tokens_choice", {}),
    "tokens, no priority": ("tokens_choice", {"tokens_choice": {"batch_priority": False}}),
    "tokens, two choices": ("tokens_choice", {"tokens_choice": {"top_k": 2, "gshard_loss": 0.1}}),
    "tokens, two choices in groups of 3, dropping": (
        "tokens_choice",
        {"tokens_choice": {"top_k": 2}, "sparse": {"group_images": 3, "capacity_factor": 0.5}},
    ),
    "tokens, all experts, no priority, dropping": (
        "tokens_choice",
        {"tokens_choice": {"top_k": E, "batch_priority": False}, "sparse": {"group_images": 2, "capacity_factor": 0.2}},
    ),
    "tokens, whole fours": ("tokens_choice", {"sparse": {"capacity_rounding": "multiple_of_4"}}),
    "tokens, no noise": ("tokens_choice", {"sparse": {"noise_std": 0.0}}),
    "experts": ("experts_choice", {}),
    "experts, groups of 6, dropping": ("experts_choice", {"sparse": {"group_images": 6, "capacity_factor": 0.5}}),
    "experts, more slots than tokens": (
        "experts_choice",
        {"sparse": {"capacity_factor": 4.0, "capacity_rounding": "multiple_of_4"}},
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("router", "moe"), CASES.values(), ids=CASES)
def test_the_layer_and_its_gradients_equal_loops_over_tokens_and_experts(
    router: str, moe: dict[str, Any], training: bool
) -> None:
    layer, x = layer_of(router, **moe), images(6).requires_grad_()
    n = layer.config.group_images
    keys = image_keys(3, torch.arange(6)) if training else None
    inputs = {"x": x, **dict(layer.named_parameters())}
    cotangent = images(6, seed=1)

    def gradients(y: Tensor, auxiliary: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad((y * cotangent).sum() + 30 * auxiliary, list(inputs.values()))
        return dict(zip(inputs, found, strict=True))

    y, told = layer(x, keys)
    want, auxiliary, dropped, empty = by_loops(layer, x, keys)
    torch.testing.assert_close(y, want)
    got = gradients(y, told[0])
    for name, gradient in gradients(want, auxiliary).items():
        torch.testing.assert_close(got[name], gradient, msg=lambda m, name=name: f"{name}: {m}")
    slots = E * layer.router.config.capacity(IMAGE)
    assert told[0].item() == pytest.approx(auxiliary.item(), rel=1e-6)
    assert told[1].item() == pytest.approx(sum(dropped) / (n * IMAGE))
    assert told[2].item() == pytest.approx(sum(empty) / slots)
    if "sparse" in moe and moe["sparse"].get("capacity_factor", 1) < 1:
        assert sum(dropped) > 0
        unread = (want == 0).all(-1)
        assert unread.sum() == sum(dropped)
        assert (y[unread] == 0).all(), "only the residual is left of it"
    if router == "experts_choice":
        assert told[0] == 0
        assert (sum(empty) > 0) == (slots > E * n * IMAGE)


def test_capacity_follows_both_rounding_rules() -> None:
    def capacity(rounding: str, factor: float, images: int, top_k: int = 1) -> int:
        sparse = {"capacity_factor": factor, "capacity_rounding": rounding, "group_images": images}
        config = moe_config(router="tokens_choice", num_experts=8, sparse=sparse, tokens_choice={"top_k": top_k})
        return config.capacity(196)

    assert capacity("nearest", 1.0, 1) == 24, "24.5, half to even"
    assert capacity("nearest", 1.05, 8, top_k=2) == 412, "411.6"
    assert capacity("multiple_of_4", 1.0, 1) == 28
    assert capacity("multiple_of_4", 1.05, 8, top_k=2) == 412
    routing = layer_of("tokens_choice", sparse={"capacity_rounding": "multiple_of_4"}).router(images(2))
    assert routing.slots.shape == (2, E, 4, D), "1.25 slots"


ROUTERS = pytest.mark.parametrize("router", ["tokens_choice", "experts_choice"])


@ROUTERS
def test_noise_belongs_to_the_image_and_the_layer_whatever_the_batch(router: str) -> None:
    layer, x = layer_of(router, sparse={"noise_std": 40.0}), images(6)
    keys = image_keys(3, torch.arange(6))
    y = layer(x, keys)[0]
    torch.testing.assert_close(layer(x[2:4], keys[2:4])[0], y[2:4])
    for others in (None, image_keys(4, torch.arange(6)), keys_at(keys, "blocks.1"), keys.flip(0)):
        assert (layer(x, others)[0] - y).abs().amax((1, 2)).min() > 1e-3


@ROUTERS
def test_in_a_group_the_others_decide_too_and_outside_of_it_they_do_not(router: str) -> None:
    layer, x = layer_of(router, sparse={"group_images": 2, "capacity_factor": 0.5}), images(4).requires_grad_()
    y = layer(x)[0]
    beside = [layer(torch.cat([x[:1], images(1, seed=seed)]))[0][0] for seed in range(7, 11)]
    assert max((other - y[0]).abs().max().item() for other in beside) > 1e-3, "another neighbour, another output"
    (gradient,) = torch.autograd.grad(y[:2].square().sum(), x)
    assert (gradient[2:] == 0).all()
    torch.testing.assert_close(layer(x[2:])[0], y[2:])


def test_without_limits_an_image_of_a_group_is_as_it_is_alone() -> None:
    roomy = {"capacity_factor": 4.0, "noise_std": 0.0}
    x = images(4)
    for top_k in (1, 2):
        grouped = layer_of("tokens_choice", sparse={**roomy, "group_images": 4}, tokens_choice={"top_k": top_k})
        alone = layer_of("tokens_choice", sparse=roomy, tokens_choice={"top_k": top_k})
        torch.testing.assert_close(grouped(x)[0], alone(x)[0])


@pytest.mark.parametrize("batch_priority", [True, False])
def test_permuting_tokens_permutes_the_output_where_they_are_served_by_their_gates(batch_priority: bool) -> None:
    layer = layer_of("tokens_choice", tokens_choice={"batch_priority": batch_priority}, sparse={"capacity_factor": 0.5})
    x, order = images(3), torch.tensor([3, 1, 4, 0, 2])
    same = torch.allclose(layer(x)[0][:, order], layer(x[:, order])[0])
    assert same == batch_priority, "token order decides without it"
    experts = layer_of("experts_choice", sparse={"capacity_factor": 0.5})
    torch.testing.assert_close(experts(x)[0][:, order], experts(x[:, order])[0])


@ROUTERS
def test_equal_gates_go_to_the_first(router: str) -> None:
    layer = layer_of(router)
    with torch.no_grad():
        layer.router.gate.zero_()
    token = layer.router(images(1)).decisions.token
    if router == "tokens_choice":
        assert token[0, 0].tolist() == [0] and (token[0, 1:] == IMAGE).all(), "all ask for the first expert"
    else:
        assert (token == 0).all()


@ROUTERS
def test_padding_takes_no_slot_and_changes_no_real_image(router: str) -> None:
    layer = layer_of(router, sparse={"group_images": 3, "capacity_factor": 0.5})
    x = images(3)
    real = torch.tensor([True, False, True])
    token = layer.router(x.view(1, -1, D), None, real).decisions.token
    assert not ((token >= IMAGE) & (token < 2 * IMAGE)).any()
    other = x.clone()
    other[1] = 100.0
    assert torch.equal(layer(x, None, real)[0][real], layer(other, None, real)[0][real])
    assert not torch.equal(layer(x)[0][real], layer(other)[0][real])


@ROUTERS
def test_bf16_tokens_are_routed_in_float32_and_a_bf16_gate_is_refused(router: str) -> None:
    layer = layer_of(router).float()
    x = images(4).bfloat16()
    keys = image_keys(0, torch.arange(4))
    low, high = layer.router(x, keys), layer.router(x.float(), keys)
    assert low.slots.dtype == torch.bfloat16 and low.weights.dtype == low.told.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = layer.router(x, keys)
    for routing in (low, again):
        assert torch.equal(routing.weights, high.weights) and torch.equal(routing.told, high.told)
    # bf16 keeps 8 bits: a few roundings of 2^-8 of the largest value.
    torch.testing.assert_close(layer(x)[0].float(), layer(x.float())[0], rtol=0.03, atol=0.03)
    with pytest.raises(TypeError, match="must stay float32"):
        layer.bfloat16()(x)


@ROUTERS
def test_a_step_repeats_bit_for_bit(router: str) -> None:
    def step() -> list[Tensor]:
        layer = layer_of(router, sparse={"group_images": 4}).float()
        x = images(64).float().requires_grad_()
        y, told = layer(x, image_keys(3, torch.arange(64)))
        return [y, told, *torch.autograd.grad(y.square().sum() + told[0], [x, *layer.parameters()])]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


@ROUTERS
def test_shapes_are_known_before_any_number_is(router: str) -> None:
    with FakeTensorMode():
        layer = MoE(moe_config(router=router, num_experts=E, sparse={"group_images": 2}), D, H)
        y, told = layer(torch.empty(4, IMAGE, D), torch.empty(4, dtype=torch.int64))
        routing = layer.router(torch.empty(2, 2 * IMAGE, D))
    assert y.shape == (4, IMAGE, D) and told.shape == (3,)
    assert isinstance(routing, SparseRouting) and routing.slots.shape == (2, E, 2, D)


def test_what_is_not_finite_stays_in_its_group() -> None:
    for router in (TokensChoiceRouter, ExpertsChoiceRouter):
        kind = "tokens_choice" if router is TokensChoiceRouter else "experts_choice"
        layer, x = layer_of(kind, sparse={"capacity_factor": 2.0}), images(3)
        y = layer(x)[0]
        x[1] = float("nan")
        assert torch.equal(layer(x)[0][[0, 2]], y[[0, 2]])
