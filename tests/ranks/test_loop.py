"""The loop on several ranks: bad losses are skipped and stop all of them alike, and what is measured does not depend on the layout."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softmoe_train.checkpoint import NotFiniteError
from softmoe_train.checkpoint.saver import Saver
from softmoe_train.checkpoint.store import CheckpointStore
from softmoe_train.config import config_folder, load_yaml
from softmoe_train.data.batch import Batch, Broken, Cursor, StoredSample
from softmoe_train.dist import World, control_group
from softmoe_train.evals.upstream import UpstreamConfig, UpstreamEvaluator
from softmoe_train.faults.bad_batches import BadBatches
from softmoe_train.faults.bad_steps import BadStepsConfig, BadStepsError
from softmoe_train.loop import Plan, TrainState, fit
from softmoe_train.observe.log import SilentLog
from tests.ranks.deepspeed_ranks import same, whole, zero
from tests.ranks.launch import run_ranks
from tests.ranks.small import ADAMW, GLOBAL_BATCH, build, global_batch, share


class Stream:
    """The small global batches as a stream; from `bad_step` on, `bad_rank` gets pixels that are not finite."""

    def __init__(self, rank: int, world: int, bad: dict[int, int]) -> None:
        self.rank, self.world, self.bad, self.step = rank, world, bad, 0

    def seek(self, cursor: Cursor) -> None:
        self.step = cursor.position // GLOBAL_BATCH

    def fingerprint(self) -> dict[str, object]:
        return {}

    def measures(self, cursor: Cursor) -> dict[str, float]:
        return {}

    def samples(self, cursor: Cursor, rank: int) -> list[StoredSample]:
        rows = GLOBAL_BATCH // self.world
        first = cursor.position + rank * rows
        return [StoredSample(g, "small", f"step {g // GLOBAL_BATCH}") for g in range(first, first + rows)]

    def __iter__(self) -> Iterator[Batch]:
        while True:
            (batch,) = share(self.rank, self.world, step=self.step)
            self.step += 1
            pixels = batch.images.float() / 127.5 - 1
            if self.bad.get(self.step) == self.rank:
                pixels[0, 0, 0, 0] = float("nan")
            yield Batch(pixels, batch.labels, batch.mask, batch.sample_ids, batch.cursor, ())


class Never:
    """Nobody wants the run to end early."""

    def agreed(self) -> str | None:
        return None


class AfterStep(Never):
    """Somebody wants the run to end after a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def agreed(self) -> str | None:
        self.left -= 1
        return None if self.left else "interrupted by SIGTERM"


def saver(store: CheckpointStore) -> Saver:
    return Saver(store, max_failures=1, warn=print)


def bad_steps(**changes: Any) -> BadStepsConfig:
    return BadStepsConfig(**{**load_yaml(config_folder() / "bad_steps" / "default.yaml"), **changes})


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "steps": 6, "stop_after": None, "micro_batches": 2, "learning_rate": lambda _: 0.01, "report_every": 1,
        "save_every": 0, "best": None, "bad_steps": bad_steps(), "bad_batches": None, "expert_blocks": [1, 2], "moves_every": 0, "documents": {},
        "budget": None, "broken_file": None,
    }  # fmt: skip
    return Plan(**{**values, **changes})


def run(rank: int, world: int, folder: str, bad: dict[int, int], report_every: int, in_a_row: int) -> dict[str, Any]:
    engine = build(rank, world, expert_axis=world, sharding="replicated")
    store = CheckpointStore(
        Path(folder), keep_last=2, rank=rank, world=world, group=control_group(World(rank, world, rank, world))
    )
    state = TrainState(engine, 0, 0, Cursor(0), "")
    stream = Stream(rank, world, bad)
    how = plan(
        report_every=report_every,
        save_every=2,
        bad_steps=bad_steps(in_a_row=in_a_row),
        bad_batches=BadBatches(Path(folder, "bad_batches.jsonl"), stream) if rank == 0 else None,
    )
    try:
        reason = fit(state, how, stream, {}, saver(store), SilentLog(""), Never())
    except BadStepsError as error:
        reason = str(error)
        store.settle()
    latest = store.latest()
    weights = {name: p.detach().clone() for name, p in engine.local.items()}
    return {
        "reason": reason, "step": state.step, "latest": latest and latest.name, "weights": weights, "skipped": state.skipped_updates,
    }  # fmt: skip


