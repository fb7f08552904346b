"""This file owns what a run may ask of DeepSpeed: which version, which ZeRO stage, which keys of the user's own JSON."""

import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from softmoe_train.config import Record
from softmoe_train.optim.build import OptimConfig, is_elementwise
from softmoe_train.optim.groups import expert_dim, is_frozen
from softmoe_train.optim.schedule import ScheduleConfig
from softmoe_train.parallel.layout import ParallelConfig, expert_axis

# From 0.19.8 on gradients can be summed, the norm left to us, and copies to the host awaited; the flat partitions that we read
# are private to a series.
SUPPORTED = ">=0.19.8,<0.20"
BUCKET = 16 * 2**20  # elements of a reduce bucket, 64 MiB: DeepSpeed's own 5e8 allocates 2 GB in every backward

# What the user's JSON may set, and the type of it. None of these changes a number.
TUNABLE: dict[str, type] = {
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.overlap_comm": bool,
    "zero_optimization.round_robin_gradients": bool,
    "zero_optimization.use_multi_rank_bucket_allreduce": bool,
    "zero_optimization.offload_optimizer.pin_memory": bool,
    "comms_logger.enabled": bool,
    "comms_logger.verbose": bool,
    "comms_logger.prof_all": bool,
    "comms_logger.debug": bool,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
}


class DeepSpeedConfig(Record):
    """ZeRO through DeepSpeed: replicated weights, with the optimizer (1) and the gradients (2) cut over the ranks."""

    kind: Literal["deepspeed"]
    zero_stage: int
    offload_optimizer: bool  # ZeRO 1 and 2: moments and float32 copies in host memory, the update on the host
    config: str | None  # a DeepSpeed JSON of the user's own, for the keys that change no number

    @field_validator("zero_stage")
    @classmethod
    def _a_stage(cls, stage: int) -> int:
        if stage == 3:
            raise ValueError(
                "engine.zero_stage=3: DeepSpeed refuses it for a model with experts; use engine=torch "
                "parallel.sharding=fsdp, which shards the same tensors"
            )
        if stage not in (0, 1, 2):
            raise ValueError(f"engine.zero_stage={stage}: there are stages 0, 1 and 2")
        return stage

    @model_validator(mode="after")
    def _fits(self) -> "DeepSpeedConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "engine.offload_optimizer=true with engine.zero_stage=0: only stages 1 and 2 cut the optimizer; use one"
            )
        return self


@dataclass(frozen=True)
class Decided:
    """What the run's own settings decide of a DeepSpeed configuration."""

    engine: DeepSpeedConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    precision: str
    batch_size: int
    micro_batches: int
    size: int

    def values(self) -> dict[str, tuple[Any, str]]:
        """By DeepSpeed's key: its value here, and the setting of ours that decides it."""
        optim, engine = self.optim, self.engine
        own = "this engine, whose gradients are sums in float32,"
        values: dict[str, tuple[Any, str]] = {
            "train_batch_size": (self.batch_size, "batch_size"),
            "train_micro_batch_size_per_gpu": (
                self.batch_size // self.size // self.micro_batches,
                "batch_size / ranks / micro_batches",
            ),
            "gradient_accumulation_steps": (self.micro_batches, "micro_batches"),
            "gradient_clipping": (optim.clip_norm or 0.0, "optim.clip_norm"),
            "zero_optimization.stage": (engine.zero_stage, "engine.zero_stage"),
            "zero_optimization.offload_optimizer.device": (
                "cpu" if engine.offload_optimizer else "none",
                "engine.offload_optimizer",
            ),
            "optimizer.type": (
                {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}.get(optim.kind, optim.kind),
                "optim.kind",
            ),
            "optimizer.params.lr": (self.schedule.peak, "schedule.peak"),
            "optimizer.params.betas": ([optim.beta1, optim.beta2], "optim.beta1 and optim.beta2"),
            "optimizer.params.eps": (optim.eps, "optim.eps"),
            "optimizer.params.momentum": (optim.momentum, "optim.momentum"),
            "optimizer.params.weight_decay": (optim.decay.kernels, "optim.decay.kernels"),
            "scheduler.type": (None, f"schedule.kind={self.schedule.kind}"),
            "communication_data_type": ("fp32", own),
            "gradient_allreduce_op": ("sum", own),
            "prescale_gradients": (False, own),
            "gradient_predivide_factor": (1.0, own),
            "zero_allow_untested_optimizer": (True, own),
            "zero_optimization.contiguous_gradients": (True, own),
            "zero_optimization.reduce_scatter": (True, own),
        }
        # DeepSpeed's own precisions cast parameters or intermediates: ours are float32, and the layers say what they compute in.
        casts = {
            f"{key}.enabled": (False, f"precision={self.precision}")
            for key in ("fp16", "bf16", "amp", "torch_autocast")
        }
        return {**values, **casts}


def deepspeed_problems(decided: Decided) -> list[str]:
    """Everything that keeps a run from using DeepSpeed as it is told to, each with its remedy; starts nothing."""
    problems = _version_problems()
    if not is_elementwise(decided.optim):
        problems.append(
            f"optim.kind={decided.optim.kind} with engine=deepspeed: ZeRO flattens parameters, and it needs their shapes; use "
            f"optim=adamw, adam or sgd, or engine=torch"
        )
    if decided.parallel.sharding != "replicated":
        problems.append(
            f"parallel.sharding={decided.parallel.sharding} with engine=deepspeed: ZeRO does the sharding; use "
            f"parallel.sharding=replicated, or engine=torch"
        )
    return problems + _load(decided)[1]


