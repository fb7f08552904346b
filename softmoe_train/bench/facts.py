"""This file owns what a measurement says about itself: machine, versions, command; and its JSON for programs."""

import json
import platform
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import softmoe_train
from softmoe_train.cores import usable_cores


def facts_of(device: torch.device, arguments: list[str], processes: int) -> dict[str, Any]:
    """Hardware, versions, threads and the command, as plain values."""
    return {
        "command": shlex.join(["softmoe", "bench", *arguments]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "softmoe_train": softmoe_train.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "device_name": device_name(device),
        "cpu_count": usable_cores(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def sentence_of(facts: dict[str, Any]) -> str:
    """The facts that a person needs to read a table."""
    alone = facts["processes"] == 1
    cores = f" ({facts['cpu_count']} cores)" if facts["device"] == "cpu" else ""
    where = "" if alone else f"{facts['processes']} processes, "
    count = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    threads = f"{count}{'' if alone else ' each'}, " if facts["device"] == "cpu" else ""
    return f"{facts['device_name']}{cores}, {where}{threads}torch {facts['torch']}"


def write_json(
    path: str, bench: str, facts: dict[str, Any], settings: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """All that was measured, for programs."""
    document = {"bench": bench, "facts": facts, "settings": settings, "rows": rows}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
