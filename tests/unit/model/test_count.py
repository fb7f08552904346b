from softmoe_train.model.count import forward_flops, training_flops
from tests.ranks.small import model_config


def test_the_flops_of_a_model_are_those_of_its_products() -> None:
    T, D, H, E, S, C, P = 16, 24, 40, 8, 3, 10, 12
    attention = 2 * T * D * 4 * D + 2 * 2 * T * T * D
    dense, moe = 4 * T * D * H, 2 * E * S * (3 * T * D + 2 * D * H)
    patches = 2 * T * P * D
    forward = patches + 3 * attention + dense + 2 * moe + 2 * D * C
    assert forward_flops(model_config()) == forward
    assert training_flops(model_config()) == 3 * forward - patches, "nobody asks for the gradient of the pixels"


def test_counting_takes_no_memory_for_weights() -> None:
    huge = model_config(width=24 * 1024, mlp_dim=100_000)  # 300 GB
    assert forward_flops(huge) > 5e11
