"""This file owns what a person is told of memory that cannot be had."""

import re

import torch

NO_MEMORY = 3  # the exit code
# What torch says where it raises a plain RuntimeError: the CPU's allocator, a driver that has no more, a size beyond 64 bits.
SAID = ("DefaultCPUAllocator", "CUDA error: out of memory", "Storage size calculation overflowed")
ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGTP]iB)", re.IGNORECASE)
TRAINING = (
    "use more micro_batches, parallel.recompute=block or parallel.sharding=fsdp, or a smaller batch_size or model"
)
SMALLER = {
    "train": TRAINING,
    "finetune": TRAINING,
    "eval": "use a smaller batch_size of the evaluators (evals.upstream.batch_size), or parallel.sharding=fsdp on more processes",
    "parity": "use a smaller batch_size, reference=same or shrink=model",
    "inspect": "free some",
    "export": "free some",
    "shards": "use fewer processes=",
    "bench": "use fewer images (images=, batch_size=) or a smaller model or layer",
}


def no_memory(verb: str, error: Exception) -> str | None:
    """What did not fit and what to make smaller, in a sentence; None for an error of another kind."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(words in str(error) for words in SAID):
        return None
    on_device = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error)
    asked = ASKED.search(str(error))
    amount = "what was asked" if asked is None else _readable(float(asked[1]), asked[2])
    return f"{amount} of {'device' if on_device else 'host'} memory could not be had; {SMALLER.get(verb, 'free some')}"


def _readable(number: float, unit: str) -> str:
    return f"{number / 2**30:,.2f} GiB" if unit == "bytes" else f"{number:,.2f} {unit}"
