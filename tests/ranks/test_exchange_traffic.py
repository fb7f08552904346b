"""The bytes of the exchange: the formula says what real collectives were given, and there is no other traffic on the axis."""

import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softmoe_train.parallel.traffic import ExchangeTraffic, exchange_traffic
from tests.ranks.launch import run_ranks
from tests.ranks.small import build, parallel_config, share

LAYERS, IMAGES, EXPERTS, SLOTS, WIDTH = 2, 16, 8, 3, 24
TWO_STAGE = {"exchange": "two_stage", "node_size": 2}
CASES: dict[str, dict[str, Any]] = {
    "flat": {"expert_axis": 4},
    "half the ranks": {"expert_axis": 2},
    "chunks": {"expert_axis": 4, "exchange_chunks": 2},
    "chunks of micro-batches": {"expert_axis": 4, "exchange_chunks": 2, "micro": 2},
    "uneven chunks": {"expert_axis": 2, "exchange_chunks": 3},
    "two stages": {"expert_axis": 4, **TWO_STAGE},
    "two stages in chunks": {"expert_axis": 4, **TWO_STAGE, "exchange_chunks": 4},
    "bfloat16 wire": {"expert_axis": 4, "exchange_dtype": "bfloat16"},
    "bfloat16 activations": {"expert_axis": 4, "dtype": torch.bfloat16},
    "the layer again in backward": {"expert_axis": 4, "exchange_chunks": 2, "recompute": "moe"},
    "the block again in backward": {"expert_axis": 4, **TWO_STAGE, "recompute": "block"},
    "keys of dropout": {"expert_axis": 4, **TWO_STAGE, "exchange_chunks": 2, "recompute": "moe", "expert_dropout": 0.1},
    "groups of two images": {"expert_axis": 4, "exchange_chunks": 2, "router": "tokens_choice", "group_images": 2},
    "no axis": {"expert_axis": 1},
}
ON_NODE = 2  # ranks 0 and 1 are one node, 2 and 3 another


class Traffic(TorchDispatchMode):
    """Writes down each collective: its name, its group, and the bytes that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("_c10d_functional.", "_c10d_functional_autograd.", "c10d.")) and not re.search(
            "wait|wrap", name
        ):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            given = sum(t.numel() * t.element_size() for t in tensors)
            self.calls.append((name.split(".")[1], _group_name(args), given))
        return func(*args, **(kwargs or {}))


def _group_name(args: Any) -> str:
    """The process group of a collective: functional ones are given its name, the others the group itself."""
    for leaf in torch.utils._pytree.tree_leaves(args):
        if isinstance(leaf, str) and leaf not in ("sum", "avg"):
            return leaf
        if isinstance(leaf, torch.ScriptObject):
            return dist.ProcessGroup.unbox(leaf).group_name
    raise AssertionError(f"no group among {args}")


def counted(rank: int, world: int, *, micro: int = 1, **layout: Any) -> ExchangeTraffic:
    """What the collectives of a real step were given, of one layer; who is on which node is read from their groups."""
    engine = build(rank, world, sharding="replicated", **layout)
    with Traffic() as traffic:
        for batch in share(rank, world, micro):
            engine.forward_backward(batch, last=False)  # gradients would be summed under the last
    off_rank = off_node = message = 0
    for name, group, given in traffic.calls:
        assert name == "all_to_all_single", "forward and backward of replicated weights do nothing else"
        peers = dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(group))  # pyright: ignore
        away = sum(peer // ON_NODE != rank // ON_NODE for peer in peers)
        off_rank += given * (len(peers) - 1) // len(peers)
        off_node += given * away // len(peers)
        message = max(message, given // len(peers)) if away or layout["expert_axis"] == ON_NODE else message
    calls, handed = len(traffic.calls), sum(given for *_, given in traffic.calls)
    return ExchangeTraffic(calls // LAYERS, handed // LAYERS, off_rank // LAYERS, off_node // LAYERS, message)


def everything_on_a_rank(rank: int, world: int) -> dict[str, Any]:
    counts = {name: counted(rank, world, **case) for name, case in CASES.items()}
    engine = build(rank, world, expert_axis=2, sharding="fsdp")
    (batch,) = share(rank, world)
    with Traffic() as traffic:
        engine.forward_backward(batch, last=True)
        engine.update(0.1)
    fsdp, ep = traffic.calls, engine.topology.ep.get_group().group_name
    engine = build(rank, world, expert_axis=world, sharding="replicated")
    with Traffic() as traffic:
        engine.forward_backward(batch, last=True)
    return {"counts": counts, "fsdp": fsdp, "ep": ep, "replicated": traffic.calls}


@cache
def ranks() -> list[dict[str, Any]]:
    """One start of the processes serves all tests of this file."""
    return run_ranks(everything_on_a_rank, 4)


@pytest.mark.parametrize("name", CASES)
def test_the_formula_says_what_the_collectives_of_a_step_were_given(name: str) -> None:
    case = {"micro": 1, "dtype": torch.float32, **CASES[name]}
    micro, dtype, dropout = case.pop("micro"), case.pop("dtype"), case.pop("expert_dropout", 0.0)
    axis = case["expert_axis"]
    sparse, group = case.pop("router", None), case.pop("group_images", 1)
    # As many slots as tokens, of which an image has 16.
    slots = group * 16 // EXPERTS if sparse else SLOTS
    said = exchange_traffic(
        parallel_config(**case), axis=axis, on_node=min(ON_NODE, axis), images=IMAGES // 4 // group, micro_batches=micro,
        num_experts=EXPERTS, slots_per_expert=slots, width=WIDTH, itemsize=dtype.itemsize, expert_dropout=dropout,
    )  # fmt: skip
    for rank in ranks():
        assert rank["counts"][name] == said


def test_chunks_and_stages_change_no_bytes_and_a_bfloat16_wire_halves_them() -> None:
    counts = ranks()[0]["counts"]
    flat = counts["flat"]
    assert flat.handed_bytes == 4 * IMAGES // 4 * EXPERTS * SLOTS * WIDTH * 4, (
        "4 crossings of this rank's slots in float32"
    )
    assert counts["chunks"].handed_bytes == counts["chunks of micro-batches"].handed_bytes == flat.handed_bytes
    assert counts["two stages in chunks"].off_node_bytes == counts["two stages"].off_node_bytes == flat.off_node_bytes
    assert (
        2 * counts["bfloat16 wire"].handed_bytes == 2 * counts["bfloat16 activations"].handed_bytes == flat.handed_bytes
    )
    assert counts["two stages"].message_bytes == 2 * flat.message_bytes


def test_under_fsdp_the_expert_axis_carries_slots_alone() -> None:
    for rank in ranks():
        on_ep = [name for name, group, _ in rank["fsdp"] if group == rank["ep"]]
        assert on_ep == ["all_to_all_single"] * 4 * LAYERS
        assert len(rank["fsdp"]) > len(on_ep), "gathers and reductions of weights, on the other axes, are seen too"
        assert any("gather" in name for name, *_ in rank["fsdp"])


def test_sums_of_gradients_under_backward_stand_in_no_queue_of_the_exchange() -> None:
    for rank in ranks():
        exchange = {group for name, group, _ in rank["replicated"] if name == "all_to_all_single"}
        sums = {group for name, group, _ in rank["replicated"] if name != "all_to_all_single"}
        assert len(exchange) == 1 and sums
        assert exchange.isdisjoint(sums)
