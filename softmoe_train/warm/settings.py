"""This file owns what a run is told about the weights that it starts from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from softmoe_train.config import Record
from softmoe_train.redact import without_secrets

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
NPZ, SAFETENSORS = ".npz", ".safetensors"
NO_PICKLE = (
    "it may be a pickle, which could run code as it is read; write it as safetensors, where you trust it, by "
    "`safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'weights.safetensors')`"
)


class WarmConfig(Record):
    """The weights to start from at step 0; a run that has a checkpoint of its own reads them no more."""

    # A run or step folder of ours or its URL, a safetensors file (ours or in timm's names), a big_vision .npz.
    source: str | None
    weights: Literal["model", "average"]  # which of a checkpoint's
    # Relative deviation of what is copied to several experts or slots; 0: exact copies.
    noise: Annotated[float, Field(ge=0, lt=1)]
    head: Literal["auto", "fresh"]  # auto: taken over where the number of classes is the same
    allow_new: list[str]  # patterns (*, ?) of our tensors that may start fresh although a source should have them
    ignore: list[str]  # patterns of the source's tensors to leave aside although nothing here explains them

    @field_validator("source")
    @classmethod
    def _is_no_pickle(cls, source: str | None) -> str | None:
        if source is not None and source.lower().endswith(PICKLES) and not Path(source).is_dir():
            raise ValueError(f"warm.source={without_secrets(source)}: {NO_PICKLE}")
        return source
