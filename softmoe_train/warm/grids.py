"""This file owns another resolution or patch size: position embeddings and patch kernels resampled, in float64.

T tokens  D width  P patch size  Q the patch size to come
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHANNELS = 3


def side_of(num_tokens: int) -> int | None:
    """The side of a square grid of so many tokens; None where it is not square."""
    side = math.isqrt(num_tokens)
    return side if side * side == num_tokens else None


def resample_position(position: Float[Tensor, "T D"], num_tokens: int) -> Float[Tensor, "T2 D"]:
    """Position embeddings on another square grid, by linear interpolation between corner tokens that stay where they are.

    The paper's `vit_zoom`: scipy.ndimage.zoom of order 1 (paper.md 6.2).
    """
    old, new = side_of(len(position)), side_of(num_tokens)
    assert old is not None and new is not None, (len(position), num_tokens)
    weights = _linear_weights(old, new)
    grid = position.double().view(old, old, -1)
    return torch.einsum("ya,xb,abd->yxd", weights, weights, grid).reshape(num_tokens, -1).to(position.dtype)


def _linear_weights(old: int, new: int) -> Float[Tensor, "N O"]:
    """How much of each old place a new one takes, first and last places alike."""
    at = torch.arange(new, dtype=torch.float64) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    below = at.floor().clamp(max=max(old - 2, 0))
    share = at - below
    weights = torch.zeros(new, old, dtype=torch.float64)
    rows = torch.arange(new)
    weights[rows, below.long()] += 1 - share
    weights[rows, (below.long() + 1).clamp(max=old - 1)] += share
    return weights


def resample_patch(kernel: Float[Tensor, "D 3PP"], patch_size: int) -> Float[Tensor, "D 3QQ"]:
    """A patch embedding for patches of another size: FlexiViT's PI-resize (arXiv 2212.08013, section 3.4).

    Towards larger patches the answer to a patch that is enlarged (bilinear) is exactly the old one; towards smaller ones it is the
    closest in the mean square over patches of white noise.
    """
    old = math.isqrt(kernel.shape[1] // CHANNELS)
    pixels = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    resize = F.interpolate(pixels, (patch_size, patch_size), mode="bilinear", align_corners=False, antialias=True)
    back = torch.linalg.pinv(
        resize.view(old * old, -1)
    )  # (QQ, PP): of the map that takes a row of old pixels to new ones
    flat = kernel.double().view(len(kernel), CHANNELS, old * old)
    return torch.einsum("dcp,qp->dcq", flat, back).reshape(len(kernel), -1).to(kernel.dtype)
