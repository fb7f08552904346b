"""Which routers keep the dense model's function when every expert is a copy of its MLP: those whose weights of a token sum to one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from softmoe_train.model.vit import ViT
from tests.ranks.small import global_batch
from tests.unit.warm.bare import as_run, model_of, small, warmed, wide

EXACT = 1e-12  # float64, sums in another order


@pytest.fixture(scope="module")
def dense() -> ViT:
    return model_of(small(blocks=[]))


@pytest.fixture(scope="module")
def source(dense: ViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_run(tmp_path_factory.mktemp("dense"), dense)


def difference(dense: ViT, source: Path, noise: float = 0.0, **moe: Any) -> float:
    """The largest one of a logit and of the loss, upcycled against dense, in evaluation; logits are about 0.3."""
    batch = global_batch()
    images = batch.images.double() / 127.5 - 1
    logits = [wide(model)(images).logits for model in (dense, warmed(small(**moe), source, noise=noise)[0])]
    losses = [torch.nn.functional.cross_entropy(one, batch.labels) for one in logits]
    return max((logits[0] - logits[1]).abs().max().item(), abs(losses[0] - losses[1]).item())


def test_identity_is_the_dense_model_since_each_token_is_a_slot(dense: ViT, source: Path) -> None:
    assert difference(dense, source, router="identity", num_experts=8, slots_per_expert=2) < EXACT
    assert difference(dense, source, router="identity", num_experts=8, slots_per_expert=2, noise=0.1) > 1e-4


def test_soft_is_not_since_its_slots_are_means_of_tokens(dense: ViT, source: Path) -> None:
    assert difference(dense, source, router="soft", num_experts=8, slots_per_expert=2) > 1e-3


def test_tokens_choice_is_the_dense_model_where_every_token_reaches_every_expert(dense: ViT, source: Path) -> None:
    """The gates of a token over all experts sum to one."""
    assert difference(dense, source, router="tokens_choice", tokens_choice={"top_k": 4}) < EXACT
    assert difference(dense, source, router="tokens_choice", num_experts=1, slots_per_expert=1) < EXACT


def test_tokens_choice_of_one_expert_is_not_since_its_gate_is_below_one(dense: ViT, source: Path) -> None:
    assert difference(dense, source, router="tokens_choice", sparse={"capacity_factor": 4.0}) > 1e-3


def test_experts_choice_is_the_dense_model_where_every_expert_takes_every_token(dense: ViT, source: Path) -> None:
    assert difference(dense, source, router="experts_choice", sparse={"capacity_factor": 4.0}) < EXACT
    assert difference(dense, source, router="experts_choice") > 1e-3


@pytest.mark.parametrize("router", ["tokens_choice", "experts_choice"])
def test_a_sparse_router_changes_its_number_of_experts(source: Path, tmp_path: Path, router: str) -> None:
    before = model_of(small(router=router, num_experts=2))
    after, told = warmed(small(router=router, num_experts=4), as_run(tmp_path / "two", before))
    gate = after.blocks[2].moe.router.gate
    assert torch.equal(gate, before.blocks[2].moe.router.gate[:, [0, 1, 0, 1]])
    assert told.counts["copied"] == 10


def test_the_parameters_of_another_router_are_left_aside_and_said(tmp_path: Path) -> None:
    _, told = warmed(small(router="experts_choice"), as_run(tmp_path / "soft", model_of(small())))
    aside = {f"model.blocks.{i}.moe.router.{name}" for i in (1, 2) for name in ("phi", "scale")}
    assert aside <= told.fit.aside.keys()
    assert {name for name, begin in told.fit.begins.items() if begin.how == "created"} == {
        f"blocks.{i}.moe.router.gate" for i in (1, 2)
    }
