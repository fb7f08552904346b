"""A run that goes on with another global batch, on other ranks, repeats no sample and misses none: told by shard and key."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.life import Life
from tests.runs import with_digits
from tests.same_run import keys_by_name

# (the last step of a life, batch, ranks, decode workers, micro-batches)
LEGS = [(6, 160, 2, 0, 1), (9, 240, 1, 1, 3), (14, 80, 2, 1, 2)]
SMALL = [
    "model.width=32",
    "model.mlp_dim=64",
    "model.moe.num_experts=8",
    "steps=14",
    "allow_changes=true",
    "checkpoint.every=0",
]


@pytest.mark.full  # of real runs; test_elastic_stream has streams of its own in CI
def test_each_sample_comes_once_an_epoch_through_three_sizes_of_batch(tmp_path: Path) -> None:
    folder, numbered, position = with_digits(tmp_path), {}, 0
    names = keys_by_name(folder)
    for last, batch, ranks, workers, micro_batches in LEGS:
        layout = [
            f"processes={ranks}",
            f"parallel.expert_axis={ranks}",
            f"data.workers={workers}",
            f"micro_batches={micro_batches}",
        ]
        life = Life(folder, "elastic", 14, *SMALL, *layout, f"batch_size={batch}", f"stop_after={last}")
        assert life.end({}) == 0, life.said()
        lines = [json.loads(line) for file in life.record.iterdir() for line in file.read_text().splitlines()]
        assert min(line["position"] for line in lines) == position + batch, "it goes on where the one before it stopped"
        position = max(line["position"] for line in lines)
        for line in lines:
            for number, picture in zip(line["samples"], line["pictures"], strict=True):
                assert number not in numbered
                numbered[number] = names[picture]
    assert sorted(numbered) == list(range(6 * 160 + 3 * 240 + 5 * 80))
    total = len(names)
    assert total < len(numbered) < 2 * total
    first, second = ([numbered[n] for n in range(start, min(start + total, position))] for start in (0, total))
    assert sorted(first) == sorted(names.values()), "the first epoch holds every sample once"
    assert max(Counter(second).values()) == 1
