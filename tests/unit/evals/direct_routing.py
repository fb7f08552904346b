"""This file owns the routing measures written again: numpy in float64, loops over images, slots and tokens, from the definitions in the README."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]


def weightings(x: Weights, phi: Weights, scale: float) -> tuple[Weights, Weights]:
    """D and C of tokens "G T D" and slot parameters "D M", image by image (paper Algorithm 1, eps inside the root)."""
    unit_phi = np.stack([p / math.sqrt((p * p).sum() + 1e-6) for p in phi.T], 1)
    dispatch, combine = [], []
    for image in x:
        unit = np.stack([t / math.sqrt((t * t).sum() + 1e-6) for t in image])
        e = np.exp(scale * unit @ unit_phi)
        dispatch.append(e / e.sum(0, keepdims=True))
        combine.append(e / e.sum(1, keepdims=True))
    return np.stack(dispatch), np.stack(combine)


def entropy(p: Weights) -> float:
    return -sum(w * math.log(w) for w in p.tolist() if w > 0)


def correlation(a: Weights, b: Weights) -> float:
    a, b = a - a.mean(), b - b.mean()
    length = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / length) if length else 0.0


def soft_measures(dispatch: Weights, combine: Weights, E: int, cut: dict[str, float]) -> dict[str, float]:
    """Every measure of weightings "G T M"; `cut` holds the thresholds."""
    G, T, M = dispatch.shape
    slots = [dispatch[g, :, s] for g in range(G) for s in range(M)]
    tokens = [combine[g, t] for g in range(G) for t in range(T)]
    read = np.zeros(M)
    for token in tokens:
        read += token / len(tokens)
    importance = [sum(read[e * (M // E) + s] for s in range(M // E)) for e in range(E)]
    coverage = [float(dispatch[g, t].sum()) for g in range(G) for t in range(T)]
    duplicates, similarity = [], []
    for g in range(G):
        for s in range(M):
            others = [correlation(dispatch[g, :, s], dispatch[g, :, o]) for o in range(M) if o != s]
            duplicates.append(max(others) > cut["duplicate"])
            similarity.append(np.mean(others))

    def shape(rows: list[Weights], one: str, other: str) -> dict[str, Any]:
        entropies, n = [entropy(row) for row in rows], len(rows[0])
        return {
            f"{one}_entropy": [h / math.log(n) for h in entropies],
            f"{one}_max": [row.max() for row in rows],
            f"{one}_min": [row.min() for row in rows],
            f"{other}s": [math.exp(h) for h in entropies],
            "uniform": [math.exp(h) >= cut["near_uniform"] * n for h in entropies],
            "one_hot": [row.max() >= cut["one_hot"] for row in rows],
        }

    of_slots, of_tokens = shape(slots, "dispatch", "slot"), shape(tokens, "combine", "token")
    lists = {
        **{name: of_slots[name] for name in ("dispatch_entropy", "dispatch_max", "dispatch_min")},
        **{name: of_tokens[name] for name in ("combine_entropy", "combine_max", "combine_min")},
        "tokens_per_slot": of_slots["slots"], "slots_per_token": of_tokens["tokens"],
        "uniform_slots": of_slots["uniform"], "one_hot_slots": of_slots["one_hot"],
        "uniform_tokens": of_tokens["uniform"], "one_hot_tokens": of_tokens["one_hot"],
        "duplicate_slots": duplicates, "slot_similarity": similarity,
        "token_coverage": coverage,
        "low_coverage": [c <= 0.25 for c in coverage], "high_coverage": [c > 2 for c in coverage],
        "dead_slots": [r < cut["dead"] / M for r in read], "dead_experts": [i < cut["dead"] / E for i in importance],
    }  # fmt: skip
    return {name: float(np.mean(values)) for name, values in lists.items()} | {
        "expert_spread": max(importance) / min(importance)
    }


def parameter_measures(phi: Weights, name: str, E: int) -> dict[str, float]:
    """Lengths and inner products of slot parameters "D M"."""
    lengths = [math.sqrt((p * p).sum()) for p in phi.T]
    M = len(lengths)
    product = {(i, j): float(phi[:, i] @ phi[:, j]) / (lengths[i] * lengths[j]) for i in range(M) for j in range(M)}
    pairs = [(i, j) for i in range(M) for j in range(M) if i != j]
    own = [product[p] for p in pairs if p[0] // (M // E) == p[1] // (M // E)]
    across = [product[p] for p in pairs if p[0] // (M // E) != p[1] // (M // E)]
    found = {"norm_min": min(lengths), "norm_mean": float(np.mean(lengths)), "norm_max": max(lengths)}
    for where, values in (("within", own), ("across", across)):
        if values:
            found |= {f"similarity_{where}_mean": float(np.mean(values)), f"similarity_{where}_max": max(values)}
    return {f"{name}_{measure}": value for measure, value in found.items()}
