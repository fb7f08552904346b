"""This file owns the settings of a model: its sizes, which blocks hold experts, and what decides who reads what.

T tokens  E experts  S slots per expert
"""

import math
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from softmoe_train.config import Record

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Router = Literal["soft", "identity", "tokens_choice", "experts_choice"]


class SoftConfig(Record):
    """What router=soft learns; every other choice than Soft MoE's own is an ablation (paper App. A and E)."""

    dispatch: Literal["learned", "uniform"]  # uniform: every slot is the mean of the tokens
    combine: Literal["learned", "uniform", "separate"]  # uniform: the mean of all slots; separate: a matrix of its own
    normalize: bool  # tokens and slot parameters have unit length in the logits
    scale: bool  # a learned factor of the logits

    @property
    def as_published(self) -> bool:
        """Whether this is Soft MoE itself."""
        return (self.dispatch, self.combine, self.normalize, self.scale) == ("learned", "learned", True, True)


class SparseConfig(Record):
    """What both sparse routers share: groups, their capacity, and the noise of training."""

    group_images: Positive  # consecutive global samples whose tokens compete for the same capacity
    capacity_factor: Annotated[float, Field(gt=0)]
    capacity_rounding: Literal["nearest", "multiple_of_4"]  # the paper's, or V-MoE's: up, to a multiple of 4
    noise_std: NotNegative  # of the logits in training, divided by E


class TokensChoiceConfig(Record):
    """What router=tokens_choice has for itself (V-MoE; paper.md 4.1)."""

    top_k: Positive  # experts of a token
    batch_priority: bool  # tokens with the largest gates come first, not those with the lowest number
    importance_loss: NotNegative  # weights of the auxiliary losses
    load_loss: NotNegative
    gshard_loss: NotNegative


class MoEConfig(Record):
    """The mixture of experts, and the blocks that hold one instead of a dense MLP."""

    blocks: str | list[int]  # "last 6", "every 2", or block numbers from 0; [] is the dense ViT
    router: Router
    num_experts: Positive
    slots_per_expert: Positive  # soft, identity; those of the sparse routers follow from the capacity factor
    expert: Literal["mlp", "gated_mlp"]
    expert_init: Literal["identical", "independent"]
    expert_dropout: Annotated[float, Field(ge=0, lt=1)]
    soft: SoftConfig
    sparse: SparseConfig
    tokens_choice: TokensChoiceConfig

    @property
    def is_sparse(self) -> bool:
        """Whether tokens compete for capacity, so that an image's output depends on the rest of its group."""
        return self.router in ("tokens_choice", "experts_choice")

    @property
    def group_images(self) -> int:
        """Images of one routing group."""
        return self.sparse.group_images if self.is_sparse else 1

    @property
    def choices(self) -> int:
        """K, the experts that each token asks for; 1 where the experts choose."""
        return self.tokens_choice.top_k if self.router == "tokens_choice" else 1

    def read_keys(self) -> frozenset[str]:
        """The keys below `model.moe`, dotted, that the layer reads with this router; every other one changes nothing."""
        keys = set(MoEConfig.model_fields) - {"soft", "sparse", "tokens_choice"}
        if self.is_sparse:
            keys -= {"slots_per_expert"}
            keys |= {f"sparse.{key}" for key in SparseConfig.model_fields}
        if self.router == "tokens_choice":
            keys |= {f"tokens_choice.{key}" for key in TokensChoiceConfig.model_fields}
            if self.sparse.noise_std == 0:  # there is nothing to draw again
                keys -= {"tokens_choice.load_loss"}
        if self.router == "soft":
            keys |= {f"soft.{key}" for key in SoftConfig.model_fields}
            if self.soft.dispatch == self.soft.combine == "uniform":  # there are no logits
                keys -= {"soft.normalize", "soft.scale"}
        return frozenset(keys)

    def capacity(self, num_tokens: int) -> int:
        """S, the slots of an expert for one routing group of images with `num_tokens` tokens; 0 where the factor is too small."""
        if not self.is_sparse:
            return self.slots_per_expert
        share = self.group_images * num_tokens * self.choices * self.sparse.capacity_factor / self.num_experts
        if self.sparse.capacity_rounding == "nearest":
            return round(share)  # half to even, as the released code
        return 4 * math.ceil(math.ceil(share) / 4)

    def problems(self, num_tokens: int) -> list[str]:
        """What does not fit together, for images of `num_tokens` tokens."""
        problems = []
        if self.router == "tokens_choice" and self.tokens_choice.top_k > self.num_experts:
            problems.append(
                f"model.moe.tokens_choice.top_k={self.tokens_choice.top_k} is more than model.moe.num_experts={self.num_experts}; "
                f"use fewer choices or more experts"
            )
        if self.router == "tokens_choice" and self.tokens_choice.load_loss and not self.sparse.noise_std:
            problems.append(
                f"model.moe.tokens_choice.load_loss={self.tokens_choice.load_loss:g} with model.moe.sparse.noise_std=0: load is the chance "
                f"to be chosen were the noise drawn again; use model.moe.tokens_choice.load_loss=0, or noise"
            )
        if self.is_sparse and self.capacity(num_tokens) < 1:
            least = self.num_experts / (self.group_images * num_tokens * self.choices)
            problems.append(
                f"model.moe.sparse.capacity_factor={self.sparse.capacity_factor:g} gives {self.num_experts} experts no slot for a group "
                f"of {self.group_images} x {num_tokens} tokens; use {least:.3g} or more"
            )
        if self.router == "soft":
            problems += self._soft_problems()
        slots = self.num_experts * self.slots_per_expert
        if self.router == "identity" and slots != num_tokens:
            problems.append(
                f"model.moe.router=identity gives each of the {num_tokens} tokens of an image the slot of its own, but there are "
                f"{self.num_experts} x {self.slots_per_expert} = {slots}; make num_experts x slots_per_expert {num_tokens}"
            )
        return problems

    def _soft_problems(self) -> list[str]:
        problems = []
        uniform = self.soft.dispatch == "uniform"
        if uniform and self.soft.combine == "separate":
            problems.append(
                "model.moe.soft.combine=separate with model.moe.soft.dispatch=uniform: dispatch has no matrix that combine could "
                "share; use model.moe.soft.combine=learned"
            )
        if uniform and self.soft.combine == "uniform" and self.expert_init == "identical" and self.num_experts > 1:
            problems.append(
                f"model.moe.soft.dispatch=uniform with model.moe.soft.combine=uniform gives the {self.num_experts} experts the same "
                f"input and the same gradient, so that experts which start identical stay so; use model.moe.expert_init=independent"
            )
        return problems


