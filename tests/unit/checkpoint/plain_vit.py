"""A Soft MoE vision transformer in plain PyTorch, from the paper's formulas, over an exported file and the names it documents.

A program: `python plain_vit.py WEIGHTS IMAGES LOGITS`, all safetensors; softmoe_train cannot be imported in it.
"""

import json
import math
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


def weightings(tokens: Tensor, w: Weights, name: str, moe: dict) -> tuple[Tensor, Tensor]:
    """Dispatch and combine of one image, T x (E S)."""
    T, slots, soft = len(tokens), moe["num_experts"] * moe["slots_per_expert"], moe["soft"]
    if moe["router"] == "identity":
        return torch.eye(T), torch.eye(T)

    def logits(matrix: str) -> Tensor:
        phi = w[f"{name}.router.{matrix}"].flatten(1)
        product = unit(tokens, 1) @ unit(phi, 0) if soft["normalize"] else tokens @ phi
        return w[f"{name}.router.scale"] * product if soft["scale"] else product

    dispatch = torch.full((T, slots), 1 / T) if soft["dispatch"] == "uniform" else logits("phi").softmax(0)
    if soft["combine"] == "uniform":
        return dispatch, torch.full((T, slots), 1 / slots)
    return dispatch, logits("combine_phi" if soft["combine"] == "separate" else "phi").softmax(1)


def expert(x: Tensor, w: Weights, name: str, e: int) -> Tensor:
    hidden = x @ w[f"{name}.w1"][e] + w[f"{name}.b1"][e]
    gated = f"{name}.wg" in w
    hidden = gelu(x @ w[f"{name}.wg"][e] + w[f"{name}.bg"][e]) * hidden if gated else gelu(hidden)
    return hidden @ w[f"{name}.w2"][e] + w[f"{name}.b2"][e]


def soft_moe(x: Tensor, w: Weights, name: str, moe: dict) -> Tensor:
    """One image at a time and one expert at a time, as the paper writes it."""
    S = moe["slots_per_expert"]
    outputs = []
    for tokens in x:
        dispatch, combine = weightings(tokens, w, name, moe)
        slots = dispatch.T @ tokens
        done = [expert(slots[e * S : (e + 1) * S], w, f"{name}.experts", e) for e in range(moe["num_experts"])]
        outputs.append(combine @ torch.cat(done))
    return torch.stack(outputs)


def sparse_moe(x: Tensor, w: Weights, name: str, moe: dict) -> Tensor:
    """One group of consecutive images and one expert at a time; there is no noise outside of training."""
    outputs = []
    for images in x.split(moe["sparse"]["group_images"]):
        tokens = images.flatten(0, 1)
        gates = (tokens @ w[f"{name}.router.gate"]).softmax(1)
        y = torch.zeros_like(tokens)
        for e, served in enumerate(seating(gates, moe)):
            y[served] += gates[served, e, None] * expert(tokens[served], w, f"{name}.experts", e)
        outputs.append(y.view_as(images))
    return torch.cat(outputs)


def seating(gates: Tensor, moe: dict) -> list[list[int]]:
    """The tokens that each expert serves."""
    (T, E), choice = gates.shape, moe["tokens_choice"]
    K = choice["top_k"] if moe["router"] == "tokens_choice" else 1
    share = T * K * moe["sparse"]["capacity_factor"] / E
    S = round(share) if moe["sparse"]["capacity_rounding"] == "nearest" else 4 * math.ceil(share / 4)
    if moe["router"] == "experts_choice":
        return [gates[:, e].argsort(descending=True, stable=True)[:S].tolist() for e in range(E)]
    seats: list[list[int]] = [[] for _ in range(E)]
    wishes = gates.argsort(dim=1, descending=True, stable=True).tolist()
    first = gates.amax(1).argsort(descending=True, stable=True).tolist() if choice["batch_priority"] else range(T)
    for k in range(K):
        for token in first:
            if len(seats[wishes[token][k]]) < S:
                seats[wishes[token][k]].append(token)
    return seats


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
        if f"{block}.moe.experts.w1" in w:
            layer = sparse_moe if f"{block}.moe.router.gate" in w else soft_moe
            x = x + layer(inner, w, f"{block}.moe", model["moe"])
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
