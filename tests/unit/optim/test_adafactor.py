"""Adafactor against optax, against its formula in float64, and the no-op on a bad gradient."""

import numpy as np
import pytest
import torch
from torch import Tensor

from softmoe_train.model.vit import build_model
from softmoe_train.optim.adafactor import alone, factored_dims
from softmoe_train.optim.build import OptimConfig, build_optimizer, is_elementwise, state_layout
from tests.ranks.small import ADAFACTOR, ADAMW, SGD, model_config
from tests.unit.optim.reference import Reference

# optax 0.2.8 (jax 0.10.2): chain(scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=4, epsilon=1e-30, decay_rate_fn of
# big_vision), ema(0.9, debias=False, accumulator_dtype)), the third update of `optax_gradient`, flattened; then its statistics.
GOLDEN = {
    "blocks.0.mlp.fc1.weight": (
        (4, 6),
        [
            -0.28921998, 0.036247622, 0.08450715, 0.05656075, -0.055954576, 0.29210734, -0.11385096, -0.111045495, 0.23240925,
            0.16955227, -0.20197333, 0.1234187, 0.011932179, -0.021372367, 0.025145687, -0.054955967, -0.09407985, -0.053559422,
            0.17499769, -0.14299712, -0.14358842, 0.111227855, 0.019197814, -0.19405401,
        ],
    ),
    "head.weight": (
        (5, 4),
        [
            -0.16232654, 0.035003226, 0.04734838, 0.003723327, -0.055516504, 0.37373203, -0.05403252, -0.15038653, 0.29755974,
            0.07721029, -0.22135577, 0.15326038, 0.016924694, -0.024800967, 0.039827697, -0.041106597, -0.07854133, -0.06576013,
            0.0999894, -0.1599122,
        ],
    ),
    "head.bias": ((5,), [-0.1598772, 0.08881093, 0.07022447, -0.04221574, -0.003384896]),
}  # fmt: skip
GOLDEN_ROW, GOLDEN_COL = (
    [0.90114844, 0.59513795, 0.55105406, 0.803607],
    [0.21216942, 0.6089796, 1.2926083, 0.21324092, 0.66257626, 1.2868469],
)
SHAPES = {name: shape for name, (shape, _) in GOLDEN.items()}
NO_DECAY = ADAFACTOR.decay.model_copy(update={"head": 0.0, "kernels": 0.0, "router_scale": 0.0})
FOUR = ADAFACTOR.model_copy(update={"min_dim_to_factor": 4, "decay": NO_DECAY})


def optax_gradient(step: int, shape: tuple[int, ...]) -> Tensor:
    n = np.arange(np.prod(shape)).reshape(shape)
    return torch.from_numpy(((((n * 7 + step * 5) % 23) - 11) / 16 * (1 + n % 3)).astype(np.float32))


def run(
    config: OptimConfig, steps: int, rate: float, bad: tuple[int, ...] = ()
) -> tuple[dict[str, Tensor], list[dict]]:
    """The weights from zero after these updates, and each parameter's state."""
    values = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    optimizer = build_optimizer(config, values, SHAPES, alone)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, value in values.items():
            value.grad = optax_gradient(step, SHAPES[name])
            if step in bad:
                value.grad[0] = torch.nan
        optimizer.found_inf = torch.tensor(float(step in bad))  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    return values, [optimizer.state[value] for value in values.values()]


