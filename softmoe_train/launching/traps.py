"""This file owns which settings of the environment ruin speed or overlap, and what their makers say of them.

Sources: NVIDIA's CUDA and NCCL guides ("Debugging" variables are not for production), PyTorch's pages of environment variables, of
torch.distributed's debugging and of ProcessGroupNCCL, and Megatron-LM's guides, where CUDA_DEVICE_MAX_CONNECTIONS=1 is for tensor
parallelism and is to be unset under FSDP.
"""

from collections.abc import Mapping
from typing import NamedTuple

OFF = ("", "0", "false", "off", "no")


class Trap(NamedTuple):
    """A variable, the values that are one (None: any that is not off), where, and what it does."""

    name: str
    values: tuple[str, ...] | None
    where: str  # gpu, fsdp (on a GPU), hosts (several, of GPUs) or all
    does: str


TRAPS = (
    Trap("CUDA_DEVICE_MAX_CONNECTIONS", ("1",), "fsdp", "all streams share one queue, so FSDP's gathers do not run under the computation"),
    Trap("CUDA_LAUNCH_BLOCKING", None, "gpu", "every kernel is waited for, so nothing overlaps"),
    Trap("PYTORCH_NO_CUDA_MEMORY_CACHING", None, "gpu", "every tensor is allocated by the driver, which waits for the device"),
    Trap("TORCH_NCCL_BLOCKING_WAIT", None, "gpu", "the program waits for each collective, so nothing overlaps"),
    Trap("NCCL_BLOCKING_WAIT", None, "gpu", "the program waits for each collective, so nothing overlaps"),
    Trap("NCCL_P2P_DISABLE", None, "gpu", "GPUs of a host reach each other through host memory, not directly"),
    Trap("NCCL_SHM_DISABLE", None, "gpu", "GPUs of a host that have no direct way use the network"),
    Trap("NCCL_IB_DISABLE", None, "hosts", "hosts reach each other by TCP, not InfiniBand or RoCE"),
    Trap("NCCL_NET_GDR_LEVEL", ("LOC", "0"), "hosts", "what goes to other hosts goes through host memory first"),
    Trap("NCCL_DEBUG", ("INFO", "TRACE"), "gpu", "NCCL writes lines at every communicator, and with TRACE at every call"),
    Trap("NCCL_CHECK_POINTERS", None, "gpu", "NCCL looks at every pointer before every call"),
    Trap("TORCH_DISTRIBUTED_DEBUG", ("DETAIL",), "all", "every collective is preceded by one that compares it over all ranks"),
)  # fmt: skip


def traps_in(environment: Mapping[str, str], *, gpu: bool, fsdp: bool, hosts: int) -> list[str]:
    """Each variable that ruins speed here, with what it does."""
    holds = {"all": True, "gpu": gpu, "fsdp": gpu and fsdp, "hosts": gpu and hosts > 1}
    return [
        f"{trap.name}={environment[trap.name]}: {trap.does}; unset it"
        for trap in TRAPS
        if holds[trap.where] and _is_set(environment.get(trap.name, ""), trap.values)
    ]


def _is_set(value: str, values: tuple[str, ...] | None) -> bool:
    return value.lower() not in OFF if values is None else value.upper() in values
