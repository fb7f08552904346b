"""This file owns what a parameter's name says to an optimizer: whether it decays, by how much, and which dim counts experts."""

import re
from collections.abc import Iterable
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


def expert_dim(name: str) -> int | None:
    """The dim of a parameter that counts experts, None where it has none; its slices are tensors of their own."""
    if re.fullmatch(r"blocks\.\d+\.moe\.experts\.[wb][12g]", name):
        return 0
    return 1 if re.fullmatch(r"blocks\.\d+\.moe\.router\.((combine_)?phi|gate)", name) else None
