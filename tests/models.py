"""Settings of small models: what a test says, on top of conf/model/_base.yaml."""

from typing import Any

from softmoe_train.config import config_folder, load_yaml
from softmoe_train.model.records import MoEConfig


def moe_config(**changes: Any) -> MoEConfig:
    """The mixture of experts of `_base.yaml` with these keys changed; a section's keys may be given in part."""
    values = load_yaml(config_folder() / "model" / "_base.yaml")["moe"]
    merged = {key: {**values[key], **new} if isinstance(new, dict) else new for key, new in changes.items()}
    return MoEConfig(**{**values, **merged})
