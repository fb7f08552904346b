"""When gradients travel: under the backward that completes them, and as often as `reduce_each_micro` says."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_train.parallel import grads
from tests.ranks.launch import run_ranks
from tests.ranks.small import build, share
from tests.ranks.test_exchange_traffic import Traffic
from tests.ranks.test_layouts import TOLERANCE, full, relative, truth


def watched_step(rank: int, world: int) -> tuple[list[str], dict[str, Tensor]]:
    """A step with buckets of 2 kB: what became ready and what was sent, in order, and the gradients."""
    grads.BUCKET_BYTES = 2048
    events: list[str] = []
    send = grads.dist.all_reduce

    def recorded(*args: Any, **kwargs: Any) -> Any:
        events.append("sent")
        return send(*args, **kwargs)

    engine = build(rank, world, expert_axis=2, sharding="replicated")
    for name, p in engine.parameters.items():
        p.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    first, second = share(rank, world, micro_batches=2)
    engine.forward_backward(first, last=False)
    assert "sent" not in events, "a gradient that is not complete is not sent"
    events.clear()
    grads.dist.all_reduce = recorded
    engine.forward_backward(second, last=True)
    return events, {name: full(g) for name, g in engine.gradients().items()}


def test_gradients_are_sent_while_backward_still_runs() -> None:
    ranks = run_ranks(watched_step, 4)
    events, gradients = ranks[0]
    assert all(other == events for other, _ in ranks), "every rank sends the same buckets in the same order"
    ready = [i for i, event in enumerate(events) if event != "sent"]
    sent = [i for i, event in enumerate(events) if event == "sent"]
    assert len(sent) > 10
    assert sum(i < ready[-1] for i in sent) >= len(sent) - 2, (
        "all but the last buckets leave before the last gradient is there"
    )
    for name, want in truth()["gradients"].items():
        assert relative(gradients[name], want) < TOLERANCE, name


def sums_of_micro_batches(rank: int, world: int) -> dict[tuple[str, bool], list[set[str]]]:
    """The kinds of sums that each of two micro-batches runs."""
    seen = {}
    for each in (False, True):
        for sharding, options in (("fsdp", {}), ("hsdp", {"shard_size": 2})):
            engine = build(rank, world, expert_axis=1, sharding=sharding, reduce_each_micro=each, **options)
            engine.reducer.buckets.clear()  # those of the routers, which are always summed on the last
            batches = share(rank, world, 2)
            for batch in batches:
                with Traffic() as traffic:
                    engine.forward_backward(batch, last=batch is batches[-1])
                kinds = {"scatter" if "scatter" in name else "all" for name, *_ in traffic.calls if "reduce" in name}
                seen.setdefault((sharding, each), []).append(kinds)
    return seen


def test_reduce_each_micro_decides_when_sharded_gradients_are_summed() -> None:
    for seen in run_ranks(sums_of_micro_batches, 4):
        assert seen["fsdp", False] == [set(), {"scatter"}]
        assert seen["fsdp", True] == [{"scatter"}, {"scatter"}]
        assert seen["hsdp", False] == [set(), {"scatter", "all"}]
        # Within a copy after each, between copies only once.
        assert seen["hsdp", True] == [{"scatter"}, {"scatter", "all"}]


def bytes_kept(run: Callable[[], Tensor], weights: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of `run`, each storage once, weights left out."""
    known = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("what", ["block", "moe"])
def test_recompute_keeps_the_inputs_alone(what: str) -> None:
    kept = run_ranks(kept_for_backward, 1, what)[0]
    tokens = 16 * 16 * 24 * 4  # B T D float32 of the small model
    assert kept[what] < 0.7 * kept["none"]
    if what == "block":
        assert kept["block"] <= 3 * tokens + kept["outside"]


def kept_for_backward(rank: int, world: int, what: str) -> dict[str, int]:
    kept = {}
    for mode in ("none", what):
        engine = build(rank, world, 1, "replicated", recompute=mode)
        (batch,) = share(rank, world)
        run = partial(engine.module, batch.images)
        kept[mode] = bytes_kept(run, list(engine.parameters.values()))
    # What the embedding, the last norm and the head keep: patches, norm statistics and output, pooled features.
    kept["outside"] = 16 * 16 * (12 + 3 * 24 + 2) * 4 + 16 * 24 * 4
    return kept
