"""The DeepSpeed engine equals one process in float64, at every ZeRO stage and expert axis, and shares its checkpoints."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_train.model.init import initialize
from softmoe_train.model.loss import classification_loss
from softmoe_train.model.vit import build_model
from tests.ranks.deepspeed_ranks import FOURS, PAIRS, RATE, VARIANTS, Layout, on_four, on_one, on_two, same
from tests.ranks.launch import run_ranks
from tests.ranks.small import (
    CLIP,
    GLOBAL_BATCH,
    SEED,
    decays,
    global_batch,
    model_config,
    perturb,
    reference,
)

# float32 against float64: a gradient is a sum of a few thousand products.
TOLERANCE = 1e-5

EVERY: list[Layout] = [
    (world, axis, stage, micro)
    for world in (1, 2, 4)
    for axis in (1, 2, 4)
    if axis <= world
    for stage in (0, 1, 2)
    for micro in (1, 2)
]
# Each stage at each axis, with and without accumulation, and experts both cut and copied over expert_dp.
COVERING: set[Layout] = {
    (2, 1, 1, 2), (2, 1, 2, 1), (2, 2, 0, 2), (2, 2, 1, 1), (2, 2, 2, 2),
    (4, 2, 0, 1), (4, 2, 1, 2), (4, 2, 2, 2), (4, 4, 2, 1), (4, 1, 0, 2),
}  # fmt: skip
LAYOUTS = [
    pytest.param(layout, marks=() if layout in COVERING else pytest.mark.full, id=str(layout)) for layout in EVERY
]


@cache
def truth() -> dict[str, Any]:
    return reference()


@cache
def two_adamw_updates() -> dict[str, Any]:
    """Moments and weights by plain autograd and arithmetic in float64."""
    model = build_model(model_config(), torch.float64)
    model.to_empty(device="cpu")
    initialize(model, SEED)
    perturb(model)
    model.double()
    state = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    for step in range(2):
        batch = global_batch(step)
        logits = model(batch.images).logits
        targets = torch.nn.functional.one_hot(batch.labels, 10).double()
        model.zero_grad()
        ((torch.nn.functional.softplus(logits) - targets * logits).sum() / GLOBAL_BATCH).backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
        for name, p in model.named_parameters():
            assert p.grad is not None
            gradient = p.grad * min(1.0, CLIP / norm)
            m, v = state[name]
            m.mul_(0.9).add_(0.1 * gradient)
            v.mul_(0.999).add_(0.001 * gradient.square())
            decay = 0.3 if name == "head.weight" else 0.03 if decays(name) else 0.0
            rise = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p.data.sub_(RATE * (rise + decay * p.data))
    return {"moments": state, "weights": {name: p.detach() for name, p in model.named_parameters()}}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stage_equals_one_process_in_float64(measured: Any, layout: Layout) -> None:
    want, ranks = truth(), measured(layout)
    got = ranks[0]
    logits = torch.cat([r["logits"] for r in ranks])
    torch.testing.assert_close(logits.double(), want["logits"], rtol=TOLERANCE, atol=TOLERANCE)
    assert sum(r["loss"] for r in ranks) == pytest.approx(want["loss"], rel=1e-6)
    assert set(got["gradients"]) == set(want["gradients"])
    worst = max(want["gradients"], key=lambda name: relative(got["gradients"][name], want["gradients"][name]))
    error = relative(got["gradients"][worst], want["gradients"][worst])
    assert error < TOLERANCE, f"{worst}: {error:.1e}"
    for r in ranks:
        assert r["norm"] == pytest.approx(want["norm"], rel=TOLERANCE)
        assert r["skipped"] == 0.0
    far = {}
    for name, weight in want["weights"].items():
        moved = weight - want["weights_before"][name]
        wrong = (got["weights"][name].double() - weight).norm()
        # To the rounding of a float32 weight, which is what limits how well a small move can be seen.
        if wrong > 2e-5 * moved.norm() + 6e-8 * weight.norm():
            far[name] = (wrong / moved.norm()).item()
    assert far == {}
    norm = abs(got["norm"] / want["norm"] - 1)
    print(f"| {' | '.join(map(str, layout))} | {error:.1e} {worst} | {norm:.1e} |")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_adamw_updates_equal_one_process_in_float64(measured: Any, layout: Layout) -> None:
    want, got = two_adamw_updates(), measured(layout)[0]["adamw"]
    assert got["optimizer.updates"].tolist() == [2.0]
    for name, (m, v) in want["moments"].items():
        # The second gradient is taken at weights that may differ by 1 % of the first step; the square doubles an error.
        assert relative(got[f"optimizer.exp_avg.{name}"], m) < 2e-5, name
        assert relative(got[f"optimizer.exp_avg_sq.{name}"], v) < 4e-5, name
        distance = (got[f"model.{name}"].double() - want["weights"][name]).abs().max().item()
        # 0.05 of the rate: where a gradient is near eps = 1e-8, its rounding moves the step by about 1 %.
        assert distance < 0.05 * RATE, f"{name}: {distance:.1e}"


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the ranks of a world show: one start of each serves all tests that were chosen."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    ours = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = [item.callspec.params for item in ours]  # pyright: ignore[reportAttributeAccessIssue]
    chosen = {params["layout"] for params in cases if "layout" in params}

    @cache
    def start(world: int) -> list[dict[str, Any]]:
        layouts = [layout for layout in EVERY if layout in chosen and layout[0] == world]
        if world == 1:
            return run_ranks(on_one, 1, layouts, timeout=300)
        if world == 4:
            start(2)  # its checkpoint
        return run_ranks(on_two if world == 2 else on_four, world, layouts, folder, timeout=300)

    return start


@pytest.fixture(scope="module")
def measured(started: Any) -> Any:
    return lambda layout: [rank["measured"][layout] for rank in started(layout[0])]


@pytest.fixture(scope="module")
def pairs(started: Any) -> list[dict[str, Any]]:
    return started(2)


@pytest.fixture(scope="module")
def fours(started: Any) -> dict[Layout, dict[str, Any]]:
    return started(4)[0]["moved"]


@pytest.mark.parametrize("layout", PAIRS, ids=str)
def test_under_bf16_the_router_sees_float32_and_storage_is_float32(pairs: list, layout: Layout) -> None:
    f32, bf16 = torch.float32, torch.bfloat16
    assert pairs[0]["bf16"][layout]["seen"] == {(f32, f32, bf16, f32, f32)}
    assert pairs[0]["bf16"][layout]["dtypes"] == {f32}


@cache
def bf16_truth() -> dict[str, Any]:
    """The gradients of one process in bf16, with no engine."""
    model = build_model(model_config(), torch.bfloat16)
    model.to_empty(device="cpu")
    initialize(model, SEED)
    perturb(model)
    batch = global_batch()
    loss = classification_loss(model(batch.images).logits, batch.labels, "sigmoid").sum() / GLOBAL_BATCH
    loss.backward()
    return {"loss": loss.item(), "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("layout", PAIRS, ids=str)
def test_bf16_agrees_with_one_process_in_every_gradient(pairs: list, layout: Layout) -> None:
    ranks, want = [r["bf16"][layout] for r in pairs], bf16_truth()
    assert sum(r["loss"] for r in ranks) == pytest.approx(want["loss"], rel=1e-3)
    for name, gradient in want["gradients"].items():
        got = ranks[0]["gradients"][name]
        assert got.dtype == torch.float32
        # Each rank rounds its part of a sum to bf16 (2^-9 relative) before it is added to the others in float32.
        assert relative(got, gradient) < 0.02, name


@pytest.mark.parametrize("layout", PAIRS, ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(pairs: list, layout: Layout) -> None:
    for rank in pairs:
        assert rank["skip"][layout] == {"skipped": 1.0, "kept": True, "goes_on": True, "moved": True}


@pytest.mark.parametrize("layout", PAIRS[1:], ids=str)
def test_a_huge_gradient_is_clipped_on_the_host_as_on_the_device(pairs: list, layout: Layout) -> None:
    for rank in pairs:
        here, offloaded = rank["huge"][layout][False], rank["huge"][layout][True]
        assert here[0] > 1e20
        assert here[1:] == offloaded[1:] == (0.0, True)


@pytest.mark.parametrize("layout", PAIRS[::2], ids=str)
def test_the_average_follows_the_weights_and_leaves_training_alone(pairs: list, layout: Layout) -> None:
    for rank in pairs:
        assert rank["average"][layout] == dict.fromkeys(("averages", "saves", "differs", "leaves training alone"), True)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_saves_memory_or_time_takes_the_same_step(pairs: list, name: str) -> None:
    want, got = truth(), pairs[0]["variants"][name]
    assert got["norm"] == pytest.approx(want["norm"], rel=TOLERANCE)
    for name, gradient in want["gradients"].items():
        assert relative(got["gradients"][name], gradient) < TOLERANCE, name
        moved = want["weights"][name] - want["weights_before"][name]
        wrong = (got["weights"][name].double() - want["weights"][name]).norm()
        assert wrong < 2e-5 * moved.norm() + 6e-8 * want["weights"][name].norm(), name


@pytest.mark.parametrize("layout", FOURS, ids=str)
def test_a_native_checkpoint_is_taken_over_bit_for_bit(pairs: list, fours: dict, layout: Layout) -> None:
    assert same(fours[layout]["loaded"], pairs[0]["saved"])
    assert pairs[0]["saved"]["optimizer.updates"].tolist() == [1.0]


@pytest.mark.parametrize("layout", FOURS, ids=str)
def test_the_update_after_a_load_is_the_one_that_the_native_engine_makes(
    pairs: list, fours: dict, layout: Layout
) -> None:
    want, got = pairs[0]["next"], fours[layout]["next"]
    assert got["optimizer.updates"].tolist() == [2.0]
    for name, tensor in want.items():
        if not name.startswith("optimizer."):
            assert (got[name] - tensor).abs().max().item() < 0.05 * RATE, name
        else:
            assert relative(got[name], tensor.double()) < 4e-5, name
    assert same(fours[layout]["again"], got), "a checkpoint of this engine continues bit for bit at the same layout"


@pytest.mark.parametrize("layout", FOURS, ids=str)
def test_what_deepspeed_saved_is_taken_over_by_the_native_engine_bit_for_bit(
    pairs: list, fours: dict, layout: Layout
) -> None:
    assert same(fours[layout]["back"], pairs[0]["saved"])
