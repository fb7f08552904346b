from pathlib import Path

import pytest

from softmoe_train.bench.settings import LayerSettings, StepSettings
from softmoe_train.config import compose_own, split_overrides
from softmoe_train.settings import RunConfig

LAYER = "bench_layer.yaml"


def layer(*overrides: str) -> LayerSettings:
    settings, problems = compose_own(LayerSettings, LAYER, list(overrides))
    assert settings is not None and not problems
    return settings


def test_a_grid_has_every_number_of_experts_with_every_number_of_images() -> None:
    shapes = layer("experts=4,16", "total_slots=32", "images=2,3").shapes()
    assert [(s.experts, s.slots, s.images) for s in shapes] == [(4, 8, 2), (16, 2, 2), (4, 8, 3), (16, 2, 3)]
    assert [(s.experts, s.slots) for s in layer("cases=128x1,1024x2", "images=1").shapes()] == [(128, 1), (1024, 2)]
    assert [(s.experts, s.slots) for s in layer("images=32").shapes()] == [(128, 1), (32, 4), (16, 8)], "S/16"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experts=3", "experts=3 does not divide total_slots=128; use divisors"),
        ("cases=128-1", "cases=128-1 is not experts x slots; write it as 128x1"),
        ("cases=0x1", "cases=0x1 is not experts x slots"),
        ("imags=3", "imags=3: there is no key imags; did you mean images?"),
        ("dtype=float16", "dtype.0='float16': input should be 'float32' or 'bfloat16'"),
        ("rounds=0", "rounds=0: input should be greater than or equal to 1"),
        ("out=result.txt", "out=result.txt is not a .json file; end it in .json"),
        ("images=[]", "images=[]: list should have at least 1 item"),
        ("picture=/nowhere/a.png", "/nowhere is not a folder that we may write to"),
        ("width", "width: not an override; write key=value"),
    ],
)
def test_a_wrong_key_is_told_in_plain_words(override: str, said: str) -> None:
    _, problems = compose_own(LayerSettings, LAYER, [override, "tokens=0"])
    told = "\n".join(problems)
    assert said in told
    assert "tokens=0: input should be greater than or equal to 1" in told, "with all other mistakes"


def test_own_keys_are_told_from_those_of_a_run() -> None:
    overrides = [
        "rounds=3",
        "recipe=debug",
        "model.moe.num_experts=4",
        "batchs=made",
        "seed=1",
        "parallel.expert_axis=2",
    ]
    own, others = split_overrides(StepSettings, RunConfig, overrides)
    assert own == ["rounds=3", "batchs=made"]
    assert others == ["recipe=debug", "model.moe.num_experts=4", "seed=1", "parallel.expert_axis=2"]


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    (tmp_path / "layer.json").mkdir()
    _, problems = compose_own(LayerSettings, LAYER, [f"out={tmp_path}/layer.json"])
    assert problems == [f"out={tmp_path}/layer.json is a folder; name a file"]