class ModelConfig(Record):
    """A vision transformer of paper.md 2.1, with experts in the blocks that `moe` names."""

    image_size: Positive  # pixels
    patch_size: Positive  # pixels
    width: Positive
    depth: Positive
    mlp_dim: Positive
    num_heads: Positive
    num_classes: Positive
    position_std: NotNegative
    moe: MoEConfig

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        problems = []
        if self.image_size % self.patch_size:
            divisors = [d for d in range(1, self.image_size + 1) if self.image_size % d == 0]
            problems.append(
                f"model.patch_size={self.patch_size} does not divide model.image_size={self.image_size}; use one of {divisors}"
            )
        if self.width % self.num_heads:
            problems.append(
                f"model.num_heads={self.num_heads} does not divide model.width={self.width}; use a divisor of the width"
            )
        try:
            if moe_blocks(self.moe.blocks, self.depth) and not problems:
                problems += self.moe.problems(self.num_tokens)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def has_experts(self) -> bool:
        """Whether any block holds experts."""
        return bool(moe_blocks(self.moe.blocks, self.depth))

    @property
    def num_experts(self) -> int:
        """E, or 1 where no block holds experts."""
        return self.moe.num_experts if self.has_experts else 1

    @property
    def num_tokens(self) -> int:
        """T, the patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def group_images(self) -> int:
        """Images of one routing group; 1 where no block holds experts."""
        return self.moe.group_images if self.has_experts else 1

    @property
    def capacity(self) -> int:
        """S, the slots of an expert for one routing group."""
        return self.moe.capacity(self.num_tokens)


def moe_blocks(blocks: str | list[int], depth: int) -> list[int]:
    """The numbers of the blocks that hold experts, ascending.

    "last n" is the last n blocks (the paper's choice, n = depth / 2), "every k" every k-th, ending with the last of each k.
    Raises ValueError for anything else or for a block that is not there.
    """
    if isinstance(blocks, list):
        chosen = sorted(blocks)
    else:
        word, _, number = blocks.partition(" ")
        legal = word in ("last", "every") and re.fullmatch("[0-9]+", number) is not None
        if not legal or not 1 <= int(number) <= depth:
            raise ValueError(
                f"model.moe.blocks={blocks!r} is not 'last n', 'every k' (n and k from 1 to {depth}) or a list of block numbers"
            )
        n = int(number)
        chosen = list(range(depth - n, depth)) if word == "last" else list(range(n - 1, depth, n))
    if len(set(chosen)) != len(chosen) or not all(0 <= i < depth for i in chosen):
        raise ValueError(f"model.moe.blocks={blocks} must name different blocks between 0 and {depth - 1}")
    return chosen
