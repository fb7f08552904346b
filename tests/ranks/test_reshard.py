"""Weights and moments that the engine saved under one way of sharding load bit-equal under the next."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from softmoe_train.checkpoint import CheckpointStore
from tests.ranks.launch import run_ranks
from tests.ranks.small import ADAMW, build, share
from tests.ranks.test_layouts import Layout, full, options

HYBRID = options(shard_size=2)
# Each is saved and loaded by the next, the last by the first. Two experts on four ranks are cut along their hidden dim.
CYCLES = [
    [Layout(4, 1, "hsdp", options=HYBRID), Layout(4, 4, "fsdp"), Layout(4, 2, "hsdp", options=HYBRID)],
    [
        Layout(4, 1, "fsdp", num_experts=2),
        Layout(4, 2, "replicated", num_experts=2),
        Layout(4, 2, "fsdp", num_experts=2),
    ],
]


def differences(rank: int, world: int, folder: str) -> dict[str, list[str]]:
    wrong, cuts = {}, set()
    for cycle in CYCLES:
        for source, target in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            saved, loaded = (
                build(
                    rank, world, at.axis, at.sharding, num_experts=at.num_experts, optim=ADAMW, perturbed=at is source,
                    **dict(at.options),
                )
                for at in (source, target)
            )  # fmt: skip
            for batch in share(rank, world):
                saved.forward_backward(batch, last=True)
            saved.update(0.01)
            store = CheckpointStore(
                Path(folder) / f"{source}-{target}".replace(" ", ""),
                keep_last=1,
                rank=rank,
                world=world,
                group=dist.group.WORLD,
            )
            tensors = loaded.state_dict()
            store.load(store.save(1, saved.state_dict(), {}), tensors)
            loaded.load_state_dict(tensors)
            want, got = saved.state_dict(), loaded.state_dict()
            assert want.keys() == got.keys()
            wrong[f"{source} to {target}"] = [
                name for name in want if not torch.equal(full(want[name]), full(got[name]))
            ]
            cuts |= {str(t.placements) for t in want.values() if isinstance(t, DTensor)}
    assert any("Shard(dim=2)" in cut for cut in cuts), cuts
    assert any("Replicate()" in cut for cut in cuts), cuts
    return wrong


def test_every_way_of_sharding_loads_what_another_saved(tmp_path: Path) -> None:
    for wrong in run_ranks(differences, 4, str(tmp_path), timeout=400):
        assert len(wrong) == 6
        assert {pair: names for pair, names in wrong.items() if names} == {}
