"""This file owns other people's names for the weights of a dense vision transformer, told in ours.

timm's (vision_transformer.py) and big_vision's (models/vit.py, with its older and its scanned forms). Nothing is read here but shapes.

T tokens  D width  N heads  P patch size
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.warm.grids import CHANNELS, side_of
from softmoe_train.warm.lazy import Lazy, below, computed, entry, joined, reshaped_rows, transposed

NO_QK_NORM = "the source does not normalise queries and keys, this model does: its scales begin at one, which gives other attention weights than the source's"
CLASS_TOKEN = "the source has a class token, which tokens attend to and which its head may read; here the head reads the mean of the tokens"
POOLED_OTHERWISE = "its head read another pooling of the tokens; here it is their mean"


class Translated(NamedTuple):
    """Tensors by our names, stored ones that have no place here and why, and those that nothing explains, with what is known of them.

    `differences` say why the same weights compute something else here.
    """

    tensors: dict[str, Lazy]
    aside: dict[str, str]
    unknown: dict[str, str]
    differences: list[str]
    num_heads: int | None  # None: the file does not tell


TIMM = {
    "patch_embed.proj.weight": "patch_embed.weight", "patch_embed.proj.bias": "patch_embed.bias", "pos_embed": "position",
    "norm.weight": "norm.weight", "norm.bias": "norm.bias", "fc_norm.weight": "norm.weight", "fc_norm.bias": "norm.bias",
    "head.weight": "head.weight", "head.bias": "head.bias",
}  # fmt: skip
TIMM_BLOCK = {
    "norm1.weight": "norm1.weight", "norm1.bias": "norm1.bias", "norm2.weight": "norm2.weight", "norm2.bias": "norm2.bias",
    "attn.qkv.weight": "attn.qkv.weight", "attn.qkv.bias": "attn.qkv.bias",
    "attn.proj.weight": "attn.out.weight", "attn.proj.bias": "attn.out.bias",
    "attn.q_norm.weight": "attn.query_norm.weight", "attn.k_norm.weight": "attn.key_norm.weight",
    "mlp.fc1.weight": "mlp.fc1.weight", "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight", "mlp.fc2.bias": "mlp.fc2.bias",
}  # fmt: skip
TIMM_ASIDE = {
    r"cls_token|dist_token|reg_token": CLASS_TOKEN,
    r"head_dist\..*": "the head of a distillation token, which is not here",
    r"attn_pool\..*": POOLED_OTHERWISE,
}
TIMM_UNKNOWN = {
    r".*\.ls[12]\.gamma": "a layer scale, which this model has not",
    r".*\.[qk]_norm\.bias": "the norms of queries and keys have a scale alone here",
    r"pre_norm|norm_pre\..*": "a norm before the blocks, which this model has not",
}


def from_timm(stored: Mapping[str, Lazy]) -> Translated:
    """The weights of timm's VisionTransformer."""
    tensors: dict[str, Lazy] = {}
    aside: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for name, t in stored.items():
        block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
        ours = TIMM.get(name) if block is None else TIMM_BLOCK.get(block[2])
        if ours is not None:
            ours = ours if block is None else block[1] + ours
            if ours in tensors:
                unknown[name] = f"{tensors[ours].origin[0]} takes the same place"
            tensors.setdefault(ours, t)
        elif (why := _explained(name, TIMM_ASIDE)) is not None:
            aside[name] = why
        else:
            unknown[name] = _explained(name, TIMM_UNKNOWN) or ""
    if "patch_embed.weight" in tensors:
        tensors["patch_embed.weight"] = _timm_patches(tensors["patch_embed.weight"])
    if "position" in tensors:
        prefix = sum(stored[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in stored)
        tensors["position"] = _positions(tensors["position"], prefix, aside)
    differences = [
        "timm's MLPs have the exact GELU, unless it was told otherwise; here it is the tanh form (they differ by up to 5e-4)",
        "pixels are scaled to [-1, 1] here; where the source saw them by ImageNet's mean and deviation (DeiT, MAE), its first layer did not",
    ]
    if any(name.startswith("fc_norm") for name in stored):
        differences.append(
            "fc_norm normalises the mean of the tokens; taken over as norm, which normalises each before the mean"
        )
    return _told(tensors, aside, unknown, differences, stored, num_heads=None)


def _timm_patches(t: Lazy) -> Lazy:
    if len(t.shape) != 4 or t.shape[1] != CHANNELS or t.shape[2] != t.shape[3]:
        raise CheckpointError("not our patches", [f"{t.origin[0]} is {t.shape}, and not (D, {CHANNELS}, P, P)"])
    return reshaped_rows(t, (t.shape[0], math.prod(t.shape[1:])))


def _positions(t: Lazy, prefix: int, aside: dict[str, str]) -> Lazy:
    """Of (1, rows, D) the rows of tokens that are patches: all of a square grid, or those after the rows of tokens that are not."""
    t = entry(t, 0)._replace(origin=t.origin)
    if side_of(t.shape[0]) is not None:
        return t
    if side_of(t.shape[0] - prefix) is None:
        raise CheckpointError(
            "not a square grid", [f"{t.origin[0]} has {t.shape[0]} rows, {prefix} of them before the patches"]
        )
    aside[f"{t.origin[0]}[:{prefix}]"] = "the place of a token that is no patch"
    return below(t, prefix)


def _explained(name: str, reasons: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in reasons.items() if re.fullmatch(pattern, name)), None)


