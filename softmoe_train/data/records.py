"""This file owns what a data configuration may say: the records under `data` and the rules each keeps alone."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from softmoe_train.config import Record

Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
ShardSpec = str | list[str]

_SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class InceptionCrop(Record):
    """A random crop of `min_area` to `max_area` of the picture, resized bilinearly to a square (paper, section 5)."""

    kind: Literal["inception_crop"]
    min_area: Fraction
    max_area: Fraction
    min_aspect: Positive
    max_aspect: Positive
    antialias: bool
    flip: bool
    arithmetic: Literal[
        "float32", "uint8"
    ]  # of the resize: truncated, as the paper's pipeline does, or rounded and faster

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        for name in ("area", "aspect"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(
                    f"min_{name}={low} is above max_{name}={high}: a crop needs min <= max; exchange them."
                )
        return self


class PaddedCrop(Record):
    """The picture at its target size, padded with `padding` black pixels a side and cut back at a random place."""

    kind: Literal["padded_crop"]
    padding: Count
    antialias: bool
    flip: bool


class ResizeCentralCrop(Record):
    """The shorter side resized to `resize` by area averages, then the central square (paper, section 5)."""

    kind: Literal["resize_central_crop"]
    resize: PositiveInt


class Resize(Record):
    """A bilinear resize to a square of `resize` pixels, whatever the aspect, then the central square.

    `resize: null` means the image size itself; where the picture has that size already, it stays exactly as it is.
    """

    kind: Literal["resize"]
    resize: PositiveInt | None
    antialias: bool


TransformConfig = Annotated[InceptionCrop | PaddedCrop | ResizeCentralCrop | Resize, Field(discriminator="kind")]


class RandAugment(Record):
    """RandAugment of training pictures: `layers` operations in a row, all at one `magnitude` (`randaugment.py`)."""

    layers: PositiveInt
    magnitude: Annotated[float, Field(ge=0, le=20)]  # above 20 the released Posterize would need more than 8 bits


class CacheConfig(Record):
    """How shards at URLs are read: where this node keeps copies, how many, and with how much patience."""

    folder: str | None  # null: softmoe_train/shards under XDG_CACHE_HOME, or ~/.cache
    max_gib: Annotated[float, Field(ge=0)]  # 0 keeps none: every sample is read by itself
    prefetch: Count  # shards that are fetched before they are needed
    attempts: PositiveInt
    timeout: Positive  # seconds


class SourceConfig(Record):
    """One of several sources of training samples: `weight` of every P samples, P the sum of all sources' weights."""

    shards: ShardSpec
    weight: PositiveInt
    seed: Count  # of its own order, together with the run's


class WebDatasetConfig(Record):
    """Tar shards of pictures and `.cls` labels: where they are, in which order they are read, what is done to them."""

    kind: Literal["webdataset"]
    train: ShardSpec | None
    mixture: dict[str, SourceConfig] | None  # in place of train: sources by name
    test: ShardSpec | None
    cache: CacheConfig
    streams: PositiveInt
    shuffle_window: PositiveInt  # samples
    block: PositiveInt  # samples of one contiguous run of tars
    workers: Count  # decode processes a rank; 0 decodes in the training process
    prefetch: PositiveInt  # batches a worker prepares ahead
    labels: Literal["hard", "multi_hot"]
    train_transform: TransformConfig
    test_transform: TransformConfig
    randaugment: RandAugment | None  # after train_transform
    mixup: Positive | None  # p of Beta(p, p); above 0
    scaled_decode: bool  # a training JPEG is decoded at a half, a quarter or an eighth of its size where an inception crop allows it
    max_pixels: PositiveInt
    max_broken: Count

    @field_validator("mixture")
    @classmethod
    def _names_of_sources(cls, mixture: dict[str, SourceConfig] | None) -> dict[str, SourceConfig] | None:
        wrong = [name for name in mixture or {} if not _SOURCE_NAME.fullmatch(name)]
        if wrong:
            raise ValueError(
                f"data.mixture: {wrong[0]!r} is no name for a source, since metrics and overrides use it: use letters, digits, _ and -"
            )
        if mixture is not None and not mixture:
            raise ValueError("data.mixture={} holds no source; name one or more, or use null and data.train")
        return mixture


class SyntheticConfig(Record):
    """Pictures made by arithmetic from (seed, sample number): a class-dependent pattern under noise."""

    kind: Literal["synthetic"]
    streams: PositiveInt
    labels: Literal["hard", "multi_hot"]
    num_train: PositiveInt
    num_test: PositiveInt
    noise: Annotated[float, Field(ge=0)]  # standard deviation in gray levels
    mixup: Positive | None  # p of Beta(p, p); above 0


DataConfig = Annotated[WebDatasetConfig | SyntheticConfig, Field(discriminator="kind")]
