"""Weights in timm's and big_vision's names compute here what plain code computes from their own layout."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from softmoe_train.warm import translate
from tests.ranks.small import global_batch
from tests.unit.warm.bare import small, warmed, wide

T, D, N, H, P, C, L = 16, 24, 4, 40, 2, 10, 3  # of the small model
CONFIG = small(blocks=[])
Weights = Mapping[str, Tensor]


def drawn(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def pixels() -> Tensor:
    return global_batch().images.double() / 127.5 - 1


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All "B N T d"."""
    return (q @ k.mT / (D // N) ** 0.5).softmax(-1) @ v


def timm_weights(**more: tuple[int, ...]) -> dict[str, Tensor]:
    shapes = {
        "patch_embed.proj.weight": (D, 3, P, P), "patch_embed.proj.bias": (D,), "pos_embed": (1, T, D),
        "norm.weight": (D,), "norm.bias": (D,), "head.weight": (C, D), "head.bias": (C,),
    }  # fmt: skip
    for i in range(L):
        block = {
            "norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
            "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,), "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
            "attn.q_norm.weight": (D // N,), "attn.k_norm.weight": (D // N,),
            "mlp.fc1.weight": (H, D), "mlp.fc1.bias": (H,), "mlp.fc2.weight": (D, H), "mlp.fc2.bias": (D,),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return drawn({**shapes, **more})


def timm_logits(w: Weights) -> Tensor:
    """timm's VisionTransformer(class_token=False, global_pool="avg", fc_norm=False, qk_norm=True), its GELU in the tanh form."""
    w = {name: t.double() for name, t in w.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-6)

    x = (
        F.conv2d(pixels(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=P).flatten(2).mT
        + w["pos_embed"]
    )
    for i in range(L):
        b = f"blocks.{i}"
        y = F.linear(norm(x, f"{b}.norm1"), w[f"{b}.attn.qkv.weight"], w[f"{b}.attn.qkv.bias"])
        q, k, v = y.reshape(len(y), T, 3, N, D // N).permute(2, 0, 3, 1, 4)
        y = attend(norm(q, f"{b}.attn.q_norm"), norm(k, f"{b}.attn.k_norm"), v).transpose(1, 2).reshape(x.shape)
        x = x + F.linear(y, w[f"{b}.attn.proj.weight"], w[f"{b}.attn.proj.bias"])
        y = F.gelu(
            F.linear(norm(x, f"{b}.norm2"), w[f"{b}.mlp.fc1.weight"], w[f"{b}.mlp.fc1.bias"]), approximate="tanh"
        )
        x = x + F.linear(y, w[f"{b}.mlp.fc2.weight"], w[f"{b}.mlp.fc2.bias"])
    return F.linear(norm(x, "norm").mean(1), w["head.weight"], w["head.bias"])


def big_vision_weights(**more: tuple[int, ...]) -> dict[str, Tensor]:
    shapes = {
        "embedding/kernel": (P, P, 3, D), "embedding/bias": (D,), "pos_embedding": (1, T, D), "head/kernel": (D, C), "head/bias": (C,),
        "Transformer/encoder_norm/scale": (D,), "Transformer/encoder_norm/bias": (D,),
    }  # fmt: skip
    for i in range(L):
        block = {f"LayerNorm_{j}/{one}": (D,) for j in (0, 1) for one in ("scale", "bias")}
        block |= {"MlpBlock_0/Dense_0/kernel": (D, H), "MlpBlock_0/Dense_0/bias": (H,)}
        block |= {"MlpBlock_0/Dense_1/kernel": (H, D), "MlpBlock_0/Dense_1/bias": (D,)}
        for one in ("query", "key", "value"):
            block |= {f"MultiHeadDotProductAttention_0/{one}/kernel": (D, N, D // N)}
            block |= {f"MultiHeadDotProductAttention_0/{one}/bias": (N, D // N)}
        block |= {f"MultiHeadDotProductAttention_0/{one}_ln/scale": (D // N,) for one in ("query", "key")}
        block |= {
            "MultiHeadDotProductAttention_0/out/kernel": (N, D // N, D),
            "MultiHeadDotProductAttention_0/out/bias": (D,),
        }
        shapes |= {f"Transformer/encoderblock_{i}/{name}": shape for name, shape in block.items()}
    return drawn({**shapes, **more})


def big_vision_logits(w: Weights) -> Tensor:
    """big_vision's ViT(pool_type="gap") with normalised queries and keys, on pixels as (y, x, channel)."""
    w = {name: t.double() for name, t in w.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}/scale"], w.get(f"{name}/bias"), 1e-6)

    patches = pixels().permute(0, 2, 3, 1).unfold(1, P, P).unfold(2, P, P)  # B y x c p q
    x = torch.einsum("byxcpq,pqcd->byxd", patches, w["embedding/kernel"]).flatten(1, 2) + w["embedding/bias"]
    x = x + w["pos_embedding"]
    for i in range(L):
        b = f"Transformer/encoderblock_{i}"
        a = f"{b}/MultiHeadDotProductAttention_0"
        y = norm(x, f"{b}/LayerNorm_0")
        q, k, v = (
            torch.einsum("btd,dnh->bnth", y, w[f"{a}/{one}/kernel"]) + w[f"{a}/{one}/bias"][:, None]
            for one in ("query", "key", "value")
        )
        y = attend(norm(q, f"{a}/query_ln"), norm(k, f"{a}/key_ln"), v)
        x = x + torch.einsum("bnth,nhd->btd", y, w[f"{a}/out/kernel"]) + w[f"{a}/out/bias"]
        m = f"{b}/MlpBlock_0"
        y = norm(x, f"{b}/LayerNorm_1") @ w[f"{m}/Dense_0/kernel"] + w[f"{m}/Dense_0/bias"]
        x = x + F.gelu(y, approximate="tanh") @ w[f"{m}/Dense_1/kernel"] + w[f"{m}/Dense_1/bias"]
    return norm(x, "Transformer/encoder_norm").mean(1) @ w["head/kernel"] + w["head/bias"]


def here(path: Path, **changes: object) -> Tensor:
    model, _ = warmed(CONFIG, path, **changes)
    return wide(model)(pixels()).logits


def test_timm_s_weights_compute_here_what_they_compute_there(tmp_path: Path) -> None:
    weights = timm_weights()
    save_file(weights, tmp_path / "w.safetensors")
    assert timm_logits(weights).std() > 0.1
    torch.testing.assert_close(here(tmp_path / "w.safetensors"), timm_logits(weights), rtol=0, atol=1e-11)


def scanned(weights: Weights) -> dict[str, Tensor]:
    """The blocks stacked, as nn.scan keeps them."""
    blocks = {name.partition("encoderblock_0/")[2] for name in weights if "encoderblock_0/" in name}
    stacked = {
        f"Transformer/encoderblock/{name}": torch.stack(
            [weights[f"Transformer/encoderblock_{i}/{name}"] for i in range(L)]
        )
        for name in blocks
    }
    return {**{name: t for name, t in weights.items() if "encoderblock_" not in name}, **stacked}


def older(weights: Weights) -> dict[str, Tensor]:
    """As google-research/vision_transformer called them."""
    found = {}
    for name, t in weights.items():
        for old, new in translate.OLDER.items():
            name = name if new == "pos_embedding" else name.replace(new, old)
        found["Transformer/posembed_input/pos_embedding" if name == "pos_embedding" else name] = t
    return found


@pytest.mark.parametrize("form", [dict, scanned, older])
@pytest.mark.parametrize("prefix", ["params/", ""])
def test_big_vision_s_weights_compute_here_what_they_compute_there(tmp_path: Path, form, prefix: str) -> None:
    weights = big_vision_weights()
    named = {f"{prefix}{name}": t.numpy() for name, t in form(weights).items()}
    np.savez(tmp_path / "w.npz", **named, **({"opt/count": np.ones(1)} if prefix else {}))
    torch.testing.assert_close(here(tmp_path / "w.npz"), big_vision_logits(weights), rtol=0, atol=1e-11)


def test_what_a_class_token_and_missing_norms_change_is_said(tmp_path: Path) -> None:
    weights = timm_weights(cls_token=(1, 1, D), pos_embed=(1, T + 1, D))
    weights = {name: t for name, t in weights.items() if "_norm" not in name}
    save_file(weights, tmp_path / "w.safetensors")
    model, told = warmed(CONFIG, tmp_path / "w.safetensors")
    assert torch.equal(model.position, weights["pos_embed"][0, 1:])
    assert told.fit.aside.keys() == {"cls_token", "pos_embed[:1]"}
    created = {name for name, begin in told.fit.begins.items() if begin.how == "created"}
    assert created == {f"blocks.{i}.attn.{one}_norm.weight" for i in range(L) for one in ("query", "key")}
    assert translate.NO_QK_NORM in told.fit.differences
    assert translate.CLASS_TOKEN in told.fit.differences


def test_a_pooled_norm_and_an_unknown_tensor(tmp_path: Path) -> None:
    weights = timm_weights(**{"blocks.0.ls1.gamma": (D,)})
    weights |= {"fc_norm.weight": weights.pop("norm.weight"), "fc_norm.bias": weights.pop("norm.bias")}
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(
        Exception, match=r"blocks.0.ls1.gamma \(a layer scale, which this model has not\); leave it aside"
    ):
        warmed(CONFIG, tmp_path / "w.safetensors")
    model, told = warmed(CONFIG, tmp_path / "w.safetensors", ignore=["*.ls?.gamma"])
    assert torch.equal(model.norm.weight, weights["fc_norm.weight"])
    assert told.fit.aside == {"blocks.0.ls1.gamma": "warm.ignore"}
    assert any("fc_norm" in difference for difference in told.fit.differences)
