"""What a model computes after its experts were made from others: equal to the source where the mathematics says so, and only there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.commands.main import main
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import ViT
from softmoe_train.warm.grids import resample_position
from softmoe_train.warm.start import warm_problems
from tests.ranks.small import global_batch
from tests.unit.warm.bare import as_run, in_timm_names, model_of, small, warm_config, warmed, wide

EXACT = 1e-12  # float64, sums in another order


@pytest.fixture(scope="module")
def dense() -> ViT:
    return model_of(small(blocks=[]))


@pytest.fixture(scope="module")
def soft() -> ViT:
    return model_of(small())


@pytest.fixture
def dense_run(dense: ViT, tmp_path: Path) -> Path:
    return as_run(tmp_path / "dense", dense)


@pytest.fixture
def soft_run(soft: ViT, tmp_path: Path) -> Path:
    return as_run(tmp_path / "soft", soft)


def logits(model: ViT) -> Tensor:
    """In float64."""
    return wide(model)(global_batch().images.double() / 127.5 - 1).logits


def moved(before: ViT, config: ModelConfig, source: Path, **changes: Any) -> float:
    """The largest change of a logit by the surgery; logits are about 0.3."""
    after, _ = warmed(config, source, **changes)
    return (logits(after) - logits(before)).abs().max().item()


def test_soft_experts_copied_from_a_dense_mlp_are_not_the_dense_model(dense: ViT, dense_run: Path) -> None:
    after, told = warmed(small(), dense_run)
    assert told.counts == {"loaded": 41, "copied": 8, "created": 4, "ignored": 1}
    for i in (1, 2):
        mlp, experts = dense.blocks[i].mlp, after.blocks[i].moe.experts
        for e in range(4):
            assert torch.equal(experts.w1[e], mlp.fc1.weight.T)
            assert torch.equal(experts.b1[e], mlp.fc1.bias)
            assert torch.equal(experts.w2[e], mlp.fc2.weight.T)
            assert torch.equal(experts.b2[e], mlp.fc2.bias)
    # Slots are means of tokens, and an MLP of a mean is not the mean of the MLPs.
    assert moved(dense, small(), dense_run) > 1e-3


def test_soft_experts_copied_from_a_dense_mlp_are_the_dense_model_where_all_tokens_are_alike(
    dense: ViT, tmp_path: Path
) -> None:
    alike = model_of(small(blocks=[]))
    alike.position[:] = alike.position[0]
    after, _ = warmed(small(), as_run(tmp_path / "alike", alike))
    grey = torch.full((2, 3, 8, 8), 0.25, dtype=torch.float64)
    torch.testing.assert_close(wide(after)(grey).logits, wide(alike)(grey).logits, rtol=0, atol=EXACT)


def test_more_experts_or_slots_by_whole_numbers_compute_the_same(soft: ViT, soft_run: Path) -> None:
    """Every slot appears k times with the k-th part of its weight."""
    assert moved(soft, small(num_experts=12), soft_run) < EXACT
    assert moved(soft, small(slots_per_expert=6), soft_run) < EXACT
    assert moved(soft, small(num_experts=8, slots_per_expert=4), soft_run) < EXACT


def test_other_numbers_of_experts_or_slots_do_not(soft: ViT, soft_run: Path) -> None:
    assert moved(soft, small(num_experts=6), soft_run) > 1e-5
    assert moved(soft, small(num_experts=2), soft_run) > 1e-5
    assert moved(soft, small(slots_per_expert=1), soft_run) > 1e-5


def test_which_expert_comes_from_which(soft: ViT, soft_run: Path) -> None:
    after, told = warmed(small(num_experts=6, slots_per_expert=1), soft_run)
    old, new = soft.blocks[2].moe, after.blocks[2].moe
    for e in range(6):
        assert torch.equal(new.experts.w1[e], old.experts.w1[e % 4])
        assert torch.equal(new.router.phi[:, e, 0], old.router.phi[:, e % 4, 0])
    assert any("stay alike; warm.noise=0.01" in difference for difference in told.fit.differences)
    fewer, told = warmed(small(num_experts=2), soft_run)
    assert torch.equal(fewer.blocks[2].moe.experts.b2, old.experts.b2[:2])
    assert told.fit.differences == [
        "model.moe.num_experts: 4 there, 2 here: the experts after the first 2 are left out"
    ]


def test_noise_is_relative_and_each_expert_s_own(dense: ViT, dense_run: Path) -> None:
    after, _ = warmed(small(), dense_run, noise=0.1)
    again, _ = warmed(small(), dense_run, noise=0.1)
    factor = after.blocks[1].moe.experts.w1 / dense.blocks[1].mlp.fc1.weight.T - 1
    assert factor.flatten(1).std(1).sub(0.1).abs().max() < 0.01
    correlation = torch.corrcoef(factor.flatten(1))
    assert (correlation - torch.eye(4)).abs().max() < 0.15  # 960 draws an expert
    assert torch.equal(after.blocks[1].moe.experts.w1, again.blocks[1].moe.experts.w1)
    assert not torch.equal(after.blocks[1].moe.experts.w1, after.blocks[2].moe.experts.w1)


def test_noise_tells_tiled_experts_and_slots_apart(soft_run: Path) -> None:
    after, told = warmed(small(num_experts=8), soft_run, noise=0.01)
    moe = after.blocks[2].moe
    assert not torch.equal(moe.experts.w1[0], moe.experts.w1[4])
    assert not torch.equal(moe.router.phi[:, 0], moe.router.phi[:, 4])
    assert not any("stay alike" in difference for difference in told.fit.differences)


def test_the_same_model_is_taken_over_bit_by_bit_from_each_kind_of_source(
    soft: ViT, dense: ViT, tmp_path: Path
) -> None:
    run, other = as_run(tmp_path / "run", model_of(small(), seed=2), average=soft), tmp_path / "e.safetensors"
    assert main(["export", f"ckpt={run}", f"out={other}", "weights=average"]) == 0
    sources = [(soft, run, {"weights": "average"}), (soft, other, {}), (dense, in_timm_names(dense, tmp_path), {})]
    for model, source, changes in sources:
        after, told = warmed(model.config, source, **changes)
        assert set(told.counts) == {"loaded", "ignored"}, source
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in after.state_dict().items()), source


def test_another_resolution_resamples_positions_alone(dense: ViT, dense_run: Path) -> None:
    config = small(blocks=[]).model_copy(update={"image_size": 12})
    after, told = warmed(config, dense_run)
    assert told.counts == {"loaded": 48, "resampled": 1, "ignored": 1}
    assert torch.equal(after.position, resample_position(dense.position, 36))


def test_another_patch_size_resamples_the_kernel_too(dense_run: Path) -> None:
    config = small(blocks=[]).model_copy(update={"image_size": 12, "patch_size": 4})
    _, told = warmed(config, dense_run)
    resampled = {name for name, begin in told.fit.begins.items() if begin.how == "resampled"}
    assert resampled == {"position", "patch_embed.weight"}


def test_another_number_of_classes_has_a_fresh_head(dense_run: Path) -> None:
    after, told = warmed(small(blocks=[]).model_copy(update={"num_classes": 7}), dense_run)
    assert torch.equal(after.head.weight, torch.zeros(7, 24))
    assert {name for name, begin in told.fit.begins.items() if begin.how == "created"} == {"head.weight", "head.bias"}
    assert {"model.head.weight", "model.head.bias"} <= told.fit.aside.keys()


def wrong(config: ModelConfig, source: Path | str, **changes: Any) -> str:
    return "\n".join(warm_problems(warm_config(source, **changes), config, 0))


def test_another_size_is_refused_with_both_shapes(dense_run: Path) -> None:
    assert "it has 3 blocks, and model.depth=5; use model.depth=3" in wrong(
        small(blocks=[]).model_copy(update={"depth": 5}), dense_run
    )
    wider = small(blocks=[]).model_copy(update={"width": 48})
    assert "patch_embed.weight is (24, 12) there and (48, 12) here" in wrong(wider, dense_run)
    heads = small(blocks=[]).model_copy(update={"num_heads": 2})
    assert "it has 4 heads, and model.num_heads=2" in wrong(heads, dense_run)
    deep = small().model_copy(update={"mlp_dim": 64})
    found = wrong(deep, dense_run)
    assert "blocks.0.mlp.fc1.weight: (40, 24) there, (64, 24) here" in found
    assert (
        "blocks.1.moe.experts.w1: blocks.1.mlp.fc1.weight would give (24, 40) to each expert, and it is (24, 64)"
        in found
    )
    assert "and 3 more" in found
    assert "nothing here takes" not in found


def test_nothing_is_left_at_its_init_without_a_word(soft_run: Path, dense: ViT, tmp_path: Path) -> None:
    found = wrong(small(blocks="last 1"), soft_run)
    assert "it has no weights for blocks.1.mlp.fc1.weight" in found
    assert "check model.moe.blocks" in found
    assert "it has what nothing here takes: model.blocks.1.moe.experts.w1" in found
    partial = model_of(small(blocks=[]))
    del partial.head
    headless = in_timm_names(partial, tmp_path)
    assert "warm.head=fresh" in wrong(small(blocks=[]), headless)
    assert wrong(small(blocks=[]), headless, head="fresh") == ""
    assert wrong(small(blocks=[]), headless, allow_new=["head.*"]) == ""
    after, told = warmed(small(blocks=[]), headless, allow_new=["head.*"])
    assert told.fit.begins["head.weight"].note == "the source has none (warm.allow_new)"
    assert torch.equal(after.head.weight, torch.zeros(10, 24))


def test_what_cannot_be_read_is_refused_with_the_remedy(dense_run: Path, tmp_path: Path) -> None:
    for name in ("w.pt", "w.pth.tar", "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"may be a pickle, .* write it as safetensors"):
            warm_config(tmp_path / name)
    config = small(blocks=[])
    assert "there is no such file or folder" in wrong(config, tmp_path / "none.safetensors")
    assert "holds no complete checkpoint" in wrong(config, tmp_path)
    assert "use warm.weights=model" in wrong(config, dense_run, weights="average")
    (tmp_path / "torn.safetensors").write_bytes(b"\x80\x02garbage")
    (tmp_path / "torn.npz").write_bytes(b"\x80\x02garbage")
    assert "cannot be read" in wrong(config, tmp_path / "torn.safetensors")
    assert "cannot be read" in wrong(config, tmp_path / "torn.npz")


def test_a_checkpoint_with_a_changed_byte_is_found_before_a_weight_is_touched(dense_run: Path) -> None:
    file = dense_run / "checkpoints" / "step_00000020" / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert wrong(small(), dense_run) == ""
    with pytest.raises(CheckpointError, match="their hash differs"):
        warmed(small(), dense_run)
