"""This file owns the DeepSpeed engine: ZeRO 0, 1 and 2 through `deepspeed.initialize`, experts over `ep`.

DeepSpeed reduces the gradients, cuts the optimizer over the ranks and gathers the weights after its step. The norm, the clip and
the skip of a non-finite update are ours, as are names, shapes and checkpoints: its own count experts wrongly or lose them.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_process_group_ranks, get_world_size
from torch.distributed.tensor import DTensor

from softmoe_train.data.batch import Batch
from softmoe_train.dist import laid_out_as, local_values
from softmoe_train.engine.deepspeed_config import Decided, settings
from softmoe_train.engine.deepspeed_state import HeldState, PartitionedState, ReplicatedState
from softmoe_train.engine.objective import Objective
from softmoe_train.engine.protocol import GradStats
from softmoe_train.engine.weights import Materialise, with_values
from softmoe_train.model.loss import LossKind
from softmoe_train.model.vit import Predictions, ViT
from softmoe_train.optim.average import AverageConfig, WeightAverage
from softmoe_train.optim.build import OptimConfig, elementwise_optimizer, start_state, state_keys
from softmoe_train.parallel.compile import compile_blocks
from softmoe_train.parallel.exchange import build_exchange
from softmoe_train.parallel.experts import shard_experts
from softmoe_train.parallel.grads import clip_, grad_norm
from softmoe_train.parallel.moves import ExpertMoves
from softmoe_train.parallel.recompute import recompute
from softmoe_train.parallel.topology import Topology


class DeepSpeedEngine:
    """The `Engine` of DeepSpeed. Build it with `build_deepspeed_engine`.

    `wrapped` is what `deepspeed.initialize` made of `module`, `layouts` holds the global shape and placement of the experts.
    """

    def __init__(
        self,
        module: ViT,
        wrapped: Any,
        held: HeldState,
        layouts: dict[str, Tensor],
        optim: OptimConfig,
        average: AverageConfig | None,
        loss: LossKind,
        global_batch: int,
        seed: int,
    ) -> None:
        self.module: nn.Module = module
        self.device = next(module.parameters()).device
        self.wrapped = wrapped
        self.held = held
        self.layouts = layouts
        self.optim = optim
        self.clip_norm = optim.clip_norm
        self.objective = Objective(module.config, loss, global_batch, seed, self.device)
        self.local = {name: p.detach() for name, p in module.named_parameters()}
        self.parameters = self._placed(self.local)
        self.moves = ExpertMoves(self.parameters, get_world_size())
        self.average = WeightAverage(average, self.local) if average is not None else None

    def forward_backward(self, batch: Batch, *, last: bool) -> Tensor:
        """Add the gradients of one micro-batch; ZeRO 0 and 1 sum over ranks under the last one, ZeRO 2 under each.

        Returns this rank's sum of losses over the global batch: the sum over ranks and micro-batches is the mean loss.
        """
        self.wrapped.set_gradient_accumulation_boundary(is_boundary=last)
        loss, objective = self.objective.of(self.wrapped, batch)
        self.wrapped.backward(objective)
        return loss

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the global batch by name, laid out as their parameters, and not yet clipped (ZeRO 1, 2: copies)."""
        return self._placed(self.held.gradients())

    @torch.no_grad()
    def update(self, lr: float, *, moves: bool = False) -> GradStats:
        """Clip by the global norm, step, gather the weights. A norm or a loss that is not finite makes it a no-op, decided on the device."""
        parts, copies = self.held.gradient_parts()
        norm = grad_norm(parts, copies, self.objective.minimised)
        skipped = (~norm.isfinite()).float()
        clip_(parts, norm, self.clip_norm)
        optimizer = self.wrapped.basic_optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = skipped  # what GradScaler sets
        if moves:
            self.moves.before()
        self.wrapped.step()
        moved = self.moves.after() if moves else None
        stats = GradStats(norm.to(self.device), skipped.to(self.device), self.objective.told, moved)
        self.objective.forget()
        if self.average is not None:
            self.average.update(self.local, stats.skipped)
        return stats

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module computes with the averaged weights; no training there. Needs averaging switched on."""
        assert self.average is not None
        self.average.swap(self.local)  # ZeRO's own copies of the weights are not touched
        try:
            yield
        finally:
            self.average.swap(self.local)

    def state_dict(self) -> dict[str, Tensor]:
        """`model.<name>`, `optimizer.<key>.<name>`, `optimizer.updates`, and the same of `average`, each with its global shape, as the native engine's.

        Weights share our storage. Under ZeRO 1 and 2 moments are gathered copies: for AdamW twice the bytes of the dense weights
        and of this rank's experts, on its device, for as long as the caller keeps them; hand them to `load_state_dict`.
        """
        tensors = {f"model.{name}": p for name, p in self.parameters.items()}
        for key in state_keys(self.optim):
            tensors |= {f"optimizer.{key}.{name}": t for name, t in self._placed(self.held.moments(key)).items()}
        if self.optim.kind != "sgd":
            tensors["optimizer.updates"] = self.held.steps()[0].reshape(1).clone().to(self.device)
        if self.average is not None:
            tensors |= {f"average.{name}": t for name, t in self._placed(self.average.values).items()}
            tensors["average.updates"] = self.average.updates
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over what was read into the tensors of `state_dict()`: cut the moments, renew ZeRO's copies of the weights."""
        keys = state_keys(self.optim)
        self.held.load({key: {name: tensors[f"optimizer.{key}.{name}"] for name in self.local} for key in keys})
        if self.optim.kind != "sgd":
            for step in self.held.steps():
                step.copy_(tensors["optimizer.updates"][0])
        if self.average is not None and "average.updates" not in tensors:
            self.average.restart(self.local)

    def _placed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: laid_out_as(t, self.layouts[n]) if n in self.layouts else t for n, t in tensors.items()}


