"""What a run may ask of DeepSpeed: everything else is refused before anything starts, with both settings named."""

import json
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml

from softmoe_train.config import ConfigError, compose
from softmoe_train.engine import deepspeed_config
from softmoe_train.engine.deepspeed_config import (
    SUPPORTED,
    TUNABLE,
    Decided,
    DeepSpeedConfig,
    deepspeed_problems,
    settings,
    supported,
)
from softmoe_train.settings import RunConfig, check, decided
from tests.runs import ROOT, environment

DEBUG = ["recipe=debug", "engine=deepspeed", "batch_size=16"]


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(RunConfig, [*DEBUG, *overrides], lambda config: check(config, 2, 2))
    return caught.value.problems


@cache
def debug() -> RunConfig:
    return compose(RunConfig, DEBUG, lambda config: check(config, 2, 2))


def with_json(folder: Path, tree: Any, stage: int = 1) -> Decided:
    file = folder / "ds.json"
    file.write_text(json.dumps(tree))
    return decided(
        debug(), DeepSpeedConfig(kind="deepspeed", zero_stage=stage, offload_optimizer=False, config=str(file)), 2
    )


def test_zero_3_is_refused_with_what_does_the_same() -> None:
    (problem,) = problems_of("engine.zero_stage=3")
    assert problem.startswith("engine.zero_stage=3: DeepSpeed refuses it for a model with experts; use engine=torch ")
    assert "parallel.sharding=fsdp" in problem


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.zero_stage=4"], "engine.zero_stage=4: there are stages 0, 1 and 2"),
        (["engine.zero_stage=one"], "engine.zero_stage='one'"),
        (["engine.zero_stage=0", "engine.offload_optimizer=true"], "engine.offload_optimizer=true with engine.zero_stage=0"),
        (["parallel.sharding=fsdp"], "parallel.sharding=fsdp with engine=deepspeed: ZeRO does the sharding; use "),
        (["engine.config=no.json"], "engine.config=no.json cannot be read as JSON"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides: list[str], words: str) -> None:
    (problem,) = problems_of(*overrides)
    assert problem.startswith(words)


def test_the_keys_of_one_engine_are_unknown_to_the_other() -> None:
    with pytest.raises(ConfigError, match=r"there is no key engine\.zero_stage"):
        compose(RunConfig, ["recipe=debug", "engine.zero_stage=1"], lambda _: [])


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"train_batch_size": 64}, "train_batch_size=64, but batch_size decides train_batch_size=16"),
        ({"gradient_clipping": 5.0}, "gradient_clipping=5.0, but optim.clip_norm decides gradient_clipping=1.0"),
        ({"gradient_accumulation_steps": 4}, "but micro_batches decides gradient_accumulation_steps=1"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3, but engine.zero_stage decides zero_optimization.stage=1"),
        ({"optimizer": {"type": "SGD"}}, 'optimizer.type="SGD", but optim.kind decides optimizer.type="AdamW"'),
        ({"optimizer": {"params": {"lr": 5.0}}}, "optimizer.params.lr=5.0, but schedule.peak decides"),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type="WarmupLR", but schedule.kind='),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true, but precision=float32 decides fp16.enabled=false"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=true, but precision=float32 decides"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled=true, but precision=float32 decides"),
        ({"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}, "does nothing with engine.offload_optimizer=false"),
        ({"communication_data_type": "bf16"}, 'communication_data_type="bf16", but this engine, whose gradients are sums'),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "but engine.offload_optimizer decides"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size=-1 must be a whole number"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown=1 must be true or false"),
        ({"zero_optimization": {"stage3_max_live_parameters": 1}}, "is not among the keys that a run may set: zero_optimization."),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true, but engine.zero_stage decides zero_optimization.stage=1"),
        ({"prescale_gradients": 0}, "prescale_gradients=0, but this engine"),
        ({"scheduler": {}}, "scheduler is for a scheduler of DeepSpeed's, but the run's own schedule decides; leave it out"),
        ({"zero_optimization": {}}, "zero_optimization is not among the keys that a run may set"),
        ([1], "holds no settings: expected an object, found list"),
    ],
)  # fmt: skip
def test_a_json_that_contradicts_the_run_is_refused_and_names_both(tmp_path: Path, tree: Any, words: str) -> None:
    (problem,) = deepspeed_problems(with_json(tmp_path, tree))
    assert problem.startswith(f"engine.config={tmp_path / 'ds.json'}")
    assert words in problem


def test_a_json_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    (problem,) = deepspeed_problems(with_json(tmp_path, {"zero_optimization": {"overlap_comm": True}}, stage=0))
    assert "zero_optimization.overlap_comm does nothing with engine.zero_stage=0" in problem


def test_a_json_that_agrees_is_merged(tmp_path: Path) -> None:
    tree = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 8.0,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "adamw"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e6, "overlap_comm": True},
        "comms_logger": {"enabled": True},
    }
    assert deepspeed_problems(with_json(tmp_path, tree, stage=2)) == []
    merged = settings(with_json(tmp_path, tree, stage=2))
    assert merged["zero_optimization"]["reduce_bucket_size"] == 5e6
    assert merged["zero_optimization"]["overlap_comm"] is True
    assert merged["comms_logger"] == {"enabled": True}
    assert merged["gradient_clipping"] == 0.0, "we clip"
    assert "optimizer" not in merged


def test_every_mistake_of_a_json_is_told_at_once(tmp_path: Path) -> None:
    assert len(deepspeed_problems(with_json(tmp_path, {"gradient_clipping": 2.0, "train_batch_size": 3, "x": 1}))) == 3


@pytest.mark.parametrize("found", ["0.19.7", "0.20.0", "1.0.0", "0.18.9", "unknown"])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: str) -> None:
    debug()  # composed with the version that is here
    monkeypatch.setattr(deepspeed_config, "version", lambda _: found)
    (problem,) = deepspeed_problems(with_json(tmp_path, {}))
    assert problem.startswith(f"engine=deepspeed: version {found} is installed, {SUPPORTED} is what works; pip install")


def test_a_missing_deepspeed_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    debug()

    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(deepspeed_config, "version", missing)
    (problem,) = deepspeed_problems(with_json(tmp_path, {}))
    assert problem == f'engine=deepspeed: it is not installed; pip install "deepspeed{SUPPORTED}", or use engine=torch'


def test_the_range_is_the_one_that_is_installed_with_the_package() -> None:
    assert f'"deepspeed{SUPPORTED}"' in (ROOT / "pyproject.toml").read_text()
    assert all(map(supported, ("0.19.8", "0.19.12+cu128")))


def test_a_run_of_the_native_engine_does_not_wait_for_deepspeed() -> None:
    program = "import sys, softmoe_train.run; sys.exit(any(name.split('.')[0] == 'deepspeed' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], env=environment(), check=False).returncode == 0


def test_every_key_of_the_engine_has_a_comment() -> None:
    text = (ROOT / "conf" / "engine" / "deepspeed.yaml").read_text()
    assert set(yaml.safe_load(text)) == set(DeepSpeedConfig.model_fields)
    assert all(re.search(r"  # .+", line) for line in text.splitlines())
    assert len(TUNABLE) > 0
