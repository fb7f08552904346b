"""This file owns the native engine: replicated or FSDP2 weights, experts over `ep`, a fused local optimizer.

The optimizer works on each rank's local tensors: every kind is elementwise, so meshes and placements do not concern it.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from softmoe_train.data.batch import Batch
from softmoe_train.dist import local_offsets, local_values
from softmoe_train.engine.protocol import GradStats
from softmoe_train.model.init import LocalPart, initialize
from softmoe_train.model.loss import LossKind, classification_loss
from softmoe_train.model.vit import ViT
from softmoe_train.optim.build import OptimConfig, build_optimizer, state_keys
from softmoe_train.parallel.experts import shard_experts
from softmoe_train.parallel.fsdp import shard_fully
from softmoe_train.parallel.grads import clip_, copies_of, grad_norm, reduce_gradients
from softmoe_train.parallel.topology import ParallelConfig, Topology


class TorchEngine:
    """The `Engine` of plain PyTorch. Build it with `build_torch_engine`."""

    def __init__(self, module: ViT, optim: OptimConfig, topology: Topology, loss: LossKind, global_batch: int) -> None:
        self.module: nn.Module = module
        self.device = next(module.parameters()).device
        self.topology = topology
        self.optim = optim
        self.loss: LossKind = loss
        self.global_batch = global_batch
        self.parameters = dict(module.named_parameters())
        self.local = {name: local_values(p) for name, p in self.parameters.items()}
        self.copies = copies_of(list(self.parameters.values()), topology.size)
        self.optimizer = build_optimizer(optim, self.local)

    def forward_backward(self, batch: Batch, *, last: bool) -> Tensor:
        """Add the gradients of one micro-batch; sharded units reduce theirs under the backward of the last one.

        Returns this rank's sum of losses over the global batch: the sum over ranks and micro-batches is the mean loss.
        """
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        logits = self.module(batch.images)
        loss = classification_loss(logits, batch.labels, self.loss).sum() / self.global_batch
        loss.backward()
        return loss.detach()

    def reduce(self) -> dict[str, Tensor]:
        """The gradients of the global batch by name, laid out as their parameters, and not yet clipped."""
        missing = [name for name, p in self.parameters.items() if p.grad is None]
        assert not missing, f"no gradient for {', '.join(missing)}"
        reduce_gradients(self.parameters.values(), self.topology)
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    @torch.no_grad()
    def update(self, lr: float) -> GradStats:
        """Reduce, clip by the global norm, step. A non-finite norm makes it a no-op, decided on the device."""
        gradients = self.reduce()
        norm = grad_norm(list(gradients.values()), self.copies)
        skipped = (~norm.isfinite()).float()
        for name, local in self.local.items():
            # FSDP2 may move a shard to a padded buffer at the first forward: bind to where it lies now.
            local.data = local_values(self.parameters[name])
            local.grad = local_values(gradients[name])
        clip_([local.grad for local in self.local.values() if local.grad is not None], norm, self.optim.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue] (what GradScaler sets)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.zero_grad()
        return GradStats(norm, skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """`model.<name>`, `optimizer.<key>.<name>` and `optimizer.updates`, each with its global shape."""
        tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        for key in state_keys(self.optim):
            for name, p in self.parameters.items():
                tensors[f"optimizer.{key}.{name}"] = _laid_out_as(self.optimizer.state[self.local[name]][key], p)
        if self.optim.kind != "sgd":
            tensors["optimizer.updates"] = self._steps()[0].reshape(1).clone()
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The tensors of `state_dict()` share our storage; only the count of updates is kept once per parameter."""
        if self.optim.kind != "sgd":
            for step in self._steps():
                step.copy_(tensors["optimizer.updates"][0])

    def _steps(self) -> list[Tensor]:
        return [self.optimizer.state[local]["step"] for local in self.local.values()]


def _laid_out_as(local: Tensor, parameter: Tensor) -> Tensor:
    """A local tensor as the shard of a global one, placed as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def build_torch_engine(
    model: ViT,
    *,
    optim: OptimConfig,
    parallel: ParallelConfig,
    topology: Topology,
    loss: LossKind,
    global_batch: int,
    seed: int,
    device: torch.device,
) -> TorchEngine:
    """Shard experts, shard the rest, materialise, initialise, optimizer: in that order, on a model of the meta device."""
    shard_experts(model, topology.ep)
    if parallel.sharding == "fsdp":
        shard_fully(model, topology, model.dtype)
    model.to_empty(device=device)
    initialize(model, seed, lambda p: LocalPart(local_values(p), local_offsets(p)))
    return TorchEngine(model, optim, topology, loss, global_batch)
