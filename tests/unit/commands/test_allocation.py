"""The sentence about memory that cannot be had, from what torch says."""

import pytest
import torch

from softmoe_train.commands.allocation import no_memory


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), "2.00 GiB of device memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than 1EB memory."), "what was asked of device"),
        (torch.AcceleratorError("CUDA error: out of memory"), "what was asked of device memory"),
        (RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes."), "3.00 GiB of host memory"),
        (RuntimeError("[...] DefaultCPUAllocator: not enough memory: you tried to allocate 1610612736 bytes."), "1.50 GiB of host memory"),
        (MemoryError(), "what was asked of host memory"),
    ],
)  # fmt: skip
def test_missing_memory_is_told_in_a_sentence(error: Exception, said: str) -> None:
    told = no_memory("bench", error)
    assert told is not None
    assert told.startswith(said)
    assert told.endswith("could not be had; use fewer images (images=, batch_size=) or a smaller model or layer")


def test_another_error_is_not_about_memory() -> None:
    assert no_memory("train", RuntimeError("CUDA error: an illegal memory access was encountered")) is None
