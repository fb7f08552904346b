"""A warm start says that its result computes something else exactly where it does, in float64 over a table of surgeries."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import ViT
from softmoe_train.warm.mixture import kept_differences
from tests.ranks.small import global_batch
from tests.unit.warm.bare import as_run, model_of, small, warmed, wide

SAME = 1e-9  # float64; logits are about 0.3
ALIKE = "stay alike"  # said of copies, whatever they compute

SOFT: dict[str, Any] = {"router": "soft"}
UNIFORM = {"soft": {"dispatch": "uniform", "combine": "uniform"}}


def choice(top_k: int, factor: float = 1.0, **more: Any) -> dict[str, Any]:
    tokens_choice = {"top_k": top_k, "batch_priority": more.pop("priority", True)}
    return {"router": "tokens_choice", "tokens_choice": tokens_choice, "sparse": {"capacity_factor": factor, **more}}


def experts_choice(factor: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"router": "experts_choice", "sparse": {"capacity_factor": factor, **more}}


def identity(num_experts: int) -> dict[str, Any]:
    return {"router": "identity", "num_experts": num_experts, "slots_per_expert": 16 // num_experts}


DENSE: dict[str, Any] = {"blocks": []}
# From, to, and a word of what is said; "" where nothing may be.
TABLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (DENSE, DENSE, ""),
    (DENSE, SOFT, "slots are means of tokens"),
    (DENSE, SOFT | {"num_experts": 1}, "slots are means of tokens"),
    (DENSE, identity(8), ""),
    (DENSE, choice(1), "top_k = E"),
    (DENSE, choice(4), ""),
    (DENSE, choice(4, 0.5), "top_k = E"),
    (DENSE, choice(1) | {"num_experts": 1}, ""),
    (DENSE, experts_choice(), "capacity_factor E or more"),
    (DENSE, experts_choice(4.0), ""),
    (SOFT, SOFT, ""),
    (SOFT, SOFT | {"blocks": "last 3"}, "dense MLPs (blocks.0) became experts"),
    (SOFT, SOFT | {"num_experts": 12, "slots_per_expert": 4}, ""),
    (SOFT, SOFT | {"num_experts": 6}, "num_experts: 4 there, 6 here, no whole multiple"),
    (SOFT, SOFT | {"num_experts": 2}, "experts after the first 2 are left out"),
    (SOFT, SOFT | {"slots_per_expert": 3}, "slots_per_expert: 2 there, 3 here, no whole multiple"),
    (SOFT, SOFT | {"slots_per_expert": 1}, "slots after the first 1 are left out"),
    (SOFT, SOFT | {"num_experts": 8, "slots_per_expert": 1}, "slots after the first 1 are left out"),
    (SOFT, SOFT | {"expert_dropout": 0.5, "expert_init": "identical"}, ""),
    (SOFT, SOFT | {"sparse": {"group_images": 4}}, ""),
    (SOFT, SOFT | {"soft": {"normalize": False}}, "model.moe.soft.normalize: True there, False here"),
    (SOFT, SOFT | {"soft": {"scale": False}}, "model.moe.soft.scale: True there, False here"),
    (SOFT | {"soft": {"scale": False}}, SOFT, ""),
    (SOFT, SOFT | {"soft": {"combine": "separate"}}, "model.moe.soft.combine: learned there, separate here"),
    (SOFT, SOFT | {"soft": {"combine": "separate"}}, "a router starts fresh in the place of one that was trained"),
    (SOFT, SOFT | {"soft": {"combine": "uniform"}}, "model.moe.soft.combine"),
    (SOFT | {"soft": {"combine": "uniform"}}, SOFT, "model.moe.soft.combine"),
    (SOFT, SOFT | {"soft": {"dispatch": "uniform"}}, "model.moe.soft.dispatch"),
    (SOFT | UNIFORM, SOFT | UNIFORM | {"num_experts": 8, "slots_per_expert": 3}, ""),
    (SOFT | UNIFORM, SOFT | {"soft": UNIFORM["soft"] | {"normalize": False, "scale": False}}, ""),
    (SOFT | UNIFORM, SOFT | UNIFORM | {"num_experts": 6}, "no whole multiple"),
    (SOFT, experts_choice(), "trained under model.moe.router=soft, and it is experts_choice here"),
    (SOFT, choice(1), "a router starts fresh"),
    (SOFT, identity(4), "trained under model.moe.router=soft, and it is identity here"),
    (identity(4), SOFT, "a router starts fresh"),
    (identity(4), identity(4), ""),
    (identity(4), identity(8), "tokens go to other experts"),
    (identity(1), identity(8), ""),
    (identity(1), choice(4), ""),
    (identity(1), SOFT, "slots are means of tokens"),
    (choice(1), choice(1), ""),
    (choice(1) | {"num_experts": 2}, choice(1), "the 2 copies of an expert divide its gate"),
    (choice(1) | {"num_experts": 2}, choice(2), ""),
    (choice(2), choice(6) | {"num_experts": 12}, ""),
    (choice(1), choice(1) | {"num_experts": 2}, "experts after the first 2 are left out"),
    (choice(1), choice(1) | {"num_experts": 6}, "no whole multiple"),
    (choice(1), choice(2), "model.moe.tokens_choice.top_k: 1 there, 2 here"),
    (choice(1), choice(1, 0.5), "model.moe.sparse.capacity_factor: 1.0 there, 0.5 here"),
    (choice(1, 0.5), choice(1, 0.5, priority=False), "model.moe.tokens_choice.batch_priority"),
    (choice(1, 4.0), choice(1, 4.0, priority=False, group_images=2), ""),
    (choice(1), choice(1, noise_std=0.5), ""),
    (choice(1), choice(1, group_images=4), "model.moe.sparse.group_images: 1 there, 4 here"),
    (choice(1, 0.6), choice(1, 0.6, capacity_rounding="multiple_of_4"), "model.moe.sparse.capacity_rounding"),
    (choice(1), experts_choice(), "trained under model.moe.router=tokens_choice"),
    (choice(4), experts_choice(4.0), ""),
    (choice(4), experts_choice(8.0) | {"num_experts": 8}, ""),
    (experts_choice(), experts_choice() | {"num_experts": 8}, "the 2 copies of an expert divide its gate"),
    (experts_choice(), experts_choice(2.0) | {"num_experts": 8}, ""),
    (experts_choice(4.0), experts_choice(6.0) | {"num_experts": 6}, "no whole multiple"),
    (experts_choice(), experts_choice(2.0), "model.moe.sparse.capacity_factor"),
    (experts_choice(), SOFT, "a router starts fresh"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Of each source in the table its run and its logits."""
    made: dict[str, tuple[Path, Tensor]] = {}
    for i, (there, _, _) in enumerate(TABLE):
        if str(there) not in made:
            model = model_of(small(**there))
            spread(model)
            made[str(there)] = as_run(tmp_path_factory.mktemp(f"source_{i}"), model), logits(model)
    return made


