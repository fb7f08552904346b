"""This file owns what a parameter's name says to an optimizer: whether it is trained, how fast, whether it decays, and which dim counts experts."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from softmoe_train.config import Record

Decay = Annotated[float, Field(ge=0)]


class DecayConfig(Record):
    """Weight decay by kind of parameter (paper.md 5); biases, norms, positions and the slot parameters never decay."""

    head: Decay
    kernels: Decay
    router_scale: Decay


# The first rule that matches wins; a name that none matches is an error, so a new layer cannot be forgotten.
RULES = (
    ("head", r"head\.weight"),
    (
        "kernels",
        r"patch_embed\.weight|blocks\.\d+\.(attn\.(qkv|out)|mlp\.fc[12])\.weight|blocks\.\d+\.moe\.(experts\.w[12g]|router\.gate)",
    ),
    ("router_scale", r"blocks\.\d+\.moe\.router\.scale"),
    (
        "none",
        r"position|blocks\.\d+\.moe\.router\.(combine_)?phi|(.+\.)?bias|blocks\.\d+\.moe\.experts\.b[12g]|(.+[._])?norm[12]?\.weight",
    ),
)


def decay_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter names by kind of decay (head, kernels, router_scale, none), an exact partition.

    Raises ValueError that names every parameter without a rule.
    """
    groups: dict[str, list[str]] = {kind: [] for kind, _ in RULES}
    unknown = []
    for name in names:
        kind = next((kind for kind, pattern in RULES if re.fullmatch(pattern, name)), None)
        (groups[kind] if kind else unknown).append(name)
    if unknown:
        raise ValueError(f"no weight-decay rule for: {', '.join(unknown)}; add one to optim/groups.py")
    return groups


def rate_factors(names: Iterable[str], layer_decay: float | None) -> dict[str, float]:
    """By parameter, what multiplies its learning rate: layer_decay^(depth + 1 - layer), as BEiT and MAE fine-tune.

    Patches and positions are layer 0, block i with its router and experts is layer i + 1, the last norm and the head are depth + 1.
    """
    layers = {name: _layer(name) for name in names}
    last = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
    if layer_decay is None:
        return dict.fromkeys(layers, 1.0)
    return {name: layer_decay ** (0 if layer is None else last - layer) for name, layer in layers.items()}


def _layer(name: str) -> int | None:
    """0 below the blocks, i + 1 for block i, None above them."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block is not None:
        return int(block[1]) + 1
    return 0 if re.fullmatch(r"position|patch_embed\..+", name) else None


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter stays as it is: one of the patterns (*, ?) is for its whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def frozen_problems(patterns: list[str], names: list[str]) -> list[str]:
    """Why these patterns are none for a model with parameters of these names."""
    problems = [
        f"optim.frozen: no parameter is named {pattern}; they are named as {', '.join(names[:3])}, {names[-1]} (`softmoe inspect` lists them)"
        for pattern in patterns
        if not any(is_frozen(name, [pattern]) for name in names)
    ]
    if names and all(is_frozen(name, patterns) for name in names):
        problems.append(f"optim.frozen={patterns} leaves no parameter to train; leave some of them out")
    return problems


def expert_dim(name: str) -> int | None:
    """The dim of a parameter that counts experts, None where it has none; its slices are tensors of their own."""
    if re.fullmatch(r"blocks\.\d+\.moe\.experts\.[wb][12g]", name):
        return 0
    return 1 if re.fullmatch(r"blocks\.\d+\.moe\.router\.((combine_)?phi|gate)", name) else None
