"""Two and more GPUs under NCCL: `softmoe parity` over the layouts. These have not run yet; they need no data."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import environment

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
LAYOUTS = [
    (2, "parallel.expert_axis=2"),
    (2, "parallel.expert_axis=2 micro_batches=4 precision=bfloat16"),
    (2, "parallel.expert_axis=2 parallel.sharding=fsdp"),
    (2, "parallel.expert_axis=1 parallel.sharding=fsdp precision=bfloat16 parallel.recompute=block"),
    (2, "parallel.expert_axis=2 parallel.exchange_chunks=2"),
    (2, "parallel.expert_axis=2 compile=true"),
    (2, "parallel.expert_axis=2 engine=deepspeed engine.zero_stage=1"),
    (2, "parallel.expert_axis=2 engine=deepspeed engine.zero_stage=2 precision=bfloat16"),
    (4, "parallel.expert_axis=2 parallel.sharding=fsdp"),
    (4, "parallel.expert_axis=4 parallel.sharding=fsdp precision=bfloat16"),
    (4, "parallel.expert_axis=2 parallel.sharding=hsdp parallel.shard_size=2"),
    (4, "parallel.expert_axis=4 parallel.exchange=two_stage parallel.node_size=2 parallel.exchange_chunks=2"),
    (4, "parallel.expert_axis=2 engine=deepspeed engine.zero_stage=2"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_a_layout_equals_one_gpu(tmp_path: Path, ranks: int, layout: str) -> None:
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} CUDA devices, torch sees {GPUS}")
    run = ["recipe=debug", "device=cuda", f"processes={ranks}", *layout.split()]
    command = [sys.executable, "-m", "softmoe_train", "parity", *run]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
