"""Numbers derived on the device against the same arithmetic in numpy, and against what their distribution should be."""

import math

import numpy as np
import torch

from softmoe_train.data import keyed
from softmoe_train.model.keyed import image_keys, keys_at, normal, uniform

IDS = torch.tensor([0, 1, 2, 4096, 2**40])


def test_numbers_are_those_of_splitmix_on_unsigned_integers() -> None:
    keys = image_keys(7, IDS)
    wanted = [keyed.mix(np.asarray([7 + 0x9E3779B97F4A7C15], np.uint64))[0] ^ np.uint64(i) for i in IDS.tolist()]
    wanted = keyed.mix(np.asarray(wanted, np.uint64))
    assert keys.numpy().view(np.uint64).tolist() == wanted.tolist()
    counted = wanted[:, None] + np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    numbers = ((keyed.mix(counted) >> np.uint64(41)).astype(np.float64) + 0.5) * 2.0**-23
    assert uniform(keys, (2, 3)).shape == (5, 2, 3)
    np.testing.assert_array_equal(uniform(keys, (2, 3)).flatten(1).numpy(), numbers.astype(np.float32))


def test_samples_seeds_and_places_have_numbers_of_their_own() -> None:
    ids = torch.arange(1000)
    keys = torch.cat(
        [image_keys(0, ids), image_keys(1, ids), keys_at(image_keys(0, ids), "a"), keys_at(image_keys(0, ids), "b")]
    )
    assert keys.unique().numel() == 4000
    numbers = uniform(keys, (8,)).double()
    assert ((numbers > 0) & (numbers < 1)).all()
    assert abs(numbers.mean().item() - 0.5) < 5 * math.sqrt(1 / 12 / numbers.numel())
    rows = numbers - 0.5
    assert (rows.T @ rows / len(rows)).fill_diagonal_(0).abs().max() < 5 / 12 / math.sqrt(len(rows))  # no pair of draws


def test_normal_numbers_have_the_moments_of_a_normal() -> None:
    x = normal(image_keys(3, torch.arange(20000)), (5,)).double()
    n = x.numel()
    assert abs(x.mean().item()) < 5 / math.sqrt(n)
    assert abs(x.square().mean().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs(x.pow(4).mean().item() - 3) < 5 * math.sqrt(96 / n)
