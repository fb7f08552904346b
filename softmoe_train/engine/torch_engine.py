"""This file owns the native engine: replicated or FSDP2 weights, experts over `ep`, an optimizer of local tensors.

The optimizer works on what each rank holds: meshes and placements concern it only through `DimSums`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from softmoe_train.data.batch import Batch
from softmoe_train.dist import laid_out_as, local_values
from softmoe_train.engine.objective import Objective
from softmoe_train.engine.protocol import GradStats
from softmoe_train.engine.weights import Materialise, with_values
from softmoe_train.model.loss import LossKind
from softmoe_train.model.vit import ViT
from softmoe_train.optim.average import AverageConfig, WeightAverage
from softmoe_train.optim.build import OptimConfig, build_optimizer, state_layout
from softmoe_train.parallel.compile import compile_blocks
from softmoe_train.parallel.dim_sums import DimSums, laid_out_without
from softmoe_train.parallel.exchange import build_exchange
from softmoe_train.parallel.experts import shard_experts
from softmoe_train.parallel.fsdp import shard_fully
from softmoe_train.parallel.grads import GradReducer, clip_, copies_of, grad_norm
from softmoe_train.parallel.layout import ParallelConfig
from softmoe_train.parallel.moves import ExpertMoves
from softmoe_train.parallel.recompute import recompute
from softmoe_train.parallel.topology import Topology


class TorchEngine:
    """The `Engine` of plain PyTorch. Build it with `build_torch_engine`."""

    def __init__(
        self,
        module: ViT,
        optim: OptimConfig,
        average: AverageConfig | None,
        parallel: ParallelConfig,
        topology: Topology,
        loss: LossKind,
        global_batch: int,
        seed: int,
    ) -> None:
        self.module: nn.Module = module
        self.device = next(module.parameters()).device
        self.parallel = parallel
        self.topology = topology
        self.optim = optim
        self.clip_norm = optim.clip_norm
        self.objective = Objective(module.config, loss, global_batch, seed, self.device)
        self.parameters = dict(module.named_parameters())
        self.local = {name: local_values(p) for name, p in self.parameters.items()}
        self.reducer = GradReducer(self.parameters.values(), topology)
        self.moves = ExpertMoves(self.parameters, topology.size)
        self.copies = copies_of(list(self.parameters.values()), topology.size)
        shapes = {name: p.shape for name, p in self.parameters.items()}
        self.optimizer = build_optimizer(optim, self.local, shapes, DimSums(self.parameters))
        self.average = WeightAverage(average, self.local) if average is not None else None

    def forward_backward(self, batch: Batch, *, last: bool) -> Tensor:
        """Add the gradients of one micro-batch; they are summed over ranks under the backward of the last one.

        With `reduce_each_micro` sharded units sum theirs within the ranks of a copy after every one.
        Returns this rank's sum of losses over the global batch: the sum over ranks and micro-batches is the mean loss.
        """
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last or self.parallel.reduce_each_micro)
            self.module.set_requires_all_reduce(last)
        if last:
            self.reducer.arm()
        loss, objective = self.objective.of(self.module, batch)
        objective.backward()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the global batch by name, laid out as their parameters, and not yet clipped."""
        missing = [name for name, p in self.parameters.items() if p.grad is None]
        assert not missing, f"no gradient for {', '.join(missing)}"
        self.reducer.finish()
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    @torch.no_grad()
    def update(self, lr: float, *, moves: bool = False) -> GradStats:
        """Reduce, clip by the global norm, step. A norm or a loss that is not finite makes it a no-op, decided on the device."""
        gradients = self.gradients()
        norm = grad_norm(list(gradients.values()), self.copies, self.objective.minimised)
        skipped = (~norm.isfinite()).float()
        for name, local in self._bound().items():
            local.grad = local_values(gradients[name])
        clip_([local.grad for local in self.local.values() if local.grad is not None], norm, self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue] (what GradScaler sets)
        if moves:
            self.moves.before()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.zero_grad()
        stats = GradStats(norm, skipped, self.objective.told, self.moves.after() if moves else None)
        self.objective.forget()
        if self.average is not None:
            self.average.update(self.local, skipped)
        return stats

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module computes with the averaged weights; no training there. Needs averaging switched on."""
        assert self.average is not None
        self.average.swap(self._bound())
        self._forget_gathered()
        try:
            yield
        finally:
            self.average.swap(self._bound())  # bound anew: the first forward may be one of these
            self._forget_gathered()

    def state_dict(self) -> dict[str, Tensor]:
        """`model.<name>`, `optimizer.<key>.<name>`, `optimizer.updates`, and the same of `average`, each with its global shape."""
        tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            state = self.optimizer.state[self.local[name]]
            for key, lacks in state_layout(self.optim, name, p.shape).items():
                placed = laid_out_as(state[key], p) if lacks is None else laid_out_without(state[key], p, lacks)
                tensors[f"optimizer.{key}.{name}"] = placed
        if self.optim.kind != "sgd":
            tensors["optimizer.updates"] = self._steps()[0].reshape(1).clone()
        if self.average is not None:
            placed = {name: laid_out_as(self.average.values[name], p) for name, p in self.parameters.items()}
            tensors |= {f"average.{name}": value for name, value in placed.items()}
            tensors["average.updates"] = self.average.updates
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The tensors of `state_dict()` share our storage; only the count of updates is kept once per parameter.

        Without those of the average, it starts anew from the weights.
        """
        if self.optim.kind != "sgd":
            for step in self._steps():
                step.copy_(tensors["optimizer.updates"][0])
        if self.average is not None and "average.updates" not in tensors:
            self.average.restart(self._bound())

    def _bound(self) -> dict[str, Tensor]:
        """The local weights where they lie now: FSDP2 may move a shard to a padded buffer at the first forward."""
        for name, local in self.local.items():
            local.data = local_values(self.parameters[name])
        return self.local

    def _forget_gathered(self) -> None:
        # FSDP2 keeps its root gathered after a forward without a backward: the next would compute with weights of before.
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()

    def _steps(self) -> list[Tensor]:
        return [self.optimizer.state[local]["step"] for local in self.local.values()]


def build_torch_engine(
    model: ViT,
    *,
    optim: OptimConfig,
    average: AverageConfig | None,
    parallel: ParallelConfig,
    topology: Topology,
    compiled: bool,
    loss: LossKind,
    global_batch: int,
    seed: int,
    device: torch.device,
    materialise: Materialise = with_values,
) -> TorchEngine:
    """Shard experts, compile, recompute, shard the rest, materialise, optimizer: in that order, on a model of the
    meta device."""
    shard_experts(model, topology.ep, build_exchange(parallel, topology))
    if compiled:
        compile_blocks(model, whole=topology.experts is None and parallel.recompute != "moe")
    recompute(model, parallel.recompute)
    if topology.dense is not None:
        shard_fully(model, topology, model.dtype, prefetch=parallel.prefetch)
    materialise(model, device, seed)
    return TorchEngine(model, optim, average, parallel, topology, loss, global_batch, seed)
