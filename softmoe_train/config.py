"""This file owns the record base class: what a configuration value is and how a wrong one is reported."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen, strictly typed record: no defaults, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
