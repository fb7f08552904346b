"""The vision transformer: the paper's parameter counts, its layers against independent ones, its rules."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from softmoe_train.config import compose
from softmoe_train.model.init import initialize
from softmoe_train.model.layers import Attention, LayerNorm, PatchEmbed
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import build_model
from softmoe_train.settings import RunConfig
from tests.models import moe_config

DENSE = moe_config(blocks=[], router="soft", num_experts=1, slots_per_expert=1, expert_init="identical")

# paper.md 2.2, with the head of 29,593 classes
COUNTS = {
    "vit_s16": 33_059_737,
    "soft_s16_128e": 933_709_471,
    "soft_s14_256e": 1_841_402_527,
    "vit_b16": 108_555_673,
    "soft_b16_128e": 3_707_638_687,
    "vit_l16": 333_635_481,
    "soft_l16_128e": 13_127_249_829,
    "vit_h14": 668_675_993,
    "soft_h14_128e": 27_318_132_649,
    "soft_h14_256e": 54_177_406_889,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_paper_s_to_the_unit(name: str) -> None:
    config = compose(RunConfig, [f"model={name}", "model.num_classes=29593", "data=synthetic"], lambda _: [])
    count = sum(p.numel() for p in build_model(config.model, torch.float32).parameters())
    print(f"| {name} | {count:,} | {COUNTS[name]:,} |")
    assert count == COUNTS[name]


def config(**changes: object) -> ModelConfig:
    values = {
        "image_size": 8, "patch_size": 2, "width": 12, "depth": 1, "mlp_dim": 20, "num_heads": 3, "num_classes": 5,
        "position_std": 0.02, "moe": DENSE,
    }  # fmt: skip
    return ModelConfig.model_validate({**values, **changes})


def test_patch_embedding_is_a_strided_convolution() -> None:
    embed = PatchEmbed(4, 7).double()
    initialize(embed.float(), 0)
    embed = embed.double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    want = F.conv2d(images, embed.weight.view(7, 3, 4, 4), embed.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), want)


def test_attention_is_softmax_of_normalised_queries_and_keys() -> None:
    attention = Attention(12, 3)
    initialize(attention, 0)
    attention = attention.double()
    with torch.no_grad():
        attention.query_norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0]))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (x @ w.T for w in attention.qkv.weight.view(3, 12, 12))
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        qh, kh = (
            (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
            for t in (q[..., part], k[..., part])
        )
        weights = ((qh * attention.query_norm.weight) @ kh.transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v[..., part])
    want = torch.cat(heads, -1) @ attention.out.weight.T
    torch.testing.assert_close(attention(x), want)


def test_layer_norm_in_bf16_has_float32_statistics() -> None:
    norm = LayerNorm(64)
    initialize(norm, 0)
    x = (100 + torch.randn(3, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_bytes_and_scaled_floats_give_the_same_logits() -> None:
    model = build_model(config(), torch.float32)
    model.to_empty(device="cpu")
    initialize(model, 0)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(model.features(images)[0], model.features(images.float() / 127.5 - 1)[0])


def test_features_do_not_depend_on_the_rest_of_the_batch() -> None:
    moe = DENSE.model_copy(update={"blocks": [0], "num_experts": 4, "slots_per_expert": 2})
    model = build_model(config(moe=moe), torch.float64)
    model.to_empty(device="cpu")
    initialize(model, 0)
    model.double()
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(model.features(images)[0][1:2], model.features(images[1:2])[0])


def test_an_image_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model\.patch_size=3 does not divide model\.image_size=8; use one of \[1, 2, 4, 8\]"
    ):
        config(patch_size=3)


def test_all_rules_of_a_model_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"patch_size=3.*num_heads=5.*model\.moe\.blocks='last 9'"):
        config(patch_size=3, num_heads=5, moe=DENSE.model_copy(update={"blocks": "last 9"}))


def test_model_files_name_only_known_sizes() -> None:
    folder = Path(__file__).resolve().parents[3] / "conf" / "model"
    named = {f.stem for f in folder.glob("*.yaml")} - {"_base"}
    assert set(COUNTS) <= named
