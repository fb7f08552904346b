"""This file owns the keys of `softmoe bench`: what each measurement may be told, and what may not be combined."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from softmoe_train.bench.floor import LayerShape
from softmoe_train.config import JsonOut, Record, out_problems

Positive = Annotated[int, Field(ge=1)]
Some = Field(min_length=1)
ListOf = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
Dtype = Literal["float32", "bfloat16"]


class Measuring(Record):
    """What every measurement can be told."""

    rounds: Positive  # interleaved rounds that count
    warmup: Annotated[int, Field(ge=0)]  # rounds before them that do not
    out: JsonOut


class LayerSettings(Measuring):
    """Keys of `bench layer`: a grid of shapes, each in every dtype."""

    experts: Annotated[list[Positive], Some, ListOf]
    total_slots: Positive  # of an image; each number of experts divides it
    cases: Annotated[list[str], ListOf]  # experts x slots per expert, as 128x1; [] takes experts over total_slots
    images: Annotated[list[Positive], Some, ListOf]
    tokens: Positive  # of an image
    width: Positive
    hidden: Positive
    dtype: Annotated[list[Dtype], Some, ListOf]
    device: Literal["auto", "cpu", "cuda"]
    peers: bool
    picture: str | None

    @field_validator("picture")
    @classmethod
    def _drawable(cls, picture: str | None) -> str | None:
        problems = out_problems("picture", picture, ".png")
        if picture is not None and not find_spec("matplotlib"):
            problems.append(
                f'picture={picture} needs matplotlib, which is not installed: pip install "softmoe-train[pictures]"'
            )
        if problems:
            raise ValueError("; ".join(problems))
        return picture

    @field_validator("cases")
    @classmethod
    def _pairs(cls, cases: list[str], info: ValidationInfo) -> list[str]:
        wrong = [f"cases={case} is not experts x slots; write it as 128x1" for case in cases if _case(case) is None]
        total = info.data.get("total_slots")
        uneven = [number for number in info.data.get("experts", []) if total and total % number]
        if uneven and not cases:
            wrong.append(
                f"experts={','.join(map(str, uneven))} does not divide total_slots={total}; use divisors, another total_slots, "
                f"or name the pairs, as in cases={uneven[0]}x1"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return cases

    @field_validator("device")
    @classmethod
    def _there(cls, device: str) -> str:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but torch sees no CUDA device here; use device=cpu or auto")
        return device

    def shapes(self) -> list[LayerShape]:
        """Every shape of the grid: images within experts."""
        pairs = [_case(case) for case in self.cases] or [(E, self.total_slots // E) for E in self.experts]
        return [
            LayerShape(images, self.tokens, self.width, self.hidden, *pair)
            for images in self.images
            for pair in pairs
            if pair is not None
        ]


class InferSettings(Measuring):
    """Keys of `bench infer`, beside those of a run."""

    images: Annotated[list[Positive], Some, ListOf]  # of a batch


class StepSettings(Measuring):
    """Keys of `bench step`, beside those of a run."""

    batches: Literal["made", "stream"]  # one batch in memory, or the run's own data


class ExchangeSettings(Measuring):
    """Keys of `bench exchange`, beside those of a run."""

    images: Annotated[list[Positive], Some, ListOf]  # of a rank


class CheckpointSettings(Measuring):
    """Keys of `bench checkpoint`, beside those of a run."""

    folder: str  # on the disk to measure

    @field_validator("folder")
    @classmethod
    def _writable(cls, folder: str) -> str:
        if not Path(folder).is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"folder={folder} is not a folder that we may write to; name one on the disk to measure")
        return folder


class StreamSettings(Measuring):
    """Keys of `bench stream`, beside those of a run."""

    images: Positive  # of a batch
    batches: Positive  # of a round
    megapixels: (
        Annotated[float, Field(gt=0, le=50)] | None
    )  # photographs made of data.train's pictures; null: these as they are


def group_problems(own: Measuring | None, group_images: int) -> list[str]:
    """Why batches of so many images would not be whole routing groups."""
    images = own.images if isinstance(own, InferSettings | ExchangeSettings) else []
    odd = [str(number) for number in images if number % group_images]
    if not odd:
        return []
    return [
        f"images={','.join(odd)} with model.moe.sparse.group_images={group_images}: batches are whole routing groups; use multiples of "
        f"{group_images}"
    ]


def _case(text: str) -> tuple[int, int] | None:
    experts, times, slots = text.partition("x")
    if not times or not experts.isdecimal() or not slots.isdecimal() or not int(experts) or not int(slots):
        return None
    return int(experts), int(slots)
