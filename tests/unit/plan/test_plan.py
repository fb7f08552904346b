"""Plans of small runs: they follow the model, agree with themselves, and refuse what no rank could run."""

import json
from pathlib import Path

import pytest

from softmoe_train.commands.main import main
from softmoe_train.config import compose
from softmoe_train.model import vit
from softmoe_train.model.layers import Mlp
from softmoe_train.parallel.traffic import exchange_traffic
from softmoe_train.plan.axes import axis_costs
from softmoe_train.plan.make import Plan, make_plan
from softmoe_train.settings import RunConfig


def small_plan(*overrides: str, size: int = 4, ranks_per_host: int = 2) -> Plan:
    config = compose(RunConfig, ["recipe=debug", *overrides], lambda _: [])
    return make_plan(config, size, ranks_per_host, axes=False)


class WideMlp(Mlp):
    """The dense MLP with a hidden dim of another size than the settings say."""

    EXTRA = 7

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden + self.EXTRA)


def test_a_plan_follows_a_layer_that_changes_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    before = small_plan()
    monkeypatch.setattr(vit, "Mlp", WideMlp)
    after = small_plan()
    width, tokens, images = 32, 16, 16 // 4
    weights = WideMlp.EXTRA * (2 * width + 1)  # two kernels and the first bias, in one block without experts
    assert after.cost.parameters - before.cost.parameters == weights
    assert after.rehearsed.held.parameters - before.rehearsed.held.parameters == 4 * weights
    assert after.rehearsed.held.gradients - before.rehearsed.held.gradients == 4 * weights
    assert after.rehearsed.held.optimizer - before.rehearsed.held.optimizer == 8 * weights
    assert after.rehearsed.checkpoint - before.rehearsed.checkpoint == 12 * weights
    assert after.cost.forward_flops - before.cost.forward_flops == 2 * 2 * tokens * width * WideMlp.EXTRA
    hidden = 4 * images * tokens * WideMlp.EXTRA  # bytes of what the layer makes in between: before and after the GELU
    assert after.rehearsed.activations - before.rehearsed.activations == 2 * hidden


@pytest.mark.parametrize(
    "layout", [["parallel.expert_axis=4"], ["parallel.expert_axis=4", "parallel.exchange=two_stage", "micro_batches=2"]]
)
def test_the_exchange_of_a_plan_is_that_of_the_formula(layout: list[str]) -> None:
    plan = small_plan(*layout)
    said = exchange_traffic(
        plan.config.parallel, axis=4, on_node=2, images=4, micro_batches=plan.config.micro_batches, num_experts=4,
        slots_per_expert=2, width=32, itemsize=4, expert_dropout=0.0,
    )  # fmt: skip
    assert plan.exchange is not None
    assert plan.exchange[3:6] == (said.collectives, said.handed_bytes, said.off_rank_bytes)
    assert plan.exchange.off_host == said.off_node_bytes


@pytest.mark.parametrize("sharding", [pytest.param("replicated", marks=pytest.mark.full), "fsdp"])
def test_the_cost_of_an_axis_is_what_a_plan_of_that_axis_says(sharding: str) -> None:
    plans = {
        R: small_plan(
            f"parallel.expert_axis={R}", f"parallel.sharding={sharding}", "model.depth=3", "model.moe.blocks=last 2"
        )
        for R in (1, 2, 4)
    }
    costs = axis_costs(plans[2].config, 4, 2, plans[2].rehearsed, 2)
    assert [cost.axis for cost in costs] == [1, 2, 4]
    for cost in costs:
        plan = plans[cost.axis]
        sent = sum(t.off_rank for t in plan.traffic)
        slots = 0 if plan.exchange is None else plan.exchange.off_rank
        assert (cost.lasting, cost.exchange) == (plan.rehearsed.held.lasting, slots)
        assert cost.weights == pytest.approx(sent - slots, abs=len(plan.traffic) * 8)  # whole bytes of each collective


def test_one_rank_sends_nothing_and_holds_the_whole_checkpoint() -> None:
    plan = small_plan(size=1, ranks_per_host=1)
    held = plan.rehearsed.held
    assert plan.traffic == []
    assert plan.exchange is None
    # A count of updates for each parameter there, one in the checkpoint.
    assert held.parameters == held.gradients == 4 * plan.cost.parameters
    assert plan.rehearsed.checkpoint == 3 * held.parameters + 4


def test_data_that_is_there_is_counted() -> None:
    document = small_plan().document()["data"]
    assert (document["images"], document["steps_per_epoch"]) == (8192, 8192 / 16)


def test_every_reason_is_told_with_what_to_write_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=debug", "ranks=8", "parallel.expert_axis=3", "micro_batches=3", "rnks=3"]) == 2
    said = capsys.readouterr().err
    assert "4 experts on 8 ranks allow 1, 2 or 4" in said
    assert "micro_batches=3 does not divide the 2 images" in said
    assert "did you mean ranks" in said
    assert main(["plan", "recipe=debug", "ranks=12"]) == 2
    assert (
        "ranks_per_host=8 does not divide ranks=12: hosts have equally many; use one of 1, 2, 3, 4, 6, 12"
        in capsys.readouterr().err
    )


def test_a_sweep_is_one_comparison_and_names_what_cannot_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "sweep.json"
    assert (
        main(
            [
                "plan",
                "-m",
                "recipe=debug",
                "model.moe.num_experts=2,8",
                "parallel.expert_axis=2,4",
                "ranks=4",
                f"out={out}",
            ]
        )
        == 2
    )
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines() if line[:1] in ("2", "8")]
    assert [row[:2] for row in rows] == [["2", "2"], ["8", "2"], ["8", "4"]]
    assert (
        "model.moe.num_experts=2 parallel.expert_axis=4: parallel.expert_axis=4 does not divide model.moe.num_experts=2"
        in said.err
    )
    plans = json.loads(out.read_text())["plans"]
    assert [plan["model"]["parameters"] for plan in plans] == [int(row[2].replace(",", "")) for row in rows]


def test_a_plan_is_a_page_for_people_and_a_file_for_programs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "recipe=debug", "ranks=4", "parallel.expert_axis=2", f"out={out}"]) == 0
    said, plan = capsys.readouterr().out, json.loads(out.read_text())
    assert f"{plan['model']['parameters']:,}" in said
    assert "2 (this run)" in said
    assert [axis["axis"] for axis in plan["axes"]] == [1, 2, 4]
    assert plan["rank"]["peak"] > plan["rank"]["parameters"]
    assert plan["exchange_per_layer"]["given"] == 4 * 4 * 4 * 2 * 32 * 4, (
        "four crossings of 4 images' 4 x 2 slots of 32 floats"
    )


@pytest.mark.full
@pytest.mark.parametrize(("axis", "lasting"), [(8, 114), (64, 20)])
def test_h14_with_256_experts_is_planned_for_64_ranks(axis: int, lasting: int) -> None:
    config = compose(
        RunConfig, ["model=soft_h14_256e", "model.num_classes=29593", f"parallel.expert_axis={axis}"], lambda _: []
    )
    plan = make_plan(config, 64, 8, axes=False)  # 217 GB of weights, were they made
    experts = plan.cost.expert_parameters
    held = plan.rehearsed.held
    assert held.parameters == 4 * (experts // axis + plan.cost.parameters - experts)
    assert held.lasting / 1e9 == pytest.approx(lasting, abs=1)
    assert plan.rehearsed.checkpoint == 12 * plan.cost.parameters + 4