def _told(
    tensors: dict[str, Lazy], aside: dict[str, str], unknown: dict[str, str], differences: list[str],
    stored: Mapping[str, Lazy], *, num_heads: int | None,
) -> Translated:  # fmt: skip
    """With the differences that both families share."""
    if not any("query_norm" in name for name in tensors):
        differences = [NO_QK_NORM, *differences]
    differences += [why for why in dict.fromkeys(aside.values()) if why in (CLASS_TOKEN, POOLED_OTHERWISE)]
    if num_heads is None:
        differences.append("the file does not tell its number of heads; model.num_heads is believed")
    return Translated(tensors, aside, unknown, differences, num_heads)


BIG_VISION = {
    "embedding/bias": "patch_embed.bias", "Transformer/encoder_norm/scale": "norm.weight", "Transformer/encoder_norm/bias": "norm.bias",
    "head/bias": "head.bias",
}  # fmt: skip
OLDER = {  # of google-research/vision_transformer and big_vision before 2022, by what the newer call them
    "LayerNorm_2/": "LayerNorm_1/",
    "MlpBlock_3/": "MlpBlock_0/",
    "MultiHeadDotProductAttention_1/": "MultiHeadDotProductAttention_0/",
    "Transformer/posembed_input/pos_embedding": "pos_embedding",
    "Transformer/pos_embedding": "pos_embedding",
}
BIG_VISION_ASIDE = {
    r"cls": CLASS_TOKEN,
    r"MAPHead_0/.*|probe": POOLED_OTHERWISE,
    r"pre_logits/.*": "a layer between the tokens and the head, which is not here, so the head reads something else",
}
ATTENTION = "MultiHeadDotProductAttention_0"
SCANNED = "Transformer/encoderblock/"


def from_big_vision(stored: Mapping[str, Lazy]) -> Translated:
    """The weights of big_vision's ViT; kernels are (in, out) there, heads a dim of their own, patches (P, P, 3, D)."""
    named, aside, num_blocks = _newest_names(stored)
    tensors: dict[str, Lazy] = {}
    taken: set[str] = set()

    def take(name: str, make: Callable[[Lazy], Lazy] = lambda t: t) -> Lazy | None:
        t = named.get(name)
        if t is None:
            return None
        taken.add(name)
        return make(t)

    found = {ours: take(theirs) for theirs, ours in BIG_VISION.items()}
    found["patch_embed.weight"] = take("embedding/kernel", _big_vision_patches)
    found["head.weight"] = take("head/kernel", transposed)
    prefix = 1 if "cls" in named else 0
    found["position"] = take("pos_embedding", lambda t: _positions(t, prefix, aside))
    for i in range(num_blocks):
        found |= {f"blocks.{i}.{name}": t for name, t in _block(f"Transformer/encoderblock_{i}", take).items()}
    tensors = {name: t for name, t in found.items() if t is not None}
    left = [name for name in named if name not in taken]
    aside |= {name: why for name in left if (why := _explained(name, BIG_VISION_ASIDE)) is not None}
    unknown = {name: "" for name in left if name not in aside}
    query = named.get(f"Transformer/encoderblock_0/{ATTENTION}/query/kernel")
    return _told(tensors, aside, unknown, [], named, num_heads=None if query is None else query.shape[1])


