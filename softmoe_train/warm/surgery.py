"""This file owns the fit of weights to a model: what each of its tensors begins with, and every reason why it cannot.

Only shapes are looked at. E experts  S slots per expert  D width  H hidden  T tokens
"""

import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from torch import Tensor

from softmoe_train.config import flat
from softmoe_train.model.records import ModelConfig
from softmoe_train.warm.grids import CHANNELS, resample_patch, resample_position, side_of
from softmoe_train.warm.lazy import Lazy, computed, copies, noisy, picked, transposed
from softmoe_train.warm.mixture import Mixture, kept_differences, upcycled_differences
from softmoe_train.warm.settings import WarmConfig
from softmoe_train.warm.sources import Source
from softmoe_train.warm.translate import NO_QK_NORM

Shape = tuple[int, ...]
How = Literal["loaded", "resampled", "copied", "created"]
MOST_TOLD = 6  # problems of one kind, told one by one
EXPERT = re.compile(r"(?P<block>blocks\.\d+\.)moe\.experts\.(?P<part>.+)")
DENSE = {"w1": "mlp.fc1.weight", "b1": "mlp.fc1.bias", "w2": "mlp.fc2.weight", "b2": "mlp.fc2.bias"}
NO_BIAS = "the source has no bias: zeros, which are the same"
QK_NORM = re.compile(r"blocks\.\d+\.attn\.(query|key)_norm\.weight")


class Begin(NamedTuple):
    """What one tensor of the model begins with; `values` is None where its own init rule gives it."""

    how: How
    values: Lazy | None
    note: str


class Fit(NamedTuple):
    """How weights fit a model: each of its tensors, each stored one that is left aside and why, and what forbids it.

    `differences` say why the result does not compute what the source does, or should not be left as it is.
    """

    begins: dict[str, Begin]
    aside: dict[str, str]
    problems: list[str]
    differences: list[str]
    settings: dict[str, str]  # of the model, that are not the source's


def fit(source: Source, shapes: Mapping[str, Shape], model: ModelConfig, config: WarmConfig, seed: int) -> Fit:
    """How the source's weights become a model with parameters of these `shapes`, by name."""
    return _Fitting(source, shapes, model, config, seed).result()


