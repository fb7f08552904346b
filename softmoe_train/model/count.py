"""This file owns the count of a model's FLOPs: of the model itself, run on shapes, without its memory."""

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import ViT


class ModelFlops(NamedTuple):
    """FLOPs of the matrix products of one image, two for each multiply-add."""

    forward: int
    training: int  # forward and backward; what recompute repeats is not counted


def model_flops(config: ModelConfig) -> ModelFlops:
    """Count them in the real forward and backward."""
    images, side = config.group_images, config.image_size
    # As plain products: fused attention computes some again in backward, which are no FLOPs of the model.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(), plain, torch.enable_grad(), FlopCounterMode(display=False) as counter:
        logits = ViT(config)(torch.empty(images, 3, side, side, dtype=torch.uint8)).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    return ModelFlops(forward // images, counter.get_total_flops() // images)
