"""This file owns the host memory of a save: one buffer as large as what a rank writes, used again for every save."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_train.checkpoint.shards import ShardLayout
from softmoe_train.dist import local_values


class Staging:
    """The data of one rank's file, as bytes in the order of the file; touched when it is made, so that no copy waits for pages."""

    def __init__(self, shard: ShardLayout, *, pinned: bool) -> None:
        self.shard = shard
        self.bytes = torch.zeros(shard.num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self._views = [
            self.bytes[begin : begin + part.num_bytes].view(part.dtype).view(part.box.sizes)
            for part, begin in zip(shard.parts, shard.begins)
        ]

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor | DTensor]) -> None:
        """Copy what this rank writes; when it returns, the tensors may change."""
        devices = set()
        for part, view in zip(self.shard.parts, self._views):
            local = local_values(tensors[part.name])
            assert (local.shape, local.dtype) == (view.shape, view.dtype), (part, local.shape, local.dtype)
            view.copy_(local, non_blocking=True)
            devices.add(local.device)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
