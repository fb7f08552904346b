"""This file owns the small model that distributed tests share, its perturbed state, and an independent reference of a step."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from softmoe_train.config import config_folder, load_yaml
from softmoe_train.data.batch import Batch, Cursor
from softmoe_train.dist import local_offsets, local_values
from softmoe_train.engine.torch_engine import TorchEngine, build_torch_engine
from softmoe_train.model.init import initialize
from softmoe_train.model.loss import LossKind
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import ViT, build_model
from softmoe_train.optim.average import AverageConfig
from softmoe_train.optim.build import OptimConfig
from softmoe_train.optim.groups import DecayConfig
from softmoe_train.parallel.layout import ParallelConfig
from softmoe_train.parallel.topology import Topology
from tests.models import moe_config

SEED = 3
GLOBAL_BATCH = 16
CLIP = 0.05  # far below the norm of the small model, so that the clip matters
LR = 10.0  # large, so that every weight moves far beyond its own rounding
DECAY = DecayConfig(head=0.3, kernels=0.03, router_scale=0.03)
UNUSED = dict.fromkeys(["beta1", "beta2", "beta2_decay", "eps", "min_dim_to_factor", "momentum", "layer_decay"])
SGD = OptimConfig(**{**UNUSED, "kind": "sgd", "momentum": 0.0, "clip_norm": CLIP, "decay": DECAY, "frozen": []})
ADAMW = SGD.model_copy(update={"kind": "adamw", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum": None})
# A threshold that factors the matrices of the small model, and the router's E x S if it forgot that E counts experts.
ADAFACTOR = ADAMW.model_copy(
    update={"kind": "adafactor", "beta2_decay": 0.8, "eps": 1e-30, "min_dim_to_factor": 3},
)


def model_config(**changes: Any) -> ModelConfig:
    """8 x 8 pixels, 16 tokens, three blocks, the last two with 8 experts of 3 slots."""
    moe = moe_config(blocks="last 2", router="soft", num_experts=8, slots_per_expert=3, expert_init="independent")
    values = {
        "image_size": 8, "patch_size": 2, "width": 24, "depth": 3, "mlp_dim": 40, "num_heads": 4, "num_classes": 10,
        "position_std": 0.02, "moe": moe,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def parallel_config(expert_axis: int | str, sharding: str = "replicated", **changes: Any) -> ParallelConfig:
    """The layout of conf/parallel/default.yaml with these keys changed."""
    values = load_yaml(config_folder() / "parallel" / "default.yaml")
    return ParallelConfig(**{**values, "expert_axis": expert_axis, "sharding": sharding, **changes})


def build(
    rank: int, world: int, expert_axis: int, sharding: str, *, optim: OptimConfig = SGD,
    dtype: torch.dtype = torch.float32, loss: LossKind = "sigmoid", expert_init: str = "independent", perturbed: bool = True,
    compiled: bool = False, num_experts: int = 8, expert_dropout: float = 0.0, router: str = "soft", group_images: int = 1,
    average: AverageConfig | None = None, **layout: Any,
) -> TorchEngine:  # fmt: skip
    """The engine of one rank, in the perturbed state unless asked otherwise; `layout` changes ParallelConfig."""
    device = torch.device("cpu")
    parallel = parallel_config(expert_axis, sharding, **layout)
    moe = model_config().moe
    changes = {
        "expert_init": expert_init,
        "num_experts": num_experts,
        "expert_dropout": expert_dropout,
        "router": router,
    }
    sparse = moe.sparse.model_copy(update={"group_images": group_images})
    moe = moe.model_copy(update={**changes, "sparse": sparse})
    config = model_config(moe=moe)
    topology = Topology.build(parallel, num_experts=config.moe.num_experts, device=device, size=world, local_size=world)
    engine = build_torch_engine(
        build_model(config, dtype), optim=optim, average=average, parallel=parallel, topology=topology, compiled=compiled,
        loss=loss, global_batch=GLOBAL_BATCH, seed=SEED, device=device,
    )  # fmt: skip
    if perturbed:
        perturb(engine.module)
    return engine


def perturb(model: nn.Module) -> None:
    """Move every parameter off its start: a fresh head is zero and would hide most gradients, alike experts a swap."""
    perturb_tensors(dict(model.named_parameters()))


@torch.no_grad()
def perturb_tensors(parameters: Mapping[str, Tensor]) -> None:
    """The same, of parameters by name, whole or sharded."""
    for name, p in parameters.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(p.shape, generator=generator) * (0.1 if p.ndim == 1 or ".b" in name else 0.02)
        window = tuple(slice(o, o + n) for o, n in zip(local_offsets(p), local_values(p).shape, strict=True))
        local_values(p).add_(noise[window])
        if name.endswith("scale"):
            local_values(p).fill_(1.7)


def global_batch(step: int = 0) -> Batch:
    """A batch of bytes and labels that depends on the step alone."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 256, (GLOBAL_BATCH, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator)
    ids = torch.arange(GLOBAL_BATCH) + step * GLOBAL_BATCH
    return Batch(images, labels, torch.ones(GLOBAL_BATCH, dtype=torch.bool), ids, Cursor((step + 1) * GLOBAL_BATCH), ())


def multi_hot(batch: Batch) -> Batch:
    """The batch with one to three labels an image."""
    rows = torch.zeros(len(batch), 10)
    for i, label in enumerate(batch.labels.tolist()):
        rows[i, [(label + 3 * k) % 10 for k in range(1 + label % 3)]] = 1
    return replace(batch, labels=rows)


def share(rank: int, world: int, micro_batches: int = 1, step: int = 0) -> list[Batch]:
    """This rank's micro-batches of the global batch."""
    return global_batch(step).split(world)[rank].split(micro_batches)


def reference(loss_kind: LossKind = "sigmoid", num_experts: int = 8) -> dict[str, Any]:
    """One SGD step in float64 by plain autograd, with no engine, mesh or collective: the truth for every layout.

    The sigmoid loss has a label an image, softmax has several.
    """
    moe = model_config().moe.model_copy(update={"num_experts": num_experts})
    model: ViT = build_model(model_config(moe=moe), torch.float64)
    model.to_empty(device="cpu")
    initialize(model, SEED)
    perturb(model)
    model.double()
    batch = global_batch()
    logits = model(batch.images).logits
    if loss_kind == "sigmoid":
        targets = torch.nn.functional.one_hot(batch.labels, 10).double()
        loss = (torch.nn.functional.softplus(logits) - targets * logits).sum() / GLOBAL_BATCH
    else:
        targets = multi_hot(batch).labels.double()
        log_p = logits - logits.exp().sum(-1, keepdim=True).log()
        loss = -((targets * log_p).sum(-1) / targets.sum(-1)).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        decay = 0.3 if name == "head.weight" else 0.03 if decays(name) else 0.0
        weights[name] = p.detach() - LR * (gradients[name] * min(1.0, CLIP / norm.item()) + decay * p.detach())
    return {
        "logits": logits.detach(), "loss": loss.item(), "norm": norm.item(), "gradients": gradients, "weights": weights,
        "weights_before": before,
    }  # fmt: skip


def decays(name: str) -> bool:
    """The paper's list, written again by hand: matrices of the patch embedding, attention, MLPs and experts; router scale."""
    return name.endswith(
        ("qkv.weight", "out.weight", "fc1.weight", "fc2.weight", ".w1", ".w2", ".wg", "scale", "embed.weight")
    )
