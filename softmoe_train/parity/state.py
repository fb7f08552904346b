"""This file owns where a proof starts: weights off their initial values, and batches made by arithmetic.

B images  C classes
"""

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from softmoe_train.data.batch import Batch, Cursor
from softmoe_train.dist import local_offsets, local_values
from softmoe_train.engine.protocol import Engine
from softmoe_train.model.init import InitRule, LocalPart, fill_part, normal
from softmoe_train.settings import RunConfig

MATRIX_NOISE = 0.02
VECTOR_NOISE = 0.1  # biases, norms
MIXED = 0.75  # the part of an image's own labels under mixup
ROUTER_SCALE = 1.7  # its start is 1, which would hide a scale that is not applied


def perturb_engine(engine: Engine, seed: int) -> None:
    """Move the weights of every rank's part, the same on every layout, and have the engine take them over."""
    tensors = engine.state_dict()
    perturb_({name: t for name, t in tensors.items() if name.startswith("model.")}, seed)
    # Without the averaged weights, which then start from these.
    engine.load_state_dict({name: t for name, t in tensors.items() if not name.startswith("average.")})


@torch.no_grad()
def perturb_(weights: Mapping[str, Tensor], seed: int) -> None:
    """Add noise by (seed, global name, expert) to weights named `model.<name>`, in place.

    A fresh head is zero and would hide most gradients; experts that start alike would hide a swap.
    """
    for name, weight in weights.items():
        values = local_values(weight)
        if name.endswith(".router.scale"):
            values.fill_(ROUTER_SCALE)
            continue
        experts = ".moe.experts." in name
        std = MATRIX_NOISE if weight.ndim > (2 if experts else 1) else VECTOR_NOISE
        noise = LocalPart(torch.empty_like(values), local_offsets(weight))
        rule = InitRule(normal(std), "independent" if experts else "none")
        fill_part(noise, tuple(weight.shape), rule, seed, f"parity/{name}")
        values.add_(noise.values)


def routing_tokens(config: RunConfig, layer: str, images: int) -> Tensor:
    """Normal tokens ("B T D") for the router of `layer`, by (seed, layer) alone."""
    generator = _generator(f"{config.seed}/parity/tokens/{layer}")
    return torch.randn(images, config.model.num_tokens, config.model.width, generator=generator)


def parity_batch(config: RunConfig, update: int, rows: range) -> Batch:
    """Images of random bytes with random labels, each by (seed, update, row) alone: no data is read.

    `rows` are of the global batch. Labels are class numbers, rows of 0 and 1 where `data.labels` is multi_hot, or rows of
    weights where `data.mixup` is on.
    """
    ids = [update * config.batch_size + row for row in rows]
    images, labels = zip(*(_sample(config, i) for i in ids), strict=True)
    return Batch(
        images=torch.stack(images),
        labels=torch.stack(labels),
        mask=torch.ones(len(ids), dtype=torch.bool),
        sample_ids=torch.tensor(ids),
        cursor=Cursor((update + 1) * config.batch_size),
        broken=(),
    )


def _sample(config: RunConfig, sample: int) -> tuple[Tensor, Tensor]:
    generator = _generator(f"{config.seed}/parity/{sample}")
    size, classes = config.model.image_size, config.model.num_classes
    image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, classes, (), generator=generator)
    if config.data.labels == "hard" and config.data.mixup is None:
        return image, label
    others = torch.randint(0, classes, (sample % 3 if config.data.labels == "multi_hot" else 0,), generator=generator)
    row = F.one_hot(torch.cat([label.reshape(1), others]), classes).amax(0).float()
    if config.data.mixup is None:
        return image, row
    mixed_in = F.one_hot(torch.randint(0, classes, (), generator=generator), classes)
    return image, MIXED * row + (1 - MIXED) * mixed_in


def _generator(key: str) -> Generator:
    return Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