def spread(model: ViT) -> None:
    """Tokens and routers as far apart as training makes them, so that no two gates are nearly equal."""
    for name, p in model.named_parameters():
        if name.endswith((".phi", ".gate", "position")):
            p.mul_(5)


def logits(model: ViT) -> Tensor:
    return wide(model)(global_batch().images.double() / 127.5 - 1).logits


def said(differences: list[str]) -> list[str]:
    return [one for one in differences if ALIKE not in one]


@pytest.mark.parametrize(("there", "here", "word"), TABLE)
def test_a_change_is_said_where_logits_change_and_nowhere_else(
    runs: dict[str, tuple[Path, Tensor]], there: dict[str, Any], here: dict[str, Any], word: str
) -> None:
    run, before = runs[str(there)]
    after, told = warmed(small(**here), run)
    change = (logits(after) - before).abs().max().item()
    differences = said(told.fit.differences)
    assert (change < SAME) == (not differences), (change, differences)
    assert any(word in one for one in differences) if word else not differences, differences


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"image_size": 12}, "position is resampled from a grid of 4 x 4 to 6 x 6"),
        ({"image_size": 16, "patch_size": 4}, "patch_embed.weight is resampled from patches of 2 to 4 pixels"),
        ({"num_classes": 7}, "head.weight (the source has 10 classes, this model 7)"),
    ],
)
def test_other_images_and_a_fresh_head_are_said(
    runs: dict[str, tuple[Path, Tensor]], changes: dict[str, int], word: str
) -> None:
    _, told = warmed(small(**SOFT).model_copy(update=changes), runs[str(SOFT)][0])
    (only,) = told.fit.differences
    assert word in only


def test_noise_is_said_since_copies_are_no_longer_what_they_are_of(runs: dict[str, tuple[Path, Tensor]]) -> None:
    run, before = runs[str(DENSE)]
    after, told = warmed(small(**identity(8)), run, noise=0.01)
    assert (logits(after) - before).abs().max() > SAME
    (only,) = told.fit.differences
    assert only.startswith("warm.noise=0.01 moves the copies away from what they are of (blocks.1.moe.experts.w1;")


def test_a_setting_that_a_source_does_not_tell_is_said_and_one_that_cannot_be_read_too() -> None:
    here: ModelConfig = small(**SOFT)
    model = json.loads(here.model_dump_json())
    assert kept_differences(model, here, []) == []
    del model["moe"]["soft"]["normalize"]
    (only,) = kept_differences(model, here, [])
    assert "model.moe.soft.normalize: not told there, True here" in only
    model["moe"]["router"] = "of another time"
    (only,) = kept_differences(model, here, [])
    assert "cannot be read" in only


def test_copies_that_training_tells_apart_are_not_said_to_stay_alike(runs: dict[str, tuple[Path, Tensor]]) -> None:
    run = runs[str(SOFT)][0]
    told = [
        warmed(small(**SOFT, num_experts=8, **more), run)[1].fit.differences for more in ({}, {"expert_dropout": 0.1})
    ]
    assert [sum(ALIKE in one for one in differences) for differences in told] == [1, 0]
