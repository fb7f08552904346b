"""This file owns initialisation: every value is derived from (seed, global tensor), so it is the same on every layout."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

Fill = Callable[[Tensor, Generator], object]


@dataclass(frozen=True)
class InitRule:
    """How one parameter is filled: `fill` writes a whole tensor, or one expert's slice of it where dim 0 is the expert."""

    fill: Fill
    experts: Literal["none", "identical", "independent"] = "none"


@runtime_checkable
class Initialised(Protocol):
    """A module that says how each of its own parameters starts."""

    def init_rules(self) -> dict[str, InitRule]: ...


class LocalPart(NamedTuple):
    """The part of a global tensor that lies on this rank: its values and where they begin in every dim."""

    values: Tensor
    offsets: tuple[int, ...]


def whole(tensor: Tensor) -> LocalPart:
    """The trivial layout: all of the tensor is here."""
    return LocalPart(tensor.data, (0,) * tensor.ndim)


def zeros(tensor: Tensor, _: Generator) -> None:
    """Fill with 0."""
    tensor.zero_()


def ones(tensor: Tensor, _: Generator) -> None:
    """Fill with 1."""
    tensor.fill_(1.0)


def constant(value: float) -> Fill:
    """Fill with one value."""
    return lambda tensor, _: tensor.fill_(value)


def normal(std: float) -> Fill:
    """Draw from N(0, std²)."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def xavier_uniform(fan_in: int, fan_out: int) -> Fill:
    """Draw from U(-b, b), b = sqrt(6 / (fan_in + fan_out))."""
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def lecun_normal(fan_in: int) -> Fill:
    """Draw from a normal cut at two deviations, rescaled so that its deviation is sqrt(1 / fan_in) (as flax does)."""
    # 0.8796... is the deviation of a unit normal cut at +-2.
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    return lambda tensor, generator: nn.init.trunc_normal_(tensor, 0.0, std, -2 * std, 2 * std, generator=generator)


def initialize(model: nn.Module, seed: int, part_of: Callable[[Tensor], LocalPart] = whole) -> None:
    """Fill every parameter of `model` in place from `seed` and its global name.

    `part_of` maps a parameter to its local part; sharded parameters get exactly the values that one process would hold.
    Raises RuntimeError that names every parameter or buffer which no rule touched.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            part_of(tensor).values.fill_(math.nan)
    for prefix, module in model.named_modules():
        rules = _rules_of(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name in rules:
                fill_part(part_of(parameter), tuple(parameter.shape), rules[name], seed, f"{prefix}.{name}".lstrip("."))
    missed = untouched(model, part_of)
    if missed:
        raise RuntimeError(
            f"initialize() left these tensors without a value: {', '.join(missed)}; give each a rule in init_rules()"
        )


def untouched(model: nn.Module, part_of: Callable[[Tensor], LocalPart] = whole) -> list[str]:
    """Names of the parameters and buffers of which some value is still NaN."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if bool(part_of(tensor).values.isnan().any())]


def _rules_of(module: object) -> dict[str, InitRule]:
    return module.init_rules() if isinstance(module, Initialised) else {}


@torch.no_grad()
def fill_part(part: LocalPart, shape: tuple[int, ...], rule: InitRule, seed: int, name: str) -> None:
    """Write this rank's part of a tensor of `shape`, as the rule, the seed and the global `name` give it."""
    if part.values.numel() == 0:
        return
    if rule.experts == "none":
        part.values.copy_(_draw(shape, rule, seed, name)[_window(part.offsets, part.values.shape)])
        return
    window = _window(part.offsets[1:], part.values.shape[1:])
    if rule.experts == "identical":
        part.values.copy_(_draw(shape[1:], rule, seed, name)[window])
        return
    for i, expert in enumerate(part.values):
        expert.copy_(_draw(shape[1:], rule, seed, f"{name}[{part.offsets[0] + i}]")[window])


def _draw(shape: tuple[int, ...], rule: InitRule, seed: int, name: str) -> Tensor:
    # Drawn on the CPU in float32 whatever the device, so that a GPU run starts from the same weights.
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    full = torch.empty(shape, dtype=torch.float32)
    rule.fill(full, generator)
    return full


def _window(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
