"""Where a proof starts: nothing is zero or alike, and nothing depends on how it is cut."""

import pytest
import torch
import torch.nn.functional as F

from softmoe_train.config import compose
from softmoe_train.model.init import initialize
from softmoe_train.model.vit import build_model
from softmoe_train.parity.state import parity_batch, perturb_
from softmoe_train.settings import RunConfig


def debug(*overrides: str) -> RunConfig:
    return compose(RunConfig, ["recipe=debug", *overrides], lambda _: [])


def test_a_perturbed_model_hides_nothing() -> None:
    config = debug("model.moe.expert_init=identical")
    model = build_model(config.model, torch.float32)
    model.to_empty(device="cpu")
    initialize(model, config.seed)
    fresh = {name: p.detach().clone() for name, p in model.named_parameters()}
    perturb_({f"model.{name}": p for name, p in model.named_parameters()}, config.seed)
    for name, p in model.named_parameters():
        assert (p != fresh[name]).float().mean() > 0.99, name
    w1, b1 = model.blocks[1].moe.experts.w1, model.blocks[1].moe.experts.b1
    assert torch.equal(fresh["blocks.1.moe.experts.w1"][0], fresh["blocks.1.moe.experts.w1"][1])
    assert not torch.equal(w1[0], w1[1])
    assert not torch.equal(b1[0], b1[1])
    assert model.blocks[1].moe.router.scale.item() != 1


def test_a_batch_does_not_depend_on_its_cut() -> None:
    config = debug()
    whole = parity_batch(config, 1, range(8))
    parts = [parity_batch(config, 1, range(start, start + 2)) for start in range(0, 8, 2)]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
    assert len({image.numpy().tobytes() for image in whole.images}) == 8
    assert not torch.equal(whole.images, parity_batch(config, 0, range(8)).images)


@pytest.mark.parametrize("labels", ["hard", "multi_hot"])
def test_labels_are_weights_where_images_are_mixed(labels: str) -> None:
    rows = parity_batch(debug(f"data.labels={labels}", "data.mixup=0.2"), 0, range(12)).labels
    own = parity_batch(debug(f"data.labels={labels}"), 0, range(12)).labels
    mixed_in = rows - 0.75 * (F.one_hot(own, 10) if labels == "hard" else own)
    assert torch.equal(mixed_in.sum(1), torch.full((12,), 0.25))
    assert torch.equal(mixed_in.unique(), torch.tensor([0.0, 0.25]))


def test_multi_hot_labels_have_one_class_or_more() -> None:
    labels = parity_batch(debug("data.labels=multi_hot"), 0, range(6)).labels
    assert labels.dtype == torch.float32
    assert labels.sum(1).min() >= 1
    assert labels.sum(1).max() > 1
