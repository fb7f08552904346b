"""A Soft MoE vision transformer in plain PyTorch, from the paper's formulas, over an exported file and the names it documents.

A program: `python plain_vit.py WEIGHTS IMAGES LOGITS`, all safetensors; softmoe_train cannot be imported in it.
"""

import json
import sys
from pathlib import Path

sys.modules["softmoe_train"] = None  # any import of it raises  # pyright: ignore[reportArgumentType]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

Weights = dict[str, Tensor]


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), eps=1e-6)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def attention(x: Tensor, w: Weights, name: str, num_heads: int) -> Tensor:
    B, T, D = x.shape
    q, k, v = (part.view(B, T, num_heads, -1).transpose(1, 2) for part in linear(x, w, f"{name}.qkv").split(D, -1))
    q, k = norm(q, w, f"{name}.query_norm"), norm(k, w, f"{name}.key_norm")
    weights = (q @ k.transpose(-1, -2) / (D // num_heads) ** 0.5).softmax(-1)
    return linear((weights @ v).transpose(1, 2).reshape(B, T, D), w, f"{name}.out")


def unit(x: Tensor, dim: int) -> Tensor:
    return x / (x.square().sum(dim, keepdim=True) + 1e-6).sqrt()


def soft_moe(x: Tensor, w: Weights, name: str) -> Tensor:
    """One image at a time and one expert at a time, as the paper writes it."""
    phi, scale = w[f"{name}.router.phi"], w[f"{name}.router.scale"]
    w1, b1, w2, b2 = (w[f"{name}.experts.{part}"] for part in ("w1", "b1", "w2", "b2"))
    D, E, S = phi.shape
    outputs = []
    for tokens in x:
        logits = scale * (unit(tokens, 1) @ unit(phi.reshape(D, E * S), 0))  # T x (E S)
        dispatch, combine = logits.softmax(0), logits.softmax(1)
        slots = dispatch.T @ tokens
        done = [gelu(slots[e * S : (e + 1) * S] @ w1[e] + b1[e]) @ w2[e] + b2[e] for e in range(E)]
        outputs.append(combine @ torch.cat(done))
    return torch.stack(outputs)


def logits_of(images: Tensor, w: Weights, model: dict) -> Tensor:
    """Class logits of RGB bytes, B x 3 x size x size."""
    P = model["patch_size"]
    kernel = w["patch_embed.weight"].view(model["width"], 3, P, P)
    pixels = images.float() / 127.5 - 1
    x = F.conv2d(pixels, kernel, w["patch_embed.bias"], stride=P).flatten(2).transpose(1, 2) + w["position"]
    for i in range(model["depth"]):
        block = f"blocks.{i}"
        x = x + attention(norm(x, w, f"{block}.norm1"), w, f"{block}.attn", model["num_heads"])
        inner = norm(x, w, f"{block}.norm2")
        if f"{block}.moe.router.phi" in w:
            x = x + soft_moe(inner, w, f"{block}.moe")
        else:
            x = x + linear(gelu(linear(inner, w, f"{block}.mlp.fc1")), w, f"{block}.mlp.fc2")
    return linear(norm(x, w, "norm").mean(1), w, "head")


def weights_of(path: str) -> tuple[Weights, dict]:
    """All weights by name, those of experts stacked where they lie in files of their own, and the model's settings."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    w = load_file(path)
    if metadata["experts"] == "separate":
        files = sorted(Path(path).parent.glob(f"{Path(path).stem}.expert_*.safetensors"))
        experts = [load_file(file) for file in files]
        w |= {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}
    assert metadata["softmoe_format"] == "1"
    return w, json.loads(metadata["model"])


if __name__ == "__main__":
    save_file({"logits": logits_of(load_file(sys.argv[2])["images"], *weights_of(sys.argv[1]))}, sys.argv[3])