def frozen_experts_problems(decided: Decided, num_experts: int, names: list[str]) -> list[str]:
    """Why ZeRO would find no expert to train, in a model of so many experts with parameters of these `names`."""
    stage, frozen = decided.engine.zero_stage, decided.optim.frozen
    experts = [name for name in names if expert_dim(name) == 0]
    if not stage or not experts or not all(is_frozen(name, frozen) for name in experts):
        return []
    if expert_axis(decided.parallel, num_experts=num_experts, size=decided.size) == 1:
        return []
    return [
        f"optim.frozen={frozen} with engine=deepspeed engine.zero_stage={stage}: every expert is frozen, and ZeRO refuses a model with "
        f"experts over ranks of which none is trained; use engine=torch, engine.zero_stage=0, or parallel.expert_axis=1"
    ]


def settings(decided: Decided) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` is given: ours, with what the user's JSON adds."""
    zero: dict[str, Any] = {"stage": decided.engine.zero_stage}
    if decided.engine.zero_stage:
        zero |= {"reduce_bucket_size": BUCKET, "contiguous_gradients": True, "reduce_scatter": True}
        # We measure the norm and clip by it; DeepSpeed's own would wait for the device. Its offload insists on one.
        zero["compute_grad_norm"] = decided.engine.offload_optimizer
    if decided.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    merged: dict[str, Any] = {
        "train_batch_size": decided.batch_size,
        "gradient_accumulation_steps": 1,  # `last` says when to reduce, and the loss is divided by the global batch already
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "sum",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused optimizers run on the host as well, and need no compiler
        "timers": {"throughput": {"enabled": False}},  # it waits for the device
        "zero_optimization": zero,
    }
    given, problems = _load(decided)
    assert problems == [], problems
    for key, value in given.items():
        if key in TUNABLE:
            *path, last = key.split(".")
            here = merged
            for part in path:
                here = here.setdefault(part, {})
            here[last] = value
    return merged


def _version_problems() -> list[str]:
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        return [f'engine=deepspeed: it is not installed; pip install "deepspeed{SUPPORTED}", or use engine=torch']
    if supported(found):
        return []
    return [
        f'engine=deepspeed: version {found} is installed, {SUPPORTED} is what works; pip install "deepspeed{SUPPORTED}", '
        f"or use engine=torch"
    ]


def supported(found: str) -> bool:
    """Whether a version of DeepSpeed is within `SUPPORTED`."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", found)
    return numbers is not None and (0, 19, 8) <= tuple(map(int, numbers.groups())) < (0, 20, 0)


def _load(decided: Decided) -> tuple[dict[str, Any], list[str]]:
    """The user's JSON by dotted key, and what is wrong with it."""
    path = decided.engine.config
    if path is None:
        return {}, []
    try:
        tree = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        return {}, [f"engine.config={path} cannot be read as JSON: {error}"]
    if not isinstance(tree, dict):
        return {}, [f"engine.config={path} holds no settings: expected an object, found {type(tree).__name__}"]
    given = _flat(tree)
    ours = decided.values()
    where = f"engine.config={path}"
    problems = [p for key, value in given.items() for p in _key_problems(where, key, value, ours)]
    return given, problems + [p for key in given for p in _void_problems(where, key, decided.engine)]


def _void_problems(where: str, key: str, engine: DeepSpeedConfig) -> list[str]:
    """Why a key that may be set would do nothing."""
    if engine.zero_stage == 0 and key in TUNABLE and key.startswith("zero_optimization."):
        return [f"{where}: {key} does nothing with engine.zero_stage=0; leave it out, or use stage 1 or 2"]
    if not engine.offload_optimizer and key == "zero_optimization.offload_optimizer.pin_memory":
        return [f"{where}: {key} does nothing with engine.offload_optimizer=false; leave it out"]
    return []


def _key_problems(where: str, key: str, value: Any, ours: dict[str, tuple[Any, str]]) -> list[str]:
    if key in TUNABLE:
        kind = TUNABLE[key]
        whole = kind is int and isinstance(value, float) and value.is_integer()  # 5e8, as people write them
        if whole or (type(value) is kind and (kind is bool or value > 0)):
            return []
        return [
            f"{where}: {key}={json.dumps(value)} must be {'true or false' if kind is bool else 'a whole number above 0'}"
        ]
    if key in ours:
        wanted, decider = ours[key]
        if value == "auto" or _equal(value, wanted):
            return []
        if key == "optimizer.type" and str(value).lower() == str(wanted).lower():
            return []
        return [
            f"{where}: {key}={json.dumps(value)}, but {decider} decides {key}={json.dumps(wanted)}; leave one of the two out"
        ]
    if key.partition(".")[0] == "scheduler":
        return [f"{where}: {key} is for a scheduler of DeepSpeed's, but the run's own schedule decides; leave it out"]
    return [f"{where}: {key} is not among the keys that a run may set: {', '.join(TUNABLE)}; leave it out"]


def _equal(value: Any, wanted: Any) -> bool:
    """Whether both are the same in JSON, where 1 is 1.0 but true is no number (in Python true is 1)."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted key; an object that is empty is a key that is told, too."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
