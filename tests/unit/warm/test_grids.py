"""Position embeddings follow scipy's zoom, patch kernels FlexiViT's promise."""

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from softmoe_train.warm.grids import resample_patch, resample_position


@pytest.mark.parametrize(("old", "new"), [(14, 24), (7, 3), (1, 3), (4, 1), (5, 5)])
def test_position_embeddings_are_resampled_as_the_paper_s_zoom(old: int, new: int) -> None:
    position = torch.randn(old * old, 6, dtype=torch.float64)
    zoomed = ndimage.zoom(position.view(old, old, 6).numpy(), (new / old, new / old, 1), order=1)
    torch.testing.assert_close(
        resample_position(position, new * new), torch.from_numpy(zoomed).view(-1, 6), rtol=0, atol=1e-14
    )


def test_a_kernel_for_larger_patches_answers_an_enlarged_patch_as_the_old_one_did() -> None:
    kernel, patches = torch.randn(5, 48, dtype=torch.float64), torch.randn(7, 3, 4, 4, dtype=torch.float64)
    larger = F.interpolate(patches, (7, 7), mode="bilinear", align_corners=False)
    answers = larger.flatten(1) @ resample_patch(kernel, 7).T
    torch.testing.assert_close(answers, patches.flatten(1) @ kernel.T, rtol=0, atol=1e-12)


def test_a_kernel_for_smaller_patches_is_the_closest_over_white_noise() -> None:
    kernel = torch.randn(1, 48, dtype=torch.float64)
    pixels = torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    shrink = F.interpolate(pixels, (3, 3), mode="bilinear", align_corners=False, antialias=True).view(16, 9)
    best = torch.linalg.lstsq(shrink, kernel.view(3, 16).T).solution.T.reshape(1, 27)
    torch.testing.assert_close(resample_patch(kernel, 3), best, rtol=0, atol=1e-12)
