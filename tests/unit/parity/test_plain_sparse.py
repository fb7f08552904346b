"""What one process makes of a layout's decisions: those within rounding are followed, others are measured, wrong counts are infinite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_train.model.moe import build_router
from softmoe_train.model.sparse import Decisions, SparseRouting
from softmoe_train.parity.plain_sparse import PlainRouting, plain_sparse
from tests.models import moe_config

T, E = 6, 4


def routed(router: str, near: float, *, scale: float = 1.0, **moe: Any) -> tuple[SparseRouting, Any, Tensor, Tensor]:
    """A router in float64 over a group whose tokens 1 and 2 differ by `near`, relative."""
    config = moe_config(router=router, num_experts=E, **moe)
    ours = build_router(config, E).double()
    gate = torch.eye(E, dtype=torch.float64)
    ours.gate.data.copy_(gate)
    x = torch.randn(1, T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[0, 2] = x[0, 1] * (1 + near)
    x *= scale
    return ours(x), config, gate, x


def followed(decisions: Decisions, config: Any, gate: Tensor, x: Tensor) -> PlainRouting:
    return plain_sparse(config, gate, x, None, decisions)


def test_it_agrees_where_nothing_is_near() -> None:
    for router, more in (("tokens_choice", {"tokens_choice": {"top_k": 2}}), ("experts_choice", {})):
        routing, *rest = routed(router, 0.3, **more)
        plain = followed(routing.decisions, *rest)
        assert plain.apart == 0
        torch.testing.assert_close(plain.combine.sum(1), routing.weights)
        torch.testing.assert_close(plain.told, routing.told)


@pytest.mark.parametrize("near", [1e-7, 0.3])
def test_the_order_of_two_tokens_costs_what_their_gates_differ_by(near: float) -> None:
    routing, *rest = routed("tokens_choice", near)
    token, choices, priority = routing.decisions
    assert choices is not None and priority is not None
    swapped = torch.tensor([{1: 2, 2: 1}.get(t, t) for t in range(T)])
    other = Decisions(torch.where(token < T, swapped[token.clamp(max=T - 1)], T), choices, swapped[priority])
    plain = followed(other, *rest)
    assert (0 < plain.apart < 1e-6) == (near < 1e-6)
    assert math.isfinite(plain.apart), "what follows from the order was counted as the layout did"


def test_a_choice_that_gates_do_not_allow_is_as_wrong_as_the_gates_are_far_apart() -> None:
    routing, *rest = routed("tokens_choice", 0.3)
    _, choices, priority = routing.decisions
    assert choices is not None
    assert followed(routing.decisions._replace(choices=(choices + 1) % E), *rest).apart > 0.05
    assert followed(routing.decisions._replace(priority=torch.zeros_like(priority)), *rest).apart == math.inf
    unserved = routing.decisions._replace(token=torch.full_like(routing.decisions.token, T))
    assert followed(unserved, *rest).apart == math.inf


def test_gates_that_are_no_numbers_are_not_passed_over() -> None:
    routing, config, gate, x = routed("experts_choice", 0.3)
    assert followed(routing.decisions, config, gate * float("nan"), x).apart == math.inf
    # A gate that underflows to zero is decided as well as any other.
    routing, *rest = routed("tokens_choice", 0.3, scale=1e4, tokens_choice={"top_k": E})
    assert (routing.weights == 0).any()
    assert followed(routing.decisions, *rest).apart == 0


def test_an_expert_that_takes_other_tokens_or_one_twice_is_seen() -> None:
    routing, *rest = routed("experts_choice", 0.3, sparse={"capacity_factor": 2.0})
    (token, _, _) = routing.decisions
    assert token.shape[2] == 3
    assert followed(routing.decisions._replace(token=token.flip(2)), *rest).apart == 0, "in which slot is all the same"
    assert followed(routing.decisions._replace(token=token[..., [0, 0, 1]]), *rest).apart == math.inf
    last = torch.stack([torch.tensor([t for t in range(T) if t not in of.tolist()])[:3] for of in token[0]])
    assert 0.05 < followed(routing.decisions._replace(token=last.unsqueeze(0)), *rest).apart < math.inf
