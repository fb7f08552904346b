"""This file owns the other people's Soft MoE layers that ours is timed against, where they are installed.

Both are given what ours has: the same experts (width to hidden, GELU in its tanh form, hidden to width, biases), the same
experts x slots, float32 parameters and the same input. Below float32 they run under autocast, as their users run them, where the
hardware multiplies that dtype. Their routers do less than ours: each peer is timed as it is and, for equal work, with ours.
"""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from softmoe_train.bench.floor import LayerShape


class Peer(NamedTuple):
    """A layer of another package, and what it computes that ours does not, or the other way round."""

    name: str
    module: nn.Module
    differs: str


def build_peers(shape: LayerShape, device: torch.device) -> list[Peer]:
    """The peers that are installed, built to do the same work."""
    peers = []
    with torch.device(device):
        if find_spec("soft_moe_pytorch") and find_spec("einops"):
            peers += _with_our_router(_lucidrains(shape), shape, unit_lengths=False)
        if find_spec("soft_mixture_of_experts") and find_spec("einops"):
            peers += _with_our_router(_fkodom(shape), shape, unit_lengths=True)
    return peers


class Autocast(nn.Module):
    """Runs a layer of float32 parameters as torch.autocast decides it for `dtype`, or in float32; in and out as x came."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in the dtype of x."""
        if self.dtype == torch.float32:
            return self.inner(x.float()).to(x.dtype)
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.inner(x).to(x.dtype)


def _with_our_router(peer: Peer, shape: LayerShape, *, unit_lengths: bool) -> list[Peer]:
    """The peer as it is, and as it is but with logits as ours: float32, and of unit lengths where it normalises nothing."""
    logits = "float32 logits of tokens and slot parameters of unit length" if unit_lengths else "float32 logits"
    same = Peer(f"{peer.name} + our router", OurRouter(peer.module, shape, unit_lengths), f"the same with {logits}")
    return [peer, same]


class OurRouter(nn.Module):
    """Runs another layer with its logits taken as our router takes them, for a comparison of equal work."""

    def __init__(self, inner: nn.Module, shape: LayerShape, unit_lengths: bool) -> None:
        super().__init__()
        self.inner = inner
        self.mode = _Logits(shape.experts * shape.slots * shape.width, unit_lengths)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        with self.mode:
            return self.inner(x)


class _Logits(TorchFunctionMode):
    """Sees the einsum of all tokens with all slot parameters, the only one of two operands with three dimensions, and replaces it."""

    def __init__(self, slot_parameters: int, unit_lengths: bool) -> None:
        super().__init__()
        self.slot_parameters = slot_parameters
        self.unit_lengths = unit_lengths
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and all(t.ndim == 3 for t in args[1:]) and args[2].numel() == self.slot_parameters:
            self.seen += 1
            equation, tokens, phi = args
            with torch.autocast(tokens.device.type, enabled=False):
                tokens, phi = tokens.float(), phi.float()
                if self.unit_lengths:
                    tokens, phi = F.normalize(tokens, dim=-1), F.normalize(phi, dim=0)
                return func(equation, tokens, phi)
        return func(*args, **(kwargs or {}))


def _lucidrains(shape: LayerShape) -> Peer:
    from soft_moe_pytorch import SoftMoE  # pyright: ignore[reportMissingImports]

    layer: Any = SoftMoE(
        shape.width,
        num_experts=shape.experts,
        num_slots=shape.slots,
        expert_mult=shape.hidden / shape.width,  # pyright: ignore[reportArgumentType] (it takes a part too)
        is_distributed=False,
        offload_unused_experts_to_cpu=False,
    )
    for expert in layer.experts.experts:
        expert[1] = nn.GELU(approximate="tanh")
    return Peer(
        "soft-moe-pytorch",
        layer,
        f"version {version('soft-moe-pytorch')} computes otherwise: RMS norm with a gain on tokens and slot parameters instead of unit "
        "length and one scale, mixes the normed tokens; its router follows autocast, ours stays float32; no scale to learn; one "
        "expert after another",
    )


def _fkodom(shape: LayerShape) -> Peer:
    from soft_mixture_of_experts.multi_expert import MultiExpertLayer  # pyright: ignore[reportMissingImports]
    from soft_mixture_of_experts.soft_moe import SoftMoE  # pyright: ignore[reportMissingImports]

    layer: Any = SoftMoE(shape.width, shape.width, num_experts=shape.experts, slots_per_expert=shape.slots)
    # Its own expert is one linear map: with that it would do a fraction of the work.
    layer.experts = nn.Sequential(
        MultiExpertLayer(shape.width, shape.hidden, shape.experts),
        nn.GELU(approximate="tanh"),
        MultiExpertLayer(shape.hidden, shape.width, shape.experts),
    )
    return Peer(
        "soft-mixture-of-experts",
        layer,
        f"version {version('soft-mixture-of-experts')} computes otherwise: no normalisation in the router, which follows autocast where "
        "ours stays float32; given our expert in place of its one linear map",
    )
