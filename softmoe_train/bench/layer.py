"""This file owns `bench layer`: the MoE layer beside its matrix products, a dense MLP of equal FLOPs, and other people's layers.

B images  T tokens  D width  E experts  S slots per expert  H hidden
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softmoe_train.bench.floor import Floor, LayerShape
from softmoe_train.bench.flops import Executed, multiplies
from softmoe_train.bench.memory import Memory, count_memory
from softmoe_train.bench.peers import Autocast, build_peers
from softmoe_train.bench.rounds import Side, Timings, measure, no_reset
from softmoe_train.config import config_folder, load_yaml
from softmoe_train.model.init import initialize
from softmoe_train.model.layers import Mlp
from softmoe_train.model.moe import MoE
from softmoe_train.model.products import product_dtype
from softmoe_train.model.records import MoEConfig

OURS, FLOOR, DENSE = "layer", "products", "dense MLP"


class LayerRow(NamedTuple):
    """What was measured of one shape in one dtype."""

    shape: LayerShape
    dtype: str
    timings: Timings
    flops_executed: int  # of the products that the layer was seen to run; the floor's are shape.flops
    product: torch.dtype  # in which the experts and both mixings multiply, and so does the floor
    dense_hidden: int
    memory: Memory
    recomputed_bytes: int  # kept for backward where the layer is recomputed
    differences: dict[str, str]  # what each peer computes otherwise

    def as_json(self) -> dict[str, Any]:
        """The row for programs: seconds, bytes, and `ratios`: how many times as long each other side takes as the layer."""
        others = [name for name in self.timings.seconds if name != OURS]
        return {
            **self.shape._asdict(),
            "dtype": self.dtype,
            "flops": self.shape.flops,
            "flops_executed": self.flops_executed,
            "product_dtype": str(self.product).removeprefix("torch."),
            "dense_hidden": self.dense_hidden,
            "seconds": {name: self.timings.spread(name)._asdict() for name in self.timings.seconds},
            "ratios": {name: self.timings.ratio(name, OURS)._asdict() for name in others},
            "cpu_ratios": {name: self.timings.cpu_ratio(name, OURS)._asdict() for name in others},
            "seconds_of_rounds": self.timings.seconds,
            "cpu_seconds_of_rounds": self.timings.cpu_seconds,
            "parameter_bytes": 4 * self.shape.parameters,
            "saved_bytes": self.memory.saved,
            "saved_bytes_shaped_as_weights": self.memory.saved_weights,
            "saved_bytes_bound": self.shape.saved_bound(getattr(torch, self.dtype)),
            "saved_bytes_recomputed": self.recomputed_bytes,
            "saved_bytes_recomputed_bound": self.shape.input_bytes(getattr(torch, self.dtype)),
            "peak_bytes": self.memory.peak,
            "peers_differ": self.differences,
        }


def measure_layer(
    shape: LayerShape,
    dtype: str,
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    peers: bool,
    after: Callable[[], object] = no_reset,
) -> LayerRow:
    """Forward and backward (gradients of the input and of every parameter) of a layer and of what it is compared with."""
    number = getattr(torch, dtype)
    layer = build_layer(shape, device)
    x = torch.randn(shape.images, shape.tokens, shape.width, dtype=number, device=device, requires_grad=True)
    gradient = torch.randn_like(x)
    ours = _side(OURS, layer, x, gradient)
    with Executed() as executed:
        ours.run()
    ours.reset()
    memory = count_memory(lambda: layer(x)[0], layer.parameters(), gradient, device)
    ours.reset()
    recomputed = count_memory(
        lambda: checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)[0],
        layer.parameters(),
        gradient,
        device,
    )
    ours.reset()
    product = product_dtype(x)
    assert product in {dtype for dtype, _ in executed.products}, executed.products
    floor = Floor(shape, number, product, device)
    mlp = build_dense(shape, device)
    others = build_peers(shape, device) if peers else []
    sides = [Side(FLOOR, floor.run, no_reset), ours]
    fastest = number if multiplies(number, device) else torch.float32
    sides += [_side(DENSE, mlp if fastest == number else Autocast(mlp, fastest), x, gradient)]
    sides += [_side(peer.name, Autocast(peer.module, fastest), x, gradient) for peer in others]
    timings = measure(sides, device=device, rounds=rounds, warmup=warmup, after=after)
    differences = {peer.name: peer.differs for peer in others}
    return LayerRow(
        shape,
        dtype,
        timings,
        sum(flops for _, flops in executed.products),
        product,
        mlp.fc1.out_features,
        memory,
        recomputed.saved,
        differences,
    )


def build_layer(shape: LayerShape, device: torch.device) -> MoE:
    """A MoE layer with experts that differ."""
    base = load_yaml(config_folder() / "model" / "_base.yaml")["moe"]
    asked = {"num_experts": shape.experts, "slots_per_expert": shape.slots, "expert_init": "independent"}
    config = MoEConfig(**{**base, **asked})
    with torch.device("meta"):
        layer = MoE(config, shape.width, shape.hidden)
    layer.to_empty(device=device)
    initialize(layer, seed=0)
    return layer


def build_dense(shape: LayerShape, device: torch.device) -> Mlp:
    """The dense MLP over all tokens whose hidden size gives it the FLOPs of the layer (to the nearest unit)."""
    hidden = max(1, round(shape.forward_flops / (4 * shape.images * shape.tokens * shape.width)))
    with torch.device("meta"):
        mlp = Mlp(shape.width, hidden)
    mlp.to_empty(device=device)
    initialize(mlp, seed=0)
    return mlp


def _side(name: str, module: nn.Module, x: Tensor, gradient: Tensor) -> Side:
    def run() -> None:
        output = module(x)
        (output[0] if isinstance(module, MoE) else output).backward(gradient)

    def reset() -> None:
        module.zero_grad()
        x.grad = None

    return Side(name, run, reset)
