"""Gated experts and dropout inside experts: sizes, starts, what is kept for backward, and what is dropped where."""

from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_train.model.expert_mlp import gated_hidden
from softmoe_train.model.init import initialize
from softmoe_train.model.keyed import dropout, image_keys, keys_at, keys_within
from softmoe_train.model.moe import MoE
from softmoe_train.model.vit import build_model
from tests.models import moe_config
from tests.ranks.small import model_config


def test_a_gated_expert_keeps_no_more_bytes_than_a_plain_one() -> None:
    width, hidden = 12, 48  # 2 / 3 of 48 is whole
    kept: dict[str, int] = {}
    for kind in ("mlp", "gated_mlp"):
        layer = MoE(moe_config(blocks=[0], num_experts=2, slots_per_expert=2, expert=kind), width, hidden)
        initialize(layer, seed=0)
        seen: dict[int, int] = {}

        def keep(t: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y, _ = layer(torch.randn(3, 5, width).requires_grad_())
        for p in layer.parameters():
            seen.pop(p.untyped_storage().data_ptr(), None)
        assert y.grad_fn is not None
        kept[kind] = sum(seen.values())
    assert kept["gated_mlp"] <= kept["mlp"]


@pytest.mark.parametrize(("width", "hidden", "matched"), [(384, 1536, 1024), (768, 3072, 2048), (1024, 4096, 2728), (1280, 5120, 3416), (24, 40, 26)])  # fmt: skip
def test_a_gated_expert_has_the_parameters_of_a_plain_one(width: int, hidden: int, matched: int) -> None:
    assert gated_hidden(width, hidden) == matched
    counts = []
    for kind in ("mlp", "gated_mlp"):
        with torch.device("meta"):
            layer = MoE(moe_config(blocks=[0], num_experts=1, expert=kind), width, hidden)
        counts.append(sum(p.numel() for p in layer.experts.parameters()))
    unit = 3 * width + 2  # parameters of one hidden value
    assert abs(counts[1] - counts[0]) <= unit * (4 if matched >= 256 else 0.5)


def test_gates_start_as_the_kernels_do_and_alike_or_not_as_asked() -> None:
    for init in ("identical", "independent"):
        layer = MoE(moe_config(blocks=[0], num_experts=3, expert="gated_mlp", expert_init=init), 96, 384)
        initialize(layer, seed=0)
        wg = layer.experts.wg
        assert wg is not None
        bound = (6 / (96 + wg.shape[2])) ** 0.5
        assert 0.99 * bound < wg.abs().max().item() <= bound
        assert torch.equal(wg[0], wg[1]) == (init == "identical")
        assert not torch.equal(wg[0], layer.experts.w1[0])


def test_dropout_keeps_the_mean_and_drops_its_share_of_each_value() -> None:
    keys = keys_within(image_keys(7, torch.arange(400)), (50,))
    for rate in (0.1, 0.5):
        kept = dropout(torch.ones(400, 50, 10), keys, rate)
        assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - rate)], rel=1e-4)
        # 20,000 draws of each hidden value: 5 deviations of their mean.
        allowed = 5 * (rate / (1 - rate) / 20_000) ** 0.5
        assert (kept.mean((0, 1)) - 1).abs().max() < allowed
        pairs = torch.corrcoef((kept > 0).float().flatten(0, 1).T) - torch.eye(10)
        assert pairs.abs().max() < 5 / 20_000**0.5, "values of one number are independent too"


def dropped_model(rate: float) -> Any:
    moe = moe_config(blocks="last 2", num_experts=4, slots_per_expert=2, expert_init="independent", expert_dropout=rate)
    model = build_model(model_config(moe=moe), torch.float64)
    model.to_empty(device="cpu")
    initialize(model, 0)
    return model.double()


def test_dropout_is_of_training_alone_and_belongs_to_the_image_and_the_block() -> None:
    model, none = dropped_model(0.5), dropped_model(0.0)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    keys = image_keys(3, torch.tensor([5, 6, 7]))
    trained = model.features(images, keys)[0]
    assert torch.equal(model.features(images)[0], none.features(images)[0]), "evaluation has no keys"
    assert torch.equal(none.features(images)[0], none.features(images, keys)[0]), "0 drops nothing"
    assert (trained - none.features(images)[0]).abs().max() > 1e-3
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model.features(images[order], keys[order])[0], trained[order])
    assert (model.features(images, keys[order])[0] - trained).abs().max() > 1e-3


def test_every_block_draws_from_keys_of_its_own() -> None:
    model = dropped_model(0.5)
    keys, seen = image_keys(3, torch.tensor([5, 6])), {}
    for name, layer in model.named_modules():
        if isinstance(layer, MoE):
            layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[1]}))
    model(torch.zeros(2, 3, 8, 8), keys)
    assert len(seen) == 2
    for name, given in seen.items():
        assert torch.equal(given, keys_at(keys, name.removesuffix(".moe")))
    assert not torch.equal(*seen.values())


def test_the_same_slot_of_other_experts_and_other_slots_drop_other_values() -> None:
    layer = MoE(moe_config(blocks=[0], num_experts=3, slots_per_expert=4, expert_dropout=0.5), 2, 64)
    seen: list[Tensor] = []

    class Recorded:
        def through(self, slots: Tensor, compute: Any, keys: Tensor | None = None) -> Tensor:
            assert keys is not None
            seen.append(keys)
            return slots

        def local(self, weight: Tensor) -> Tensor:
            return weight

    layer.exchange = Recorded()
    initialize(layer, 0)
    layer(torch.randn(5, 7, 2), image_keys(0, torch.arange(5)))
    assert seen[0].shape == (5, 3)
    masks = dropout(torch.ones(5 * 3 * 4, 64), keys_within(seen[0], (4,)).flatten(), 0.5)
    assert len(masks.unique(dim=0)) == 60