def test_a_single_loss_that_is_not_finite_is_skipped_counted_and_written_down(tmp_path: Path) -> None:
    # One rank's loss: no rank makes that update, and the run is the one of the other five steps.
    ranks = run_ranks(run_and_truth, 2, str(tmp_path))
    rows = range(2 * GLOBAL_BATCH + GLOBAL_BATCH // 2, 3 * GLOBAL_BATCH)
    assert [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()] == [
        {
            "step": 3, "first_sample": 2 * GLOBAL_BATCH, "why": "loss", "loss": None, "ranks": [1],
            "samples": [{"number": g, "shard": "small", "key": "step 2"} for g in rows],
        }
    ]  # fmt: skip
    for r, weights in ranks:
        assert (r["reason"], r["step"], r["latest"], r["skipped"]) == ("complete", 6, "step_00000006", 1)
        assert all(torch.equal(r["weights"][name], q) for name, q in weights.items())


def run_and_truth(rank: int, world: int, folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A run with a bad third step, and the weights after the other five steps."""
    with_it = run(rank, world, folder, {3: 1}, 100, 2)
    engine = build(rank, world, expert_axis=world, sharding="replicated")
    for step in (0, 1, 3, 4, 5):
        parts = share(rank, world, micro_batches=2, step=step)
        for part in parts:
            pixels = dataclasses.replace(part, images=part.images.float() / 127.5 - 1)
            engine.forward_backward(pixels, last=part is parts[-1])
        engine.update(0.01)
    return with_it, {name: p.detach().clone() for name, p in engine.local.items()}


def often_and_seldom(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    return [run(rank, world, f"{folder}/{every}", {1: 0, 3: 1, 4: 0}, every, 2) for every in (1, 100)]


def test_bad_losses_in_a_row_stop_all_ranks_whenever_they_look(tmp_path: Path) -> None:
    for every in (1, 100):
        (tmp_path / str(every)).mkdir()
    for r in (r for rank in run_ranks(often_and_seldom, 2, str(tmp_path)) for r in rank):
        assert r["reason"].startswith(
            "every step from 3 to 4 was bad: 2 not finite (no update was made). Lower schedule.peak"
        )
        assert (r["step"], r["latest"]) == (4, "step_00000002")
        assert all(q.isfinite().all() for q in r["weights"].values())


def test_a_healthy_run_completes(tmp_path: Path) -> None:
    for r in run_ranks(run, 2, str(tmp_path), {}, 1, 10):
        assert r["reason"] == "complete"
        assert r["latest"] == "step_00000006"
    loop = json.loads((tmp_path / "step_00000006" / "loop.json").read_text())
    assert loop["images_seen"] == 6 * GLOBAL_BATCH
    assert loop["cursor"] == {"position": 6 * GLOBAL_BATCH}


def never_updates(rank: int, world: int, folder: str) -> tuple[str, bool]:
    """Losses are fine but no gradient is: a factor overflows in the backward alone."""
    engine = build(rank, world, expert_axis=world, sharding="replicated")

    def overflow(p: torch.Tensor) -> None:
        assert p.grad is not None
        p.grad.fill_(float("inf"))

    engine.parameters["head.bias"].register_post_accumulate_grad_hook(overflow)
    before = {name: q.detach().clone() for name, q in engine.local.items()}
    store = CheckpointStore(
        Path(folder), keep_last=2, rank=rank, world=world, group=control_group(World(rank, world, rank, world))
    )
    state = TrainState(engine, 0, 0, Cursor(0), "")
    with pytest.raises(BadStepsError) as caught:
        fit(state, plan(steps=40, report_every=6), Stream(rank, world, {}), {}, saver(store), SilentLog(""), Never())
    return str(caught.value), all(torch.equal(before[name], q) for name, q in engine.local.items())


def test_a_run_that_learns_nothing_stops(tmp_path: Path) -> None:
    for said, unmoved in run_ranks(never_updates, 2, str(tmp_path)):
        assert said.startswith("every step from 1 to 10 was bad: 10 not finite (no update was made).")
        assert unmoved


def overflows_alone(rank: int, world: int) -> dict[str, tuple[float, bool, bool]]:
    """An update after a loss of rank 1 alone that is not finite, while every gradient is: of each engine, and the next one."""
    engines = {"torch": build(rank, world, expert_axis=world, sharding="replicated", optim=ADAMW)}
    engines |= {f"ZeRO {stage}": zero((world, world, stage, 2), optim=ADAMW) for stage in (0, 1, 2)}
    seen = {}
    for name, engine in engines.items():
        before = whole(engine.state_dict())
        bias = engine.local["head.bias"]
        start = bias.clone()
        losses = []
        for part in share(rank, world, micro_batches=2):
            if rank == 1 and not losses:  # one micro-batch of two
                bias.fill_(3e38)  # ten such logits are beyond float32, the sigmoid of each is 1
            losses.append(engine.forward_backward(part, last=bool(losses)))
            bias.copy_(start)
        assert torch.stack(losses).isfinite().all().item() == (rank == 0)
        assert all(gradient.isfinite().all() for gradient in whole(engine.gradients()).values())
        skipped = engine.update(0.01).skipped.item()
        kept = same(whole(engine.state_dict()), before)
        for part in share(rank, world, micro_batches=1):
            engine.forward_backward(part, last=True)
        seen[name] = (skipped, kept, engine.update(0.01).skipped.item() == 0)
    return seen


def test_a_loss_that_is_not_finite_on_one_rank_makes_the_update_a_no_op_on_all() -> None:
    for seen in run_ranks(overflows_alone, 2):
        assert len(seen) == 4
        assert set(seen.values()) == {(1.0, True, True)}, seen


class Recorder:
    """An engine that writes down what the loop asks of it."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.device, self.calls = engine, engine.device, []

    def forward_backward(self, batch: Batch, *, last: bool) -> Any:
        self.calls.append((len(batch), last))
        return self.engine.forward_backward(batch, last=last)

    def update(self, lr: float, *, moves: bool) -> Any:
        self.calls.append(lr)
        return self.engine.update(lr, moves=moves)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def steps_of_the_loop(rank: int, world: int, folder: str) -> list[Any]:
    engine = Recorder(build(rank, world, expert_axis=1, sharding="replicated"))
    store = CheckpointStore(Path(folder), keep_last=1, rank=rank, world=world, group=None)
    state = TrainState(engine, 0, 0, Cursor(0), "")  # pyright: ignore[reportArgumentType]
    four = plan(steps=2, micro_batches=4, learning_rate=lambda step: 0.5 + step)
    fit(state, four, Stream(rank, world, {}), {}, saver(store), SilentLog(""), Never())
    return engine.calls


def test_a_step_is_its_micro_batches_then_one_update_at_the_rate_of_that_step(tmp_path: Path) -> None:
    (calls,) = run_ranks(steps_of_the_loop, 1, str(tmp_path))
    micro = GLOBAL_BATCH // 4
    batch = [(micro, False)] * 3 + [(micro, True)]
    assert calls == [*batch, 0.5, *batch, 1.5]


class Measured:
    """An evaluator that only writes down at which steps it was asked."""

    def __init__(self, every: int) -> None:
        self.every, self.steps = every, []

    def run(self, state: TrainState) -> list[tuple[str, float]]:
        self.steps.append(state.step)
        return []


def asked_to_stop(rank: int, world: int, folder: str, at: int) -> tuple[str, int, str, list[int], list[int]]:
    engine = build(rank, world, expert_axis=1, sharding="replicated")
    store = CheckpointStore(Path(folder), keep_last=9, rank=rank, world=world, group=None)
    state = TrainState(engine, 0, 0, Cursor(0), "")
    often, at_the_end = Measured(2), Measured(0)
    stream = Stream(rank, world, {})
    reason = fit(state, plan(), stream, {"a": often, "b": at_the_end}, saver(store), SilentLog(""), AfterStep(at))
    latest = store.latest()
    return reason, state.step, latest.name if latest else "", often.steps, at_the_end.steps


def test_a_run_that_is_asked_to_stop_saves_that_step_and_measures_only_what_is_due(tmp_path: Path) -> None:
    (stopped,) = run_ranks(asked_to_stop, 1, str(tmp_path / "three"), 3)
    assert stopped == ("interrupted by SIGTERM", 3, "step_00000003", [2], [])
    (complete,) = run_ranks(asked_to_stop, 1, str(tmp_path / "six"), 6)
    assert complete == ("complete", 6, "step_00000006", [2, 4, 6], [6])


def blow_up(rank: int, world: int, folder: str) -> str:
    engine = build(rank, world, expert_axis=world, sharding="fsdp")
    if rank == 1:
        next(iter(engine.local.values()))[0] = float("inf")
    store = CheckpointStore(
        Path(folder), keep_last=2, rank=rank, world=world, group=control_group(World(rank, world, rank, world))
    )
    state = TrainState(engine, 0, 0, Cursor(0), "")
    stream = Stream(rank, world, {})
    with pytest.raises(NotFiniteError) as caught:
        fit(state, plan(learning_rate=lambda _: 0.0), stream, {}, saver(store), SilentLog(""), Never())
    assert store.latest() is None
    return str(caught.value)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    for said in run_ranks(blow_up, 2, str(tmp_path)):
        assert "rank 1: model." in said
        assert "hold values that are not finite" in said
        assert "there is no checkpoint yet: go on from there with a lower schedule.peak" in said


ROWS = 21  # held-out images: no number of ranks below divides them


def measure(rank: int, world: int) -> dict[str, float]:
    engine = build(rank, world, expert_axis=world, sharding="replicated")
    images = torch.cat([global_batch(7).images, global_batch(8).images])[:ROWS]
    # An untrained model is seldom right, so every third label is what it says.
    said = engine.module(images).logits.argmax(-1)
    labels = torch.where(torch.arange(ROWS) % 3 == 0, said, (said + 1) % 10)
    mine = torch.arange(rank, ROWS, world)
    padded = -(-ROWS // world)
    rows = torch.cat([mine, torch.zeros(padded - len(mine), dtype=torch.long)])
    mask = torch.arange(padded) < len(mine)
    # Labels of padding rows are right on purpose: they must not count.
    lost = (Broken("shard.tar", "key", "torn", "0" * 64, 5),) if rank == 0 else ()
    batch = Batch(images[rows], labels[rows], mask, rows, Cursor(0), lost)
    evaluator = UpstreamEvaluator(UpstreamConfig(every=0, batch_size=padded, sets={}), {"test": [batch]}, "softmax", 10)
    return dict(evaluator.run(TrainState(engine, 0, 0, Cursor(0), "")))


def test_upstream_measures_count_each_image_once_on_every_layout() -> None:
    results = {world: run_ranks(measure, world) for world in (1, 2, 4)}
    one = results[1][0]
    assert one["test/top1"] == 7 / 21
    for world, ranks in results.items():
        for r in ranks:
            assert r["test/top1"] == one["test/top1"], world
            assert r["test/broken_images"] == 1
            assert r["test/loss"] == pytest.approx(one["test/loss"], rel=1e-6)