class _Fitting:
    """One fit under way: what has been found so far."""

    def __init__(
        self, source: Source, shapes: Mapping[str, Shape], model: ModelConfig, config: WarmConfig, seed: int
    ) -> None:
        self.there = source.weights.tensors
        self.source = source
        self.shapes = shapes
        self.model = model
        self.config = config
        self.seed = seed
        self.used: set[str] = set()
        self.aside = dict(source.weights.aside)
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.alike: list[str] = []  # copies that nothing tells apart
        self.noised: list[str] = []  # copies that are not exact

    def result(self) -> Fit:
        problems = self._size_problems()
        if problems:  # hundreds of tensors would say the same
            return Fit({}, {}, problems, [], {})
        begins = {name: self._begin(name, shape) for name, shape in self.shapes.items()}
        problems += _told("has no weights for", self.missing, self._remedy_for_missing())
        problems += _told("has another shape for", self.misshapen, "")
        problems += self._unexplained()
        return Fit(begins, self.aside, problems, self._differences(begins), self._settings())

    def _size_problems(self) -> list[str]:
        """Where the source is of another size altogether."""
        problems = []
        depth = 1 + max(
            (int(found[1]) for name in self.there if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1
        )
        if depth != self.model.depth:
            problems.append(f"it has {depth} blocks, and model.depth={self.model.depth}; use model.depth={depth}")
        patches = self.there.get("patch_embed.weight")
        if patches is not None and patches.shape[0] != self.model.width:
            here = self.shapes["patch_embed.weight"]
            problems.append(
                f"patch_embed.weight is {patches.shape} there and {here} here: use model.width={patches.shape[0]}, or another source"
            )
        heads = self.source.weights.num_heads
        if heads is not None and heads != self.model.num_heads:
            problems.append(
                f"it has {heads} heads, and model.num_heads={self.model.num_heads}; use model.num_heads={heads}"
            )
        return problems

    def _begin(self, name: str, shape: Shape) -> Begin:
        if name.startswith("head.") and (fresh := self._fresh_head(name)) is not None:
            return fresh
        t = self.there.get(name)
        if t is None:
            return self._without_source(name, shape)
        self.used.add(name)
        if t.shape == shape:
            return Begin("loaded", t, "")
        made = self._fitted(name, t, shape)
        if made is None and self._may_be_new(name):
            self.aside |= dict.fromkeys(t.origin, f"{name} is {shape} here and starts fresh (warm.allow_new)")
            return Begin("created", None, f"the source's is {t.shape} (warm.allow_new)")
        if made is None:
            self.misshapen.append(f"{name}: {t.shape} there, {shape} here")
            return Begin("created", None, "")
        return made

    def _fresh_head(self, name: str) -> Begin | None:
        """A head that starts as its init rule says, where it was asked for or classes are others."""
        weight = self.there.get("head.weight")
        classes = None if weight is None else weight.shape[0]
        if self.config.head == "fresh":
            why = "warm.head=fresh"
        elif classes is not None and classes != self.model.num_classes:
            why = f"the source has {classes} classes, this model {self.model.num_classes}"
        else:
            return None
        if name in self.there:
            self.used.add(name)
            self.aside |= dict.fromkeys(self.there[name].origin, f"a fresh head: {why}")
        return Begin("created", None, why)

    def _fitted(self, name: str, t: Lazy, shape: Shape) -> Begin | None:
        """A source of another shape, made into this one; None where there is no way that means something."""
        if name == "position" and t.shape[1:] == shape[1:] and None not in map(side_of, (t.shape[0], shape[0])):
            old, new = side_of(t.shape[0]), side_of(shape[0])
            made = computed(t, shape, lambda position: resample_position(position, shape[0]))
            return Begin("resampled", made, f"from a grid of {old} x {old} to {new} x {new}, linear")
        if name == "patch_embed.weight" and t.shape[0] == shape[0]:
            size = math.isqrt(t.shape[1] // CHANNELS)
            made = computed(t, shape, lambda kernel: resample_patch(kernel, self.model.patch_size))
            return Begin("resampled", made, f"from patches of {size} to {self.model.patch_size} pixels, PI-resize")
        if EXPERT.fullmatch(name) and t.shape[1:] == shape[1:]:
            return self._other_experts(name, t, shape)
        if ".moe.router." in name and len(t.shape) == len(shape):
            return self._other_slots(name, t, shape)
        return None

    def _other_experts(self, name: str, t: Lazy, shape: Shape) -> Begin:
        old, new = t.shape[0], shape[0]
        chosen = picked(t, [expert % old for expert in range(new)])
        if new < old:
            return Begin("copied", chosen, f"the first {new} of {old} experts")
        self.alike.append(name)
        made = self._noisy(chosen, name, per_expert=True)
        return Begin("copied", made, f"{new} experts from {old}: e from e mod {old}{self._with_noise()}")

    def _other_slots(self, name: str, t: Lazy, shape: Shape) -> Begin:
        """A router's parameters with other numbers of experts or slots, along whichever dims these are."""
        index = [[i % old for i in range(new)] for old, new in zip(t.shape, shape)]

        def choose(values: Tensor) -> Tensor:
            for dim, chosen in enumerate(index):
                values = values.index_select(dim, values.new_tensor(chosen).long())
            return values

        chosen = computed(t, shape, choose)
        if any(new > old for old, new in zip(t.shape, shape)):
            self.alike.append(name)
            chosen = self._noisy(chosen, name, per_expert=False)
        return Begin("copied", chosen, f"{shape} from {t.shape}: i from i mod the old size{self._with_noise()}")

    def _without_source(self, name: str, shape: Shape) -> Begin:
        made = self._upcycled(name, shape)
        if made is not None:
            return made
        if ".moe.router." in name:
            return Begin("created", None, "the source has no such router")
        if QK_NORM.fullmatch(name):
            return Begin(
                "created", None, "the source does not normalise queries and keys: ones, which do not reproduce it"
            )
        if name.endswith("attn.qkv.bias"):
            return Begin("created", None, NO_BIAS)
        if self._may_be_new(name):
            return Begin("created", None, "the source has none (warm.allow_new)")
        self.missing.append(name)
        return Begin("created", None, "")

    def _upcycled(self, name: str, shape: Shape) -> Begin | None:
        """Every expert a copy of the dense MLP of its block."""
        expert = EXPERT.fullmatch(name)
        dense = "" if expert is None else expert["block"] + DENSE.get(expert["part"], "")
        t = self.there.get(dense)
        if expert is None or t is None or self.model.moe.expert != "mlp":
            return None
        self.used.add(dense)
        t = transposed(t) if len(t.shape) == 2 else t
        if t.shape != shape[1:]:
            self.misshapen.append(f"{name}: {dense} would give {t.shape} to each expert, and it is {shape[1:]} here")
            return Begin("created", None, "")
        count, soft = shape[0], self.model.moe.soft
        if count > 1 and self.model.moe.router == "soft" and soft.dispatch == soft.combine == "uniform":
            self.alike.append(name)
        made = self._noisy(copies(t, count), name, per_expert=True) if count > 1 else copies(t, count)
        return Begin("copied", made, f"{dense} to {count} experts{self._with_noise() if count > 1 else ''}")

    def _noisy(self, t: Lazy, name: str, *, per_expert: bool) -> Lazy:
        if self.config.noise:
            self.noised.append(name)
        return noisy(t, self.config.noise, seed=self.seed, name=name, per_expert=per_expert)

    def _with_noise(self) -> str:
        return f", each element times 1 + N(0, {self.config.noise:g}²)" if self.config.noise else ""

    def _may_be_new(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.config.allow_new)

    def _remedy_for_missing(self) -> str:
        if any(name.startswith("head.") for name in self.missing):
            return "; use warm.head=fresh for a fresh head"
        if any(".mlp." in name for name in self.missing) and any(EXPERT.fullmatch(name) for name in self.there):
            return "; where the source has experts a dense MLP has no source: check model.moe.blocks"
        if any(EXPERT.fullmatch(name) for name in self.missing) and self.model.moe.expert != "mlp":
            return f"; experts of kind {self.model.moe.expert} cannot be made of a dense MLP: use model.moe.expert=mlp"
        return '; what may start fresh is named by patterns, as in warm.allow_new=["head.*"]'

    def _unexplained(self) -> list[str]:
        """Stored tensors that would be left behind without a word."""
        left = {name: "" for t in self.there if t not in self.used for name in self.there[t].origin}
        unknown = {**self.source.weights.unknown, **left}
        for name in list(unknown):
            if ".moe.router." in name:
                self.aside[name] = "of a router that is not the one here"
            elif any(fnmatchcase(name, pattern) for pattern in self.config.ignore):
                self.aside[name] = "warm.ignore"
            else:
                continue
            del unknown[name]
        told = [f"{name} ({why})" if why else name for name, why in unknown.items()]
        return _told(
            "has what nothing here takes:", told, '; leave it aside with warm.ignore=["PATTERN"], or take another model'
        )

    def _differences(self, begins: Mapping[str, Begin]) -> list[str]:
        differences = list(self.source.weights.differences)
        resampled = [f"{name} is resampled {begin.note}" for name, begin in begins.items() if begin.how == "resampled"]
        if resampled:
            differences.append(f"images are of other patches than the source's: {'; '.join(resampled)}")
        created = {name: begin.note for name, begin in begins.items() if begin.how == "created"}
        fresh = [f"{name} ({note})" for name, note in created.items() if self._is_lost(name, note)]
        if fresh:
            differences.append(f"these start fresh and do not compute what the source did: {_some(fresh)}")
        differences += self._differences_of_experts(begins)
        if self.noised:
            differences.append(
                f"warm.noise={self.config.noise:g} moves the copies away from what they are of ({_some(self.noised)})"
            )
        elif self.alike and not self._parted():
            differences.append(
                f"copies of experts or slots ({_some(self.alike)}) begin alike, get the same gradients and stay alike; "
                f"warm.noise=0.01 tells them apart"
            )
        return differences

    def _is_lost(self, name: str, note: str) -> bool:
        """Whether a tensor that starts fresh changes the function, and nothing else says so."""
        told = ".moe.router." in name or (QK_NORM.fullmatch(name) and NO_QK_NORM in self.source.weights.differences)
        return not told and note != NO_BIAS

    def _differences_of_experts(self, begins: Mapping[str, Begin]) -> list[str]:
        blocks = dict.fromkeys(found["block"] for name in begins if (found := EXPERT.fullmatch(name)))
        kept = [block for block in blocks if any(name.startswith(f"{block}moe.") for name in self.there)]
        upcycled = [block for block in blocks if block not in kept]
        differences: list[str] = []
        if upcycled:
            here = Mixture(self.model.moe, self.model.num_tokens)
            differences += upcycled_differences(here, _some([block.rstrip(".") for block in upcycled]))
        if kept:
            routers = tuple(f"{block}moe.router." for block in kept)
            fresh = [name for name, begin in begins.items() if begin.how == "created" and name.startswith(routers)]
            differences += kept_differences(self.source.model or {}, self.model, fresh)
        return differences

    def _parted(self) -> bool:
        """Whether training tells copies apart: by its noise or dropout, or since each of them sees other tokens."""
        moe = self.model.moe
        return moe.expert_dropout > 0 or moe.router == "identity" or (moe.is_sparse and moe.sparse.noise_std > 0)

    def _settings(self) -> dict[str, str]:
        if self.source.model is None:
            return {}
        there, here = flat(dict(self.source.model)), flat(self.model.model_dump())
        return {
            key: f"{there.get(key)} there, {here.get(key)} here"
            for key in sorted({*there, *here})
            if there.get(key) != here.get(key)
        }


def _told(what: str, names: list[str], remedy: str) -> list[str]:
    return [f"it {what} {_some(names)}{remedy}"] if names else []


def _some(names: list[str]) -> str:
    more = len(names) - MOST_TOLD
    return "; ".join(names[:MOST_TOLD]) + (f"; and {more} more" if more > 0 else "")