def build_deepspeed_engine(
    model: ViT,
    *,
    decided: Decided,
    average: AverageConfig | None,
    topology: Topology,
    compiled: bool,
    loss: LossKind,
    seed: int,
    device: torch.device,
    materialise: Materialise = with_values,
) -> DeepSpeedEngine:
    """Shard experts, compile, recompute, materialise, optimizer, ZeRO: in that order, on a model of the meta device."""
    shard_experts(model, topology.ep, build_exchange(decided.parallel, topology))
    if compiled:
        compile_blocks(model, whole=decided.parallel.recompute != "moe")
    recompute(model, decided.parallel.recompute)
    layouts = {name: p.detach() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    materialise(model, device, seed)
    _make_local(model, layouts)
    parameters = dict(model.named_parameters())
    optimizer = elementwise_optimizer(decided.optim, parameters)
    expert_group = f"ep_size_{topology.ep.size()}"
    _mark_experts(optimizer, [parameters[name] for name in layouts], expert_group)
    with _quiet_deepspeed(device) as deepspeed:
        whole = _with_experts(deepspeed, model, topology, expert_group) if layouts else model
        wrapped, *_ = deepspeed.initialize(
            args=SimpleNamespace(device_rank=device.index or 0),
            model=whole,
            optimizer=optimizer,
            config=settings(decided),
        )
    start_state(decided.optim, optimizer)
    if decided.engine.offload_optimizer:
        # It squares its own norm in float32: above 1.8e19 it would drop an update that ours makes, and not count it.
        wrapped.optimizer.scaled_global_norm = lambda norm_type=2: torch.zeros(())
    if decided.engine.zero_stage == 0:
        copies = [topology.expert_dp.size() if name in layouts else topology.size for name in parameters]
        held: HeldState = ReplicatedState(parameters, optimizer, copies)
    else:
        held = PartitionedState(parameters, wrapped.optimizer)
    return DeepSpeedEngine(model, wrapped, held, layouts, decided.optim, average, loss, decided.batch_size, seed)


def forget_groups() -> None:
    """Have DeepSpeed let go of the process groups of engines that are no more: it would use them in the next of this process."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups._release_process_group_references(group=None)


def _make_local(model: nn.Module, layouts: dict[str, Tensor]) -> None:
    """Replace experts on `ep` by plain parameters of this rank's part: ZeRO flattens what it is given."""
    for name in layouts:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner.register_parameter(leaf, nn.Parameter(local_values(getattr(owner, leaf))))


def _mark_experts(optimizer: torch.optim.Optimizer, experts: list[nn.Parameter], group_name: str) -> None:
    """Say of parameters and of optimizer groups, which hold either kind only, that ranks of `ep` do not share them."""
    for p in experts:
        p.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
        p.group_name = group_name  # pyright: ignore[reportAttributeAccessIssue]
    marked = {id(p) for p in experts}
    groups = []
    for group in optimizer.param_groups:
        groups.append({**group, "params": [p for p in group["params"] if id(p) not in marked]})
        on_ep = [p for p in group["params"] if id(p) in marked]
        groups.append({**group, "params": on_ep, "moe": True, "name": group_name})
    optimizer.param_groups[:] = [group for group in groups if group["params"]]


def _with_experts(deepspeed: Any, model: ViT, topology: Topology, group_name: str) -> nn.Module:
    """The model as a layer that DeepSpeed takes for one of its own with experts: it looks at nothing else."""

    class WithExperts(deepspeed.moe.layer.MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.model = model
            self.num_experts = model.config.moe.num_experts
            self.ep_size = topology.ep.size()
            self.expert_group_name = group_name
            self.num_local_experts = self.num_experts // self.ep_size

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            groups = deepspeed.utils.groups
            if group_name not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(self.ep_size, use_data_before_expert_parallel_=False)
            for theirs, ours in (
                (groups._get_expert_parallel_group(group_name), topology.ep),
                (groups._get_expert_data_parallel_group(group_name), topology.expert_dp),
            ):
                ranks = get_process_group_ranks(theirs), get_process_group_ranks(ours.get_group())
                assert ranks[0] == ranks[1], ranks

        def forward(self, images: Tensor, keys: Tensor | None = None) -> Predictions:
            return self.model(images, keys)

    return WithExperts()


@contextmanager
def _quiet_deepspeed(device: torch.device) -> Iterator[Any]:
    """DeepSpeed, imported here so that only runs that use it wait for it, on our process group and with little to say."""
    needed = {"DS_ACCELERATOR": device.type, "LOCAL_RANK": str(device.index or 0)}
    added = {key: value for key, value in needed.items() if key not in os.environ}
    logger = logging.getLogger("DeepSpeed")
    os.environ.update(added)
    try:
        import deepspeed
        import deepspeed.moe.layer

        if device.type == "cpu":
            # An empty table of what could be compiled here: else every start probes compilers and builds a kernel for inference.
            deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
        logger.setLevel(logging.ERROR)
        # It calls collectives by names that torch is about to change: nothing for a user to act on.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        yield deepspeed
    finally:
        logger.setLevel(logging.WARNING)  # its own
        for key in added:
            os.environ.pop(key, None)
