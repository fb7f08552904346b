"""The loop on several ranks: bad losses stop all of them by name, and what is measured does not depend on the layout."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softmoe_train.checkpoint.saver import Saver
from softmoe_train.checkpoint.store import CheckpointStore
from softmoe_train.data.batch import Batch, Broken, Cursor
from softmoe_train.dist import World, control_group
from softmoe_train.evals.upstream import UpstreamConfig, UpstreamEvaluator
from softmoe_train.loop import NonFiniteLossError, Plan, TrainState, fit
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


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "steps": 6, "stop_after": None, "micro_batches": 2, "learning_rate": lambda _: 0.01, "report_every": 1,
        "save_every": 0, "best": None, "documents": {},
    }  # fmt: skip
    return Plan(**{**values, **changes})


def run(rank: int, world: int, folder: str, bad: dict[int, int], report_every: int) -> dict[str, Any]:
    engine = build(rank, world, expert_axis=world, sharding="replicated")
    store = CheckpointStore(
        Path(folder), keep_last=2, rank=rank, world=world, group=control_group(World(rank, world, rank, world))
    )
    state = TrainState(engine, 0, 0, Cursor(0), "")
    before = engine.parameters["head.weight"].detach().clone()
    try:
        reason = fit(
            state,
            plan(report_every=report_every, save_every=2),
            Stream(rank, world, bad),
            {},
            saver(store),
            SilentLog(""),
            Never(),
        )
    except NonFiniteLossError as error:
        reason = str(error)
        store.settle()
    latest = store.latest()
    finite = all(p.isfinite().all().item() for p in engine.parameters.values())
    moved = not torch.equal(before, engine.parameters["head.weight"].detach())
    return {"reason": reason, "step": state.step, "latest": latest and latest.name, "finite": finite, "moved": moved}


def test_a_non_finite_loss_stops_all_ranks_and_names_step_and_rank(tmp_path: Path) -> None:
    ranks = run_ranks(run, 2, str(tmp_path), {3: 1}, 1)
    for r in ranks:
        assert r["reason"].startswith(
            "the loss was not finite at step 3 on rank 1; that update was a no-op, and no checkpoint"
        )
        assert r["step"] == 3
        assert r["latest"] == "step_00000002"
        assert r["finite"]
        assert r["moved"]


def test_between_reports_bad_updates_are_no_ops_and_nothing_bad_is_saved(tmp_path: Path) -> None:
    # Reports are far apart, so the save at step 4 is the first to look: steps 3 and 4 must have left the weights alone.
    ranks = run_ranks(run, 2, str(tmp_path), {3: 0, 4: 1}, 100)
    for r in ranks:
        assert r["reason"].startswith("the loss was not finite at step 3 on rank 0;")
        assert r["step"] == 4
        assert r["latest"] == "step_00000002"
        assert r["finite"]


def test_a_healthy_run_completes(tmp_path: Path) -> None:
    for r in run_ranks(run, 2, str(tmp_path), {}, 1):
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
    with pytest.raises(NonFiniteLossError) as caught:
        fit(state, plan(steps=40, report_every=6), Stream(rank, world, {}), {}, saver(store), SilentLog(""), Never())
    return str(caught.value), all(torch.equal(before[name], q) for name, q in engine.local.items())


def test_a_run_that_learns_nothing_stops(tmp_path: Path) -> None:
    for said, unmoved in run_ranks(never_updates, 2, str(tmp_path)):
        assert said.startswith("the gradient norm was not finite in the last 12 steps, up to 12: no update was made.")
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

    def update(self, lr: float) -> Any:
        self.calls.append(lr)
        return self.engine.update(lr)

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
    with pytest.raises(NonFiniteLossError) as caught:
        fit(state, plan(learning_rate=lambda _: 0.0), stream, {}, saver(store), SilentLog(""), Never())
    assert store.latest() is None
    return str(caught.value)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    for said in run_ranks(blow_up, 2, str(tmp_path)):
        assert "not finite" in said


ROWS = 21  # held-out images: no number of ranks below divides them


def measure(rank: int, world: int) -> dict[str, float]:
    engine = build(rank, world, expert_axis=world, sharding="replicated")
    images = torch.cat([global_batch(7).images, global_batch(8).images])[:ROWS]
    # An untrained model is seldom right, so every third label is what it says.
    said = engine.module(images).argmax(-1)
    labels = torch.where(torch.arange(ROWS) % 3 == 0, said, (said + 1) % 10)
    mine = torch.arange(rank, ROWS, world)
    padded = -(-ROWS // world)
    rows = torch.cat([mine, torch.zeros(padded - len(mine), dtype=torch.long)])
    mask = torch.arange(padded) < len(mine)
    # Labels of padding rows are right on purpose: they must not count.
    lost = (Broken("shard.tar", "key", "torn"),) if rank == 0 else ()
    batch = Batch(images[rows], labels[rows], mask, rows, Cursor(0), lost)
    evaluator = UpstreamEvaluator(UpstreamConfig(every=0, batch_size=padded), [batch], "softmax")
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