def test_the_third_update_is_optax_s() -> None:
    two, three = run(FOUR, 2, 1.0)[0], run(FOUR, 3, 1.0)
    for name, (shape, want) in GOLDEN.items():
        got = (two[name] - three[0][name]).flatten()
        # Momentum is rounded to bfloat16 (8 bits) twice on the way; the golden one is not.
        torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=2**-9 * 0.8, msg=f"{name} {shape}")
    torch.testing.assert_close(three[1][0]["row"], torch.tensor(GOLDEN_ROW), rtol=2e-7, atol=0)
    torch.testing.assert_close(three[1][0]["col"], torch.tensor(GOLDEN_COL), rtol=2e-7, atol=0)
    assert {key: t.dtype for key, t in three[1][0].items()} == {
        "row": torch.float32, "col": torch.float32, "exp_avg": torch.bfloat16, "step": torch.float32
    }  # fmt: skip


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_updates_follow_the_paper_s_formula_in_float64(beta1: float) -> None:
    decay = {"blocks.0.mlp.fc1.weight": 0.03, "head.weight": 0.3, "head.bias": 0.0}
    config = FOUR.model_copy(update={"decay": ADAFACTOR.decay, "beta1": beta1})
    values, _ = run(config, 30, 0.1)
    for name, shape in SHAPES.items():
        truth = Reference(name, np.zeros(shape), 4, beta1)
        for step in range(30):
            truth.update(optax_gradient(step, shape).double().numpy(), step + 1, 0.1, decay[name])
        # A float32 rounding may turn one of bfloat16: about 0.9 * 2^-9 of an update.
        torch.testing.assert_close(
            values[name].double(), torch.from_numpy(truth.value), rtol=2e-6, atol=1e-4 * 0.1 * (beta1 > 0) + 1e-6
        )


@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1, 2)])
def test_a_bad_gradient_changes_nothing(bad: tuple[int, ...]) -> None:
    values, states = run(ADAFACTOR.model_copy(update={"min_dim_to_factor": 4}), 3, 0.1, bad)
    good = [step for step in range(3) if step not in bad]
    assert all(value.isfinite().all() for value in values.values())
    assert [state["step"].item() for state in states] == [len(good)] * 3
    for (name, shape), value in zip(SHAPES.items(), values.values(), strict=True):
        truth = Reference(name, np.zeros(shape), 4, 0.9)
        for t, step in enumerate(good):
            decay = {"head.weight": 0.3, "head.bias": 0.0}.get(name, 0.03)
            truth.update(optax_gradient(step, shape).double().numpy(), t + 1, 0.1, decay)
        torch.testing.assert_close(value.double(), torch.from_numpy(truth.value), rtol=2e-6, atol=2e-5)


def test_rows_of_zero_gradient_stay_finite() -> None:
    values = {"head.weight": torch.ones(4, 4)}
    optimizer = build_optimizer(FOUR, values, {"head.weight": (4, 4)}, alone)
    optimizer.param_groups[0]["lr"] = 1.0
    gradient = torch.zeros(4, 4)
    gradient[0] = 1e12
    for _ in range(3):
        values["head.weight"].grad = gradient.clone()
        optimizer.found_inf = torch.zeros(())  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    assert values["head.weight"].isfinite().all()
    assert values["head.weight"][1:].eq(1.0).all()


def test_the_expert_dim_is_never_factored() -> None:
    shapes = {n: tuple(p.shape) for n, p in build_model(model_config(), torch.float32).named_parameters()}
    assert {n.split(".", 2)[-1]: factored_dims(n, s, 3) for n, s in shapes.items() if ".moe." in n and "blocks.2" in n} == {
        "moe.router.phi": (2, 0), "moe.router.scale": None,
        "moe.experts.w1": (1, 2), "moe.experts.b1": None, "moe.experts.w2": (2, 1), "moe.experts.b2": None,
    }  # fmt: skip
    assert factored_dims("blocks.2.moe.experts.w1", (128, 8, 16), 9) is None, (
        "an expert's matrix is small, however many"
    )
    assert factored_dims("blocks.0.attn.out.weight", (24, 24), 3) == (0, 1), "of equal dims, as optax orders them"
    assert factored_dims("blocks.0.mlp.fc1.weight", (40, 24), 25) is None


def test_the_kinds_say_what_they_keep_and_whether_they_may_be_flattened() -> None:
    assert [is_elementwise(config) for config in (ADAMW, SGD, ADAFACTOR)] == [True, True, False]
    assert state_layout(ADAFACTOR, "head.weight", (10, 24)) == {"row": 1, "col": 0, "exp_avg": None}
    assert state_layout(ADAFACTOR, "head.bias", (10,)) == {"exp_avg_sq": None, "exp_avg": None}
    assert state_layout(ADAMW, "head.weight", (10, 24)) == {"exp_avg": None, "exp_avg_sq": None}
