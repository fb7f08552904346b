"""This file owns the settings of a layout and the arithmetic of its axes: what fits, and what to use where it does not.

W ranks = dp = expert_dp x ep;  R = size of ep;  E experts
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from softmoe_train.config import Record

Positive = Annotated[int, Field(ge=1)]


class ParallelConfig(Record):
    """How one copy of the model lies over the ranks, how slots travel, and what is computed again to save memory."""

    expert_axis: int | Literal["auto"]  # R, ranks that share one set of experts; auto: as many as divide both E and W
    sharding: Literal["replicated", "fsdp", "hsdp"]  # what the expert axis does not cut: copies; FSDP2 over all or some
    shard_size: Positive | None  # hsdp only: neighbouring ranks that share one copy
    reduce_each_micro: bool  # fsdp, hsdp: sum gradients after every micro-batch (less memory, more traffic)
    prefetch: Positive | None  # fsdp, hsdp: blocks gathered ahead of their use; null is FSDP2's own rule
    recompute: Literal["none", "block", "moe"]  # activations computed again in backward instead of kept
    exchange: Literal["flat", "two_stage"]  # one all-to-all, or one inside the node and then one between nodes
    node_size: Annotated[int, Field(ge=2)] | None  # ranks of the expert axis on one node; null: from those of a host
    exchange_chunks: Positive  # parts of a micro-batch whose exchanges run under each other's experts
    exchange_dtype: Literal["bfloat16"] | None  # of slots on their way; null: that of the activations

    @model_validator(mode="after")
    def _fits(self) -> "ParallelConfig":
        problems = []
        if (self.sharding == "hsdp") != (self.shard_size is not None):
            problems.append(
                f"parallel.shard_size={self.shard_size or 'null'} with parallel.sharding={self.sharding}: hsdp needs the number "
                f"of ranks that share one copy (the GPUs of a node, say), the others take null"
            )
        if self.sharding == "replicated" and self.reduce_each_micro:
            problems.append(
                "parallel.reduce_each_micro=true with parallel.sharding=replicated: whole gradients are kept anyway, so it "
                "would only cost; use false, or sharding=fsdp or hsdp"
            )
        if self.sharding == "replicated" and self.prefetch is not None:
            problems.append(
                f"parallel.prefetch={self.prefetch} with parallel.sharding=replicated: nothing is gathered; use null, or "
                f"sharding=fsdp or hsdp"
            )
        if self.exchange != "two_stage" and self.node_size is not None:
            problems.append(
                f"parallel.node_size={self.node_size} is used by parallel.exchange=two_stage alone; set it, or "
                f"parallel.node_size=null"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


def expert_axis(config: ParallelConfig, *, num_experts: int, size: int) -> int:
    """R, as `axis_of` says."""
    return axis_of(config.expert_axis, num_experts=num_experts, size=size)


def axis_of(setting: int | Literal["auto"], *, num_experts: int, size: int) -> int:
    """R; `auto` is the largest common divisor of experts and ranks (design: slots are few, expert weights are many)."""
    return math.gcd(num_experts, size) if setting == "auto" else setting


def node_size(config: ParallelConfig, *, axis: int, local_size: int) -> int:
    """Ranks of the expert axis on one node: as set, or the most that lie on one host wherever on it their run of ranks begins."""
    return config.node_size or math.gcd(axis, local_size)


def layout_problems(config: ParallelConfig, *, num_experts: int, size: int, local_size: int | None) -> list[str]:
    """What is wrong with the axes for `size` ranks, `local_size` of them (None: not known yet) on a host, with the legal values."""
    R = expert_axis(config, num_experts=num_experts, size=size)
    problems = _expert_axis_problems(R, num_experts, size)
    return problems or _copy_problems(config, R, size) + _stage_problems(config, R, size, local_size)


def chunk_problems(
    config: ParallelConfig, *, num_experts: int, size: int, images: int, group_images: int = 1
) -> list[str]:
    """Why `images`, those of a rank's micro-batch, are not cut into equal chunks; where nothing is exchanged nothing is cut.

    Routing groups of several images are cut whole.
    """
    chunks, groups = config.exchange_chunks, images // group_images
    if groups % chunks == 0 or expert_axis(config, num_experts=num_experts, size=size) == 1:
        return []
    legal = listed([d for d in range(1, groups + 1) if groups % d == 0])
    what = f"{images} images" if group_images == 1 else f"{groups} routing groups ({images} images)"
    return [f"parallel.exchange_chunks={chunks} does not divide the {what} of a micro-batch on each rank; use {legal}"]


def _expert_axis_problems(R: int, num_experts: int, size: int) -> list[str]:
    if R >= 1 and num_experts % R == 0 and size % R == 0:
        return []
    if num_experts == 1:
        return [f"parallel.expert_axis={R}: this model has no experts to spread (model.moe.blocks); use 1 or auto"]
    fails = [f"model.moe.num_experts={num_experts}"] if R < 1 or num_experts % R else []
    fails += [f"the {_ranks(size)} of this run"] if R < 1 or size % R else []
    common = math.gcd(num_experts, size)
    legal = listed([d for d in range(1, common + 1) if common % d == 0])
    return [
        f"parallel.expert_axis={R} does not divide {' nor '.join(fails)}; {num_experts} experts on {_ranks(size)} allow {legal}"
    ]


def _copy_problems(config: ParallelConfig, R: int, size: int) -> list[str]:
    legal = [s for s in range(2, size) if size % s == 0 and (s % R == 0 or R % s == 0)]
    if config.shard_size is None or config.shard_size in legal:
        return []
    remedy = f"use {listed(legal)}" if legal else "use parallel.sharding=fsdp or replicated"
    return [
        f"parallel.shard_size={config.shard_size} with {_ranks(size)} and expert axis {R}: it must be more than one rank and "
        f"fewer than all, divide the ranks, and be a multiple or a divisor of the axis; {remedy}"
    ]


def _stage_problems(config: ParallelConfig, R: int, size: int, local_size: int | None) -> list[str]:
    """Why a legal expert axis has no two stages; with an axis of 1 there is no exchange, and nothing to refuse."""
    if config.exchange != "two_stage" or R == 1 or (config.node_size is None and local_size is None):
        return []
    n = node_size(config, axis=R, local_size=local_size or size)
    if R % n == 0 and 1 < n < R:
        return []
    legal = [d for d in range(2, R) if R % d == 0]
    remedy = f"set parallel.node_size to {listed(legal)}, or " if legal else ""
    remedy += "use parallel.exchange=flat"
    if config.node_size is not None:
        return [f"parallel.node_size={n} does not cut an expert axis of {R} ranks into nodes of several; {remedy}"]
    return [
        f"parallel.exchange=two_stage, but with {local_size} of {size} ranks to a host an expert axis of {R} has {n} on a "
        f"node, so there are no two stages; {remedy}"
    ]


def _ranks(size: int) -> str:
    return f"{size} ranks" if size > 1 else "1 rank"


def listed(numbers: list[int]) -> str:
    """Numbers as a person lists them: 1, 2 or 4."""
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
