"""This file owns the reference of a proof: the plain model in one process, without engine, mesh, collective or our MoE layer."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from softmoe_train.model.init import initialize
from softmoe_train.model.keyed import image_keys
from softmoe_train.model.loss import classification_loss
from softmoe_train.model.moe import MoE
from softmoe_train.model.routing import MEASURES
from softmoe_train.model.sparse import Decisions
from softmoe_train.model.vit import build_model
from softmoe_train.optim.adafactor import alone
from softmoe_train.optim.build import build_optimizer, freeze_, set_rate, state_layout
from softmoe_train.parity.plain_layer import Followed, plain_layer
from softmoe_train.parity.state import parity_batch, perturb_
from softmoe_train.run import DTYPES
from softmoe_train.settings import RunConfig

MOVE = 0.01  # of the weights' size, by an update: far above the rounding of float32, far below what a step breaks


class Reference:
    """The same weights and batches under plain autograd, an independent norm and clip, and the optimizer over whole tensors.

    MoE layers are `plain_layer`s, with nothing of their own but the weights.

    `dtype` is what activations are computed in; float64 holds weights, gradients and moments in float64 too.
    """

    def __init__(self, config: RunConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.model = build_model(config.model, dtype)
        self.model.to_empty(device=device)
        initialize(self.model, config.seed)
        perturb_({f"model.{name}": p for name, p in self.model.named_parameters()}, config.seed)
        if dtype == torch.float64:
            self.model.double()
        wire = config.parallel.exchange_dtype and DTYPES[config.parallel.exchange_dtype]
        self.followed = {name: Followed() for name, m in self.model.named_modules() if isinstance(m, MoE)}
        for name, followed in self.followed.items():
            layer = self.model.get_submodule(name)
            assert isinstance(layer, MoE)
            layer.forward = partial(plain_layer, layer, wire, followed)  # pyright: ignore[reportAttributeAccessIssue]
        freeze_(self.model, config.optim)
        self.parameters = dict(self.model.named_parameters())
        self.values = {name: p.detach() for name, p in self.parameters.items()}  # sharing storage, for the optimizer
        self.updates = 0
        self.average = {name: w.clone() for name, w in self.values.items()} if config.average is not None else {}
        shapes = {name: p.shape for name, p in self.parameters.items()}
        self.optimizer = build_optimizer(config.optim, self.values, shapes, alone)

    def clip_at(self, limit: float) -> None:
        """Clip the updates that come at `limit`."""
        self.config = self.config.model_copy(
            update={"optim": self.config.optim.model_copy(update={"clip_norm": limit})}
        )

    def adopt(self, name: str, tensor: Tensor) -> None:
        """Go on from another's value of one tensor, under the name that engines give it."""
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            key, _, rest = rest.partition(".")
            own = self.optimizer.state[self.values[rest]][key]
        else:
            own = {"model": self.values, "average": self.average}[kind][rest]
        own.copy_(tensor)

    def forward_backward(
        self, update: int, size: int, decided: list[dict[str, Decisions]], say: Callable[[str], None]
    ) -> tuple[float, list[Tensor]]:
        """Gradients of a whole global batch in parts of `size` images; returns the mean loss and each part's logits.

        `decided` are the layout's decisions by part and MoE layer, of sparse routers.
        """
        self.model.zero_grad()
        total, logits = 0.0, []
        for part, start in enumerate(range(0, self.config.batch_size, size)):
            for name, one in decided[part].items():
                self.followed[name].decided = one
            batch = parity_batch(self.config, update, range(start, start + size)).to(self.device)
            out, told = self.model(batch.images, image_keys(self.config.seed, batch.sample_ids))
            loss = classification_loss(out, batch.labels, self.config.loss).sum() / self.config.batch_size
            groups = self.config.batch_size // self.config.model.group_images
            auxiliary = 0.0 if told is None else told[:, MEASURES.index("auxiliary_loss")].sum() / groups
            (loss + auxiliary).backward()
            total += loss.item()
            logits.append(out.detach())
            say(f"one process, images {start + size} of {self.config.batch_size}")
        return total, logits

    def decisions_apart(self) -> dict[str, float]:
        """By MoE layer, how far the layout's decisions were from what one process finds, since this was last asked."""
        apart = {f"{name}.router": followed.apart for name, followed in self.followed.items() if followed.decided}
        for followed in self.followed.values():
            followed.apart = 0.0
        return apart

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last global batch, by name."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def norm(self) -> float:
        """The 2-norm of the whole gradient, before the clip."""
        return torch.stack([g.double().square().sum() for g in self.gradients().values()]).sum().sqrt().item()

    def rate(self) -> float:
        """A learning rate at which an update moves the weights by about `MOVE` of their size.

        The step of Adam and its kin is about the rate itself in every weight, that of SGD the rate times the gradient.
        """
        size = torch.stack([w.double().square().sum() for w in self.values.values()]).sum().sqrt().item()
        if self.config.optim.kind == "sgd":
            return MOVE * size / min(self.norm(), self.config.optim.clip_norm or math.inf)
        return MOVE * size / math.sqrt(sum(w.numel() for w in self.values.values()))

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Clip by the global norm as optax does (no epsilon), and step. The gradients stay, clipped."""
        norm, limit = self.norm(), self.config.optim.clip_norm
        for name, gradient in self.gradients().items():
            if limit is not None and norm > limit:
                gradient.mul_(limit / norm)
            self.values[name].grad = gradient
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.updates += 1
        if self.config.average is not None:
            keep, t = self.config.average.decay, self.updates
            keep = min(keep, (1 + t) / (10 + t)) if self.config.average.warmup else keep
            for name, average in self.average.items():
                average.mul_(keep).add_(self.values[name], alpha=1 - keep)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state, and the counts of updates, under the names that engines give them."""
        states = self.optimizer.state
        named = {
            f"optimizer.{key}.{name}": states[values][key]
            for name, values in self.values.items()
            for key in state_layout(self.config.optim, name, values.shape)
        }
        if self.config.optim.kind != "sgd":
            named["optimizer.updates"] = next(iter(states.values()))["step"].reshape(1)
        if self.config.average is not None:
            named["average.updates"] = torch.tensor([self.updates])
        return named
