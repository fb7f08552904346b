"""This file owns the count of a model's FLOPs: of the model itself, run on shapes, without its memory."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import ViT


def forward_flops(config: ModelConfig) -> int:
    """FLOPs of the matrix products of one image's forward, two for each multiply-add."""
    return _counted(config, backward=False)


def training_flops(config: ModelConfig) -> int:
    """FLOPs of the matrix products of one image's forward and backward; what recompute repeats is not counted."""
    return _counted(config, backward=True)


def _counted(config: ModelConfig, *, backward: bool) -> int:
    images, side = config.group_images, config.image_size
    # As plain products: fused attention computes some again in backward, which are no FLOPs of the model.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode():
        model, pictures = ViT(config), torch.empty(images, 3, side, side, dtype=torch.uint8)
        with plain, torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
            logits = model(pictures).logits
            if backward:
                logits.sum().backward()
    return counter.get_total_flops() // images
