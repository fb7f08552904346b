"""The average of the weights on every layout: it disturbs nothing, it is what its recursion says, and it resumes anywhere."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from softmoe_train.checkpoint.store import CheckpointStore
from softmoe_train.data.batch import Cursor
from softmoe_train.dist import World, control_group
from softmoe_train.engine.torch_engine import TorchEngine
from softmoe_train.evals.averaged import AveragedEvaluator
from softmoe_train.evals.upstream import UpstreamConfig, UpstreamEvaluator
from softmoe_train.loop import TrainState
from softmoe_train.model.vit import build_model
from softmoe_train.optim.average import AverageConfig
from tests.ranks.launch import run_ranks
from tests.ranks.small import ADAFACTOR, GLOBAL_BATCH, build, global_batch, model_config, share
from tests.ranks.test_layouts import Layout, full, options

RATE = 0.02
DECAY = 0.8
EMA = AverageConfig(decay=DECAY, warmup=False)
STEPS = 3
LAYOUTS = [
    Layout(1, 1, "fsdp"),
    Layout(2, 2, "replicated"),
    Layout(4, 2, "fsdp"),
    Layout(4, 2, "hsdp", options=options(shard_size=2)),
    Layout(4, 1, "fsdp", num_experts=2),
]


def engine_of(rank: int, layout: Layout, average: AverageConfig | None) -> TorchEngine:
    layout_options = dict(layout.options)
    return build(
        rank, layout.world, layout.axis, layout.sharding, optim=ADAFACTOR, average=average,
        num_experts=layout.num_experts, **layout_options,
    )  # fmt: skip


def measured(engine: TorchEngine, layout: Layout, rank: int) -> tuple[dict[str, float], dict[str, float]]:
    """The same evaluator on the live and on the averaged weights."""
    evaluator = UpstreamEvaluator(
        UpstreamConfig(every=1, batch_size=GLOBAL_BATCH, sets={}), {"test": share(rank, layout.world)}, "sigmoid", 10
    )
    state = TrainState(engine, 0, 0, Cursor(0), "")
    return dict(evaluator.run(state)), dict(AveragedEvaluator(evaluator).run(state))


def go(rank: int, layout: Layout, average: AverageConfig | None, step: int, engine: TorchEngine) -> float:
    """One step; with averaging, everything is measured before the second, when the average is no longer the weights."""
    if average is not None and step == 1:
        measured(engine, layout, rank)
    (batch,) = share(rank, layout.world, step=step)
    loss = engine.forward_backward(batch, last=True)
    engine.update(RATE)
    return loss.item()


def one_layout(rank: int, layout: Layout, folder: str) -> dict[str, Any]:
    plain, engine = engine_of(rank, layout, None), engine_of(rank, layout, EMA)
    engine.load_state_dict({name: t for name, t in engine.state_dict().items() if not name.startswith("average.")})
    weights, losses = [{name: full(p) for name, p in engine.parameters.items()}], []
    for step in range(STEPS):
        losses.append((go(rank, layout, None, step, plain), go(rank, layout, EMA, step, engine)))
        weights.append({name: full(p) for name, p in engine.parameters.items()})
    before = {name: full(t) for name, t in engine.state_dict().items()}
    live, averaged = measured(engine, layout, rank)
    after = {name: full(t) for name, t in engine.state_dict().items()}
    last = {name: full(t) for name, t in plain.state_dict().items()}
    return {
        "losses": losses, "weights": weights, "before": before, "after": after, "plain": last, "live": live,
        "averaged": averaged,
    } | through_a_checkpoint(rank, layout, engine, f"{folder}/{layout}".replace(" ", ""))  # fmt: skip


def store_at(rank: int, world: int, folder: str) -> CheckpointStore:
    group = control_group(World(rank, world, rank, world))
    return CheckpointStore(Path(folder), keep_last=2, rank=rank, world=world, group=group)


def through_a_checkpoint(rank: int, layout: Layout, engine: TorchEngine, folder: str) -> dict[str, Any]:
    """Save, load at the plainest layout of as many ranks, and take one step there and here."""
    other = layout._replace(axis=1, sharding="replicated", options=())
    moved = engine_of(rank, other, EMA)
    store = store_at(rank, layout.world, folder)
    path = store.save(STEPS, engine.state_dict(), {})
    tensors = moved.state_dict()
    store.load(path, tensors)
    moved.load_state_dict(tensors)
    loaded = {name: full(t) for name, t in moved.state_dict().items()}
    back = engine_of(rank, layout, EMA)
    moved_store = store_at(rank, layout.world, folder + "_moved")
    tensors = back.state_dict()
    moved_store.load(moved_store.save(STEPS, moved.state_dict(), {}), tensors)
    back.load_state_dict(tensors)
    returned = {name: full(t) for name, t in back.state_dict().items()}
    losses = go(rank, layout, EMA, STEPS, engine), go(rank, other, EMA, STEPS, moved)
    return {"loaded": loaded, "returned": returned, "next": losses}


def all_layouts(rank: int, world: int, folder: str) -> dict[Layout, dict[str, Any]]:
    return {layout: one_layout(rank, layout, folder) for layout in LAYOUTS if layout.world == world}


@cache
def results(world: int, folder: str) -> list[dict[Layout, dict[str, Any]]]:
    return run_ranks(all_layouts, world, folder, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("average"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_averaging_changes_no_bit_of_training(layout: Layout, folder: str) -> None:
    for got in (r[layout] for r in results(layout.world, folder)):
        assert all(plain == averaging for plain, averaging in got["losses"])
        for name, tensor in got["plain"].items():
            assert torch.equal(tensor, got["before"][name]), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_average_is_its_recursion_over_the_weights(layout: Layout, folder: str) -> None:
    got = results(layout.world, folder)[0][layout]
    assert got["before"]["average.updates"].tolist() == [STEPS]
    for name in got["weights"][0]:
        want = got["weights"][0][name].double()
        for weights in got["weights"][1:]:
            want = DECAY * want + (1 - DECAY) * weights[name].double()
        torch.testing.assert_close(got["before"][f"average.{name}"].double(), want, rtol=1e-6, atol=1e-7)
    moved = [n for n in got["weights"][0] if not torch.equal(got["weights"][0][n], got["before"][f"average.{n}"])]
    assert len(moved) == len(got["weights"][0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_averaged_weights_are_measured_and_the_live_ones_return_bit_for_bit(layout: Layout, folder: str) -> None:
    got = results(layout.world, folder)[0][layout]
    assert all(torch.equal(tensor, got["after"][name]) for name, tensor in got["before"].items())
    for source, values in (("model", got["live"]), ("average", got["averaged"])):
        moe = model_config().moe.model_copy(update={"num_experts": layout.num_experts})
        model = build_model(model_config(moe=moe), torch.float32)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(got["before"][f"{source}.{name}"])
            batch = global_batch()
            logits = model(batch.images).logits
        targets = torch.nn.functional.one_hot(batch.labels, 10)
        loss = (torch.nn.functional.softplus(logits) - targets * logits).sum() / GLOBAL_BATCH
        assert values["test/loss"] == pytest.approx(loss.item(), rel=1e-5), source
    assert got["live"]["test/loss"] != pytest.approx(got["averaged"]["test/loss"], rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adafactor_and_the_average_resume_bit_equal_at_another_layout(layout: Layout, folder: str) -> None:
    got = results(layout.world, folder)[0][layout]
    for where in ("loaded", "returned"):
        assert got[where].keys() == got["after"].keys()
        for name, tensor in got["after"].items():
            assert torch.equal(tensor, got[where][name]), name
            assert tensor.dtype == got[where][name].dtype
    here, there = (sum(r[layout]["next"][i] for r in results(layout.world, folder)) for i in (0, 1))
    assert here == pytest.approx(there, rel=1e-5)
