"""This file owns the portrait of a model's routers: from what was added up of each block to pictures, histograms and plain numbers.

D width  E experts  S slots per expert  M = E S slots
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from softmoe_train.drawing.curves import draw_contribution, draw_cumulative, draw_importance
from softmoe_train.drawing.matrices import draw_similarity
from softmoe_train.evals.curves import HIGHEST_BINS, coverage_edges
from softmoe_train.evals.loads import LoadSums
from softmoe_train.evals.looks import Look
from softmoe_train.evals.slot_parameters import MATRICES, slot_products
from softmoe_train.evals.weightings import SoftSums
from softmoe_train.observe.figures import Histogram


def draw(blocks: Mapping[int, Look]) -> dict[str, bytes]:
    """PNG files by name: curves of Soft MoE's weightings, importance (load, of sparse routers), similarity of slot parameters."""
    pictures = {}
    curves = {block: look.curves for block, look in blocks.items() if look.curves is not None}
    if curves:
        for name, unit in (("dispatch", "tokens of a slot"), ("combine", "slots of a token")):
            pictures[f"{name}_curves"] = draw_cumulative(
                {block: of.mean(name).cpu().numpy() for block, of in curves.items()},
                {block: of.parts[name].cpu().numpy() for block, of in curves.items()},
                f"Cumulative {name} weight",
                unit,
            )
        one = next(iter(curves.values()))
        pictures["token_contribution"] = draw_contribution(
            {block: of.parts["coverage"].cpu().numpy() for block, of in curves.items()},
            np.array(coverage_edges()),
            one.num_slots / one.tokens,
        )
    pictures |= _draw_shares(blocks) | _draw_products(blocks)
    return pictures


def _draw_shares(blocks: Mapping[int, Look]) -> dict[str, bytes]:
    read = {block: look.sums.read().sum(1) for block, look in blocks.items() if isinstance(look.sums, SoftSums)}
    load = {block: look.sums.load() for block, look in blocks.items() if isinstance(look.sums, LoadSums)}
    pictures = {}
    if read:
        ratios = {block: (of / of.min().clamp(min=1e-9)).cpu().numpy() for block, of in read.items()}
        pictures["expert_importance"] = draw_importance(
            ratios, "How much experts are read", "mean combine weight / the least"
        )
    if load:
        ratios = {block: (of * len(of)).cpu().numpy() for block, of in load.items()}
        pictures["expert_load"] = draw_importance(ratios, "Load of experts", "load / mean load")
    return pictures


def _draw_products(blocks: Mapping[int, Look]) -> dict[str, bytes]:
    pictures = {}
    for name in MATRICES:
        matrices = {block: p for block, look in blocks.items() if (p := _matrix(look.router, name)) is not None}
        if matrices:
            products = {block: slot_products(p.detach()).cpu().numpy() for block, p in matrices.items()}
            num_experts = next(iter(matrices.values())).shape[1]
            pictures[f"{name}_similarity"] = draw_similarity(products, num_experts, name)
    return pictures


def _matrix(router: nn.Module, name: str) -> nn.Parameter | None:
    return dict(router.named_parameters()).get(name)


def histograms(blocks: Mapping[int, Look]) -> dict[str, Histogram]:
    """By block and name: each slot's highest dispatch weight, and what each token contributes to all slots."""
    edges = {"dispatch_max": [i / HIGHEST_BINS for i in range(HIGHEST_BINS + 1)], "token_coverage": coverage_edges()}
    found = {}
    for block, look in blocks.items():
        if look.curves is not None:
            for name, part in (("dispatch_max", "highest"), ("token_coverage", "coverage")):
                counts = [int(count) for count in look.curves.parts[part].tolist()]
                found[f"{block}/{name}_histogram"] = Histogram(counts, edges[name])
    return found


def numbers(look: Look) -> dict[str, Any]:
    """What the pictures of a block show, as plain values."""
    if isinstance(look.sums, LoadSums):
        return {"expert_load": look.sums.load().tolist()}
    shown: dict[str, Any] = {"expert_importance": look.sums.read().sum(1).tolist()}
    if look.curves is not None:
        shown |= {
            "dispatch_cumulative_mean": look.curves.mean("dispatch").tolist(),
            "combine_cumulative_mean": look.curves.mean("combine").tolist(),
            "token_coverage": {"edges": coverage_edges(), "counts": look.curves.parts["coverage"].tolist()},
        }
    return shown