def _newest_names(stored: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], dict[str, str], int]:
    """The model's tensors as the newest form calls them, block by block; what is outside the model; how many blocks there are."""
    roots = [name.removesuffix("embedding/kernel") for name in stored if re.fullmatch(r"(.*/)?embedding/kernel", name)]
    if len(roots) != 1:
        found = f"{len(roots)} of them" if roots else "none"
        raise CheckpointError("not big_vision's names", [f"a ViT has one embedding/kernel; there is {found}"])
    named: dict[str, Lazy] = {}
    aside: dict[str, str] = {}
    for name, t in stored.items():
        if not name.startswith(roots[0]):
            aside[name] = f"not under {roots[0]}: it is no part of the model"
            continue
        inner = name.removeprefix(roots[0])
        for old, new in OLDER.items():
            inner = inner.replace(old, new)
        if inner.startswith(SCANNED):
            rest = inner.removeprefix(SCANNED)
            named |= {f"Transformer/encoderblock_{i}/{rest}": entry(t, i) for i in range(t.shape[0])}
        else:
            named[inner] = t
    numbers = [int(found[1]) for name in named if (found := re.match(r"Transformer/encoderblock_(\d+)/", name))]
    return named, aside, max(numbers, default=-1) + 1


def _big_vision_patches(t: Lazy) -> Lazy:
    if len(t.shape) != 4 or t.shape[2] != CHANNELS or t.shape[0] != t.shape[1]:
        raise CheckpointError("not our patches", [f"{t.origin[0]} is {t.shape}, and not (P, P, {CHANNELS}, D)"])
    P, _, C, D = t.shape
    return computed(t, (D, C * P * P), lambda kernel: kernel.permute(3, 2, 0, 1).reshape(D, C * P * P))


def _block(at: str, take: Callable[..., Lazy | None]) -> dict[str, Lazy | None]:
    """One block by our names within it."""
    found: dict[str, Lazy | None] = {}
    for theirs, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_1", "norm2")):
        found |= {f"{ours}.weight": take(f"{at}/{theirs}/scale"), f"{ours}.bias": take(f"{at}/{theirs}/bias")}
    for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        found[f"mlp.{ours}.weight"] = take(f"{at}/MlpBlock_0/{theirs}/kernel", transposed)
        found[f"mlp.{ours}.bias"] = take(f"{at}/MlpBlock_0/{theirs}/bias")
    at = f"{at}/{ATTENTION}"
    found["attn.qkv.weight"] = _together([take(f"{at}/{one}/kernel", _into_heads) for one in ("query", "key", "value")])
    found["attn.qkv.bias"] = _together([take(f"{at}/{one}/bias", _flat) for one in ("query", "key", "value")])
    found["attn.out.weight"] = take(f"{at}/out/kernel", _out_of_heads)
    found["attn.out.bias"] = take(f"{at}/out/bias")
    found["attn.query_norm.weight"] = take(f"{at}/query_ln/scale")
    found["attn.key_norm.weight"] = take(f"{at}/key_ln/scale")
    return found


def _together(parts: list[Lazy | None]) -> Lazy | None:
    there = [part for part in parts if part is not None]
    return joined(there) if len(there) == len(parts) else None


def _into_heads(t: Lazy) -> Lazy:
    """(D, N, D / N) as a linear map's (D, D), out before in."""
    return computed(t, (math.prod(t.shape[1:]), t.shape[0]), lambda kernel: kernel.flatten(1).mT)


def _out_of_heads(t: Lazy) -> Lazy:
    """(N, D / N, D) as a linear map's (D, D), out before in."""
    return computed(t, (t.shape[-1], math.prod(t.shape[:-1])), lambda kernel: kernel.flatten(0, -2).mT)


def _flat(t: Lazy) -> Lazy:
    return computed(t, (math.prod(t.shape),), lambda bias: bias.flatten())
