"""This file owns the rehearsal of a step: the real engine of a run on rank 0, over a process group and tensors that are shapes alone.

W ranks. Nothing is allocated and nothing is sent: collectives return at once, tensors have sizes and no values.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from softmoe_train.data import Batch, Cursor
from softmoe_train.dist import local_values
from softmoe_train.engine.deepspeed_config import DeepSpeedConfig
from softmoe_train.engine.deepspeed_engine import DeepSpeedEngine, forget_groups
from softmoe_train.engine.deepspeed_state import PartitionedState
from softmoe_train.engine.torch_engine import TorchEngine
from softmoe_train.model.vit import ViT
from softmoe_train.parallel.topology import Topology
from softmoe_train.plan.tally import Collective, Tally
from softmoe_train.run import build_engine
from softmoe_train.settings import RunConfig, TorchEngineConfig

CPU = torch.device("cpu")


class Held(NamedTuple):
    """Bytes that one rank holds."""

    parameters: int
    gradients: int  # that its update reads; more is there for a while, see `peak`
    optimizer: int  # moments, and ZeRO's own copies of the weights
    average: int  # the moving average of the weights, where there is one

    @property
    def lasting(self) -> int:
        """What is there between steps, and gradients."""
        return sum(self)


class Rehearsed(NamedTuple):
    """One step of rank 0, which has no less of anything than another."""

    held: Held
    activations: int  # most that the forward of a micro-batch leaves for its backward
    peak: int  # most alive at once in the step; the above need not all be there together, and other things come and go
    collectives: list[Collective]
    checkpoint: int  # bytes of all tensors that resume, on all ranks together


def rehearse(config: RunConfig, size: int, ranks_per_host: int) -> Rehearsed:
    """Build the engine of a legal run on `size` ranks and take one step; not compiled, and with its optimizer on the device."""
    config = config.model_copy(update={"compile": False, "engine": _without_offload(config.engine)})
    with _fake_world(size), ExitStack() as stack:
        topology = Topology.build(
            config.parallel,
            num_experts=config.model.num_experts,
            device=CPU,
            size=size,
            local_size=ranks_per_host,
        )
        tally = Tally()

        def shapes_only(model: ViT, device: torch.device, seed: int) -> None:
            # From here on: a model whose tensors were fake before could not be moved to a device.
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(tally)
            model.to_empty(device=device)
            # DeepSpeed moves it to where it is, which fake tensors do not survive.
            model._apply = lambda fn, recurse=True: model  # pyright: ignore[reportAttributeAccessIssue]

        engine = build_engine(config, topology, CPU, shapes_only)
        return _step(engine, config, size, tally)


def held(engine: TorchEngine | DeepSpeedEngine) -> Held:
    """What an engine holds between its backward and its update."""
    match engine:
        case TorchEngine():
            gradients = [local_values(gradient) for gradient in engine.gradients().values()]
            optimizer = engine.optimizer
            masters: list[Tensor] = []
        case DeepSpeedEngine():
            gradients = engine.held.gradient_parts()[0]
            optimizer = engine.wrapped.basic_optimizer
            masters = [g.master for g in engine.held.groups] if isinstance(engine.held, PartitionedState) else []
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    average = [] if engine.average is None else [*engine.average.values.values(), engine.average.updates]
    return Held(
        parameters=_bytes(engine.local.values()),
        gradients=_bytes(gradients),
        optimizer=_bytes([*states, *masters]),
        average=_bytes(average),
    )


def _step(engine: TorchEngine | DeepSpeedEngine, config: RunConfig, size: int, tally: Tally) -> Rehearsed:
    before, kept = [0], [0]
    engine.module.register_forward_pre_hook(lambda *_: before.append(tally.now))
    engine.module.register_forward_hook(lambda *_: kept.append(tally.now - before[-1]))
    batch = _batch(config, config.batch_size // size)
    tally.collectives, tally.peak = [], tally.now
    parts = batch.split(config.micro_batches)
    for part in parts:
        engine.forward_backward(part, last=part is parts[-1])
    holds = held(engine)
    engine.update(0.0)
    collectives, peak = list(tally.collectives), tally.peak
    checkpoint = sum(tensor.numel() * tensor.dtype.itemsize for tensor in engine.state_dict().values())
    return Rehearsed(holds, max(kept), peak, collectives, checkpoint)


def _without_offload(engine: TorchEngineConfig | DeepSpeedConfig) -> TorchEngineConfig | DeepSpeedConfig:
    # DeepSpeed's offload looks at the values of gradients, and there are none.
    return engine.model_copy(update={"offload_optimizer": False}) if isinstance(engine, DeepSpeedConfig) else engine


def _batch(config: RunConfig, images: int) -> Batch:
    """The shapes of a rank's share of a global batch, as its stream makes them."""
    side, data = config.model.image_size, config.data
    weighted = data.mixup is not None or data.labels == "multi_hot"
    labels = torch.empty(images, config.model.num_classes) if weighted else torch.empty(images, dtype=torch.int64)
    pictures = torch.empty(images, 3, side, side, dtype=torch.uint8)
    return Batch(pictures, labels, torch.empty(images, dtype=torch.bool), torch.arange(images), Cursor(images), ())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


@contextmanager
def _fake_world(size: int) -> Iterator[None]:
    """A default process group of `size` ranks that this process alone pretends to be in, as rank 0."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # DeepSpeed's alignment
            yield
    finally:
        forget_groups()
        dist.destroy_process_group()
