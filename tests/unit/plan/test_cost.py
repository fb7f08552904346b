"""What a plan says of models, against the paper: paper.md 2.2 and Table 9."""

import pytest
import torch

from softmoe_train.config import config_folder, load_yaml
from softmoe_train.model.count import forward_flops
from softmoe_train.model.moe import MoE
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import build_model
from softmoe_train.plan.cost import cost_of, paper_training_flops
from tests.models import moe_config
from tests.pareto import ParetoRow, pareto_rows
from tests.ranks.small import model_config

# Model, parameters, GFLOP of a forward and exaFLOP of training on so many million images: as computed there, as the paper prints.
ANALYTIC = [
    ("vit s16", 33_059_737, 9.2, 9.2, 225.4, 227.1, 4),
    ("soft s16 128", 933_709_471, 8.6, 8.6, 210.2, 211.9, 4),
    ("soft s14 256", 1_841_402_527, 13.1, 13.2, 322.5, 325.7, 4),
    ("vit b16", 108_555_673, 35.0, 35.1, 859.8, 864.1, 4),
    ("soft b16 128", 3_707_638_687, 31.8, 32.0, 782.3, 786.4, 4),
    ("vit l16", 333_635_481, 122.5, 122.9, 3011.2, 3025.4, 4),
    ("soft l16 128", 13_127_249_829, 110.7, 111.1, 2720.2, 2734.1, 4),
    ("vit h14", 668_675_993, 333.3, 334.2, 4095.8, 4120.3, 2),
    ("soft h14 128", 27_318_132_649, 283.7, 284.6, 3485.6, 3509.2, 2),
    ("soft h14 256", 54_177_406_889, 341.4, 342.4, 4194.8, 4220.3, 2),
]
BATCH, CLASSES = 4096, 29_593


def paper_model(size: str, patch: int, **moe: object) -> ModelConfig:
    """A model of the paper's, with experts in the last half of its blocks where `moe` says of which kind."""
    shape = load_yaml(config_folder() / "model" / "size" / f"{size}.yaml")
    changes = {"blocks": f"last {shape['depth'] // 2}", **moe} if moe else {}
    common = {"image_size": 224, "num_classes": CLASSES, "position_std": 0.02, "moe": moe_config(**changes)}
    return ModelConfig(**shape, **common, patch_size=patch)


def named(name: str) -> ModelConfig:
    kind, size, *experts = name.split()
    moe = {"router": kind, "num_experts": int(experts[0])} if experts else {}
    return paper_model(size[0], int(size[1:]), **moe)


@pytest.mark.parametrize(("name", "parameters"), [row[:2] for row in ANALYTIC])
def test_parameters_are_the_papers_to_the_unit(name: str, parameters: int) -> None:
    model = build_model(named(name), torch.float32)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("row", ANALYTIC, ids=lambda row: row[0])
def test_flops_are_the_papers_within_one_percent(row: tuple) -> None:
    name, _, computed, printed, training_computed, training_printed, million_steps = row
    forward = forward_flops(named(name))
    assert forward / 1e9 == pytest.approx(computed, rel=0.01)
    assert forward / 1e9 == pytest.approx(printed, rel=0.01)
    exaflop = paper_training_flops(named(name), forward) * million_steps * 1e6 * BATCH / 1e18
    assert exaflop == pytest.approx(training_computed, rel=0.001)
    assert exaflop == pytest.approx(training_printed, rel=0.01)


def test_a_plan_tells_experts_from_the_rest() -> None:
    cost = cost_of(model_config())
    width, hidden, experts, slots, layers = 24, 40, 8, 3, 2
    assert cost.expert_parameters == layers * experts * (2 * width * hidden + width + hidden)
    assert cost.active_parameters == cost.parameters, "every slot is filled, so an image reads every expert"
    assert cost.slots_per_token == experts * slots / 16
    model = build_model(model_config(), torch.float32)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert sum(isinstance(m, MoE) for m in model.modules()) == layers


def overrides_of(row: ParetoRow) -> dict[str, object]:
    routers = {"soft": "soft", "ec": "experts_choice", "tc": "tokens_choice"}
    if row.kind == "dense":
        return {}
    moe: dict[str, object] = {"router": routers[row.kind], "num_experts": row.experts}
    if row.kind != "soft":
        moe["sparse"] = {"group_images": row.group_images, "capacity_factor": row.capacity_factor}
    if row.kind == "tc":
        moe["tokens_choice"] = {"top_k": row.top_k}
    return moe


def tolerance(row: ParetoRow) -> float:
    """As issue and paper.md 2.2 have it."""
    if row.kind in ("dense", "soft"):
        return 0.02
    return 0.13 if (row.size, row.patch, row.group_images) == ("s", 8, 8) else 0.08


def papers_exaflop(row: ParetoRow) -> float:
    config = paper_model(row.size, row.patch, **overrides_of(row))
    return paper_training_flops(config, forward_flops(config)) * 300_000 * BATCH / 1e18


COUNTED = [
    row for row in pareto_rows() if row.size != "h"
]  # the H rows disagree with the paper's own longer runs (paper.md 10.7)
# Every size, patch and router, with groups of one image and of eight.
COVERING = [1, 10, 36, 39, 56, 81, 95, 107]


def misses(rows: list[ParetoRow]) -> list[tuple[ParetoRow, float]]:
    """The rows that are not met, each with what we say."""
    said = [(row, papers_exaflop(row)) for row in rows]
    return [(row, ours) for row, ours in said if abs(ours / row.train_exaflop - 1) > tolerance(row)]


def test_rows_of_table_9_are_met() -> None:
    assert misses([row for row in COUNTED if row.row in COVERING]) == []


@pytest.mark.full
def test_all_rows_of_table_9_but_h_are_met() -> None:
    assert len(COUNTED) == 103
    assert misses(COUNTED) == []
